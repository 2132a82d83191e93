"""Capacities against their formulas, and against the total that every allocation has to share
out."""

import dataclasses

import numpy as np
import pytest

from corelens import CorelensError, HeadScores, KVBudget
from corelens.sparse.budget import give_back

SHAPE = (6, 8, 4)  # layers, query heads, KV heads
LONG = 100_000


def scores(power: float = 6, seed: int = 0, shape: tuple[int, int] = SHAPE[:2]) -> HeadScores:
    return HeadScores(np.random.default_rng(seed).random(shape) ** power)


def slow_capacity(
    values: np.ndarray, layer: int, kv: int, budget: int, rho: float, window: int
) -> int:
    """The formula of SparseMM for one KV head, number by number."""
    n_layers, n_heads, n_kv = SHAPE
    group = n_heads // n_kv
    share = sum(float(values[layer, head]) for head in range(kv * group, (kv + 1) * group))
    share /= sum(float(value) for value in values.ravel())
    spread = budget - window
    least = int(rho * spread)
    return round(share * (spread - least) * n_layers * n_kv + least) + window


@pytest.mark.parametrize(
    "budget, rho, window", [(256, 0.1, 32), (64, 0.0, 16), (100, 0.5, 7), (1000, 1.0, 32)]
)
def test_capacities_are_the_formula(budget, rho, window):
    head_scores = scores()
    capacities = KVBudget(head_scores, budget=budget, rho=rho, window=window).capacities(
        *SHAPE, LONG
    )
    wanted = [
        [slow_capacity(head_scores.values, layer, kv, budget, rho, window) for kv in range(4)]
        for layer in range(6)
    ]
    assert capacities.tolist() == wanted
    # each of 24 heads is rounded by half a key at the most
    assert abs(capacities.sum() - budget * 24) <= 12
    assert capacities.min() >= int(rho * (budget - window)) + window


def test_equal_scores_are_equal_budgets():
    for budget in (KVBudget(None, 200), KVBudget(HeadScores(np.full(SHAPE[:2], 0.3)), 200)):
        assert (budget.capacities(*SHAPE, LONG) == 200).all()


@pytest.mark.parametrize("length", [257, 300, 400, 700, 3000])
@pytest.mark.parametrize("allocation", ["scores", "random", "pyramidkv", "adakv"])
def test_nothing_is_lost_above_the_length_of_the_prompt(allocation, length):
    head_scores = scores(power=12) if allocation in ("scores", "random") else None
    budget = KVBudget(head_scores, 256, allocation=allocation)
    capacities, unbounded = budget.capacities(*SHAPE, length), budget.capacities(*SHAPE, LONG)
    assert capacities.max() <= length
    assert capacities.sum() == unbounded.sum()
    assert abs(capacities.mean() - 256) <= 0.5
    if allocation in ("scores", "random"):
        assert unbounded.max() > 700 and (capacities >= np.minimum(unbounded, length)).all()


def test_a_short_prompt_is_kept_whole():
    for length in (1, 20, 256):
        assert (KVBudget(scores(), 256).capacities(*SHAPE, length) == length).all()


def test_what_is_given_back_goes_by_score():
    wanted, shares = np.array([[90, 10, 10, 10]]), np.array([[0.7, 0.2, 0.1, 0.0]])
    assert give_back(wanted, shares, 60).tolist() == [[60, 30, 20, 10]]
    # 61 to give away: two parts in three and one, until the first is full; the head of score 0 is
    # the last resort
    assert give_back(np.array([[100, 10, 10, 0]]), shares, 39).tolist() == [[39, 39, 39, 3]]
    assert give_back(np.array([[100, 10, 10, 0]]), shares, 30).tolist() == [[30, 30, 30, 30]]


def test_random_deals_the_same_capacities_to_other_heads():
    head_scores = scores()
    real = KVBudget(head_scores, 256).capacities(*SHAPE, LONG)
    draws = [
        KVBudget(head_scores, 256, allocation="random", seed=seed).capacities(*SHAPE, LONG)
        for seed in (0, 1)
    ]
    for dealt in draws:
        assert sorted(dealt.ravel()) == sorted(real.ravel()) and (dealt != real).any()
    assert (draws[0] != draws[1]).any()
    again = KVBudget(head_scores, 256, allocation="random", seed=1).capacities(*SHAPE, LONG)
    assert (again == draws[1]).all()


def test_pyramid_falls_in_equal_steps():
    capacities = KVBudget(None, 232, window=32, allocation="pyramidkv", beta=20).capacities(
        *SHAPE, LONG
    )
    # arXiv 2406.02069 with 200 keys beside the window: from 2 · 200 − 10 to 200 / 20
    assert capacities[:, 0].tolist() == [390 + 32, 314 + 32, 238 + 32, 162 + 32, 86 + 32, 10 + 32]
    assert (capacities == capacities[:, :1]).all()
    flat = KVBudget(None, 232, window=32, allocation="pyramidkv").capacities(*SHAPE, 332)
    # no layer has more than the prompt
    assert flat[:, 0].tolist() == [332, 292, 252, 212, 172, 132]


def test_layers_that_a_budget_does_not_speak_of():
    head_scores = scores()
    capacities = KVBudget(head_scores, 128).capacities(*SHAPE, LONG, layers=[1, 3, 5])
    alone = KVBudget(HeadScores(head_scores.values[1::2]), 128).capacities(3, 8, 4, LONG)
    assert (capacities[1::2] == alone).all() and not capacities[::2].any()


def test_scores_of_kv_heads():
    """As DuoAttention publishes its gates."""
    per_kv = np.random.default_rng(1).random((6, 4))
    per_head = KVBudget(HeadScores(per_kv, meta={"heads": "kv"}), 128).capacities(*SHAPE, LONG)
    two = KVBudget(HeadScores(np.repeat(per_kv, 2, axis=1)), 128).capacities(*SHAPE, LONG)
    assert (per_head == two).all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": 32}, "whole number from 33"),
        ({"budget": 20}, "window"),
        ({"window": 0}, "window=0"),
        ({"rho": 1.5}, "rho=1.5"),
        ({"alpha": -0.1, "allocation": "adakv"}, "alpha"),
        ({"beta": 0, "allocation": "pyramidkv"}, "beta"),
        ({"allocation": "snapkv"}, "adakv"),
        ({"allocation": "random"}, "without scores"),
        ({"scores": scores(), "allocation": "adakv"}, "does not look at"),
        ({"scores": np.ones((6, 8))}, "HeadScores"),
        ({"scores": HeadScores(np.array([[0.1, -0.2]]))}, "not negative"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(CorelensError, match=words):
        KVBudget(**options)


def test_scores_of_another_model():
    with pytest.raises(CorelensError, match="6 layers × 8 heads"):
        KVBudget(scores(shape=(6, 16))).capacities(*SHAPE, LONG)
    with pytest.raises(CorelensError, match="are 0"):
        KVBudget(HeadScores(np.zeros(SHAPE[:2]))).capacities(*SHAPE, LONG)


def test_it_is_a_value():
    budget = KVBudget(scores(), 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.budget = 128  # type: ignore[misc]
