"""Intervals against scipy's, against published numbers, and by how often they cover what is
true."""

import numpy as np
import pytest
from scipy import stats

import corelens as cl
from corelens.evaluation.answers import Answer, Evaluation
from corelens.heads.intervals import (
    _wilson,
    accuracy_difference,
    accuracy_interval,
    bootstrap_mean,
    clopper_pearson,
    mean_interval,
    newcombe,
)

LEVELS = (0.9, 0.95, 0.99)


def pairs(both: int, only_a: int, only_b: int, neither: int):
    a = np.array([1.0] * both + [1] * only_a + [0] * only_b + [0] * neither)
    return a, np.array([1.0] * both + [0] * only_a + [1] * only_b + [0] * neither)


@pytest.mark.parametrize("level", LEVELS)
def test_proportions_have_scipys_exact_interval(level):
    for n in (1, 2, 7, 36, 100):
        for k in {0, 1, n // 2, n - 1, n}:
            exact = stats.binomtest(k, n).proportion_ci(level, method="exact")
            assert clopper_pearson(k, n, level) == pytest.approx(
                (k / n, exact.low, exact.high), abs=1e-12
            )


def test_nothing_of_36_is_not_nothing():
    assert clopper_pearson(0, 36) == pytest.approx((0, 0, 0.0974), abs=1e-4)
    assert clopper_pearson(1, 1) == pytest.approx((1, 0.025, 1))
    assert Evaluation([Answer("a", "7", "7", True, 0.0)]).interval == pytest.approx((1, 0.025, 1))


@pytest.mark.parametrize("level", LEVELS)
def test_the_parts_of_newcombes_interval_are_scipys_wilson_intervals(level):
    for k, n in ((0, 5), (3, 7), (36, 36), (17, 90)):
        wilson = stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert _wilson(k / n, n, level) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    # with no correlation (a margin of zero) the squares of Wilson's distances add
    a, b = pairs(20, 16, 0, 0)
    of_a, of_b = (stats.binomtest(k, 36).proportion_ci(level, method="wilson") for k in (36, 20))
    p, q = 1.0, 20 / 36
    low = p - q - np.hypot(p - of_a.low, of_b.high - q)
    high = p - q + np.hypot(of_a.high - p, q - of_b.low)
    assert newcombe(a, b, level) == pytest.approx((p - q, low, high), abs=1e-12)


def test_newcombes_published_example():
    # Newcombe 1998, Statistics in Medicine 17, table II: 36, 12, 2, 0 pairs, method 10
    assert newcombe(*pairs(36, 12, 2, 0)) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)


def test_newcombe_covers_the_true_difference_and_is_antisymmetric():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        a = (rng.random(60) < 0.85).astype(float)
        b = a * (rng.random(60) < 0.9)
        interval = newcombe(a, b)
        covered += interval.low <= 0.085 <= interval.high
        assert newcombe(b, a) == pytest.approx((-interval.value, -interval.high, -interval.low))
    assert 930 <= covered <= 995
    same = newcombe(np.ones(36), np.ones(36))
    assert same.value == 0 and same.low < -0.09 and same.high > 0.09  # not "0 [0, 0]"


@pytest.mark.parametrize("level", LEVELS)
def test_the_bootstrap_is_scipys(level):
    x = np.random.default_rng(1).gamma(2.0, size=80)
    wanted = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=level,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    ours = bootstrap_mean(x, level, draws=20_000)
    spread = wanted.high - wanted.low
    assert (
        abs(ours.low - wanted.low) < 0.04 * spread and abs(ours.high - wanted.high) < 0.04 * spread
    )


def test_scores_have_scipys_bootstrap_at_their_level():
    x = np.random.default_rng(3).normal(size=(60, 1, 1)).astype(np.float32)
    wanted = stats.bootstrap(
        (x[:, 0, 0],),
        np.mean,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    low, high = cl.HeadScores(per_sample=x).ci(n_boot=20_000)
    spread = wanted.high - wanted.low
    assert (
        abs(low.item() - wanted.low) < 0.04 * spread
        and abs(high.item() - wanted.high) < 0.04 * spread
    )


def test_one_sample_has_no_bootstrap():
    with pytest.raises(cl.CorelensError, match="2 or more"):
        bootstrap_mean(np.array([0.3]))
    with pytest.raises(cl.CorelensError, match="2 samples or more"):
        cl.HeadScores(per_sample=np.ones((1, 2, 2))).ci()
    alone = mean_interval(np.array([0.3]))
    assert np.isnan(alone.low) and "no interval" in str(alone)


def test_means_over_draws_are_bootstrapped_and_answers_are_not():
    bits, draws = np.array([1.0, 0, 1, 1]), np.array([1.0, 0.5, 1, 1])
    assert accuracy_interval(bits) == clopper_pearson(3, 4)
    assert accuracy_interval(draws) == bootstrap_mean(draws)
    assert accuracy_difference(bits, bits) == newcombe(bits, bits)
    assert accuracy_difference(bits, draws) == bootstrap_mean(bits - draws)


def evaluation(ids, bits, asked=None):
    asked = asked or [""] * len(ids)
    return Evaluation(
        [Answer(i, "7", "7", bool(b), -1.0, q) for i, b, q in zip(ids, bits, asked, strict=True)]
    )


def test_pairs_need_ids_that_are_there_unique_and_of_the_same_samples():
    a = evaluation("abc", (1, 1, 0))
    assert cl.paired(a, evaluation("abc", (1, 0, 0))).difference == pytest.approx(1 / 3)
    for ids, words in (("acb", "same samples"), ("abd", "same samples"), ("ab", "same samples")):
        with pytest.raises(cl.CorelensError, match=words):
            cl.paired(a, evaluation(ids, (1, 0, 0)[: len(ids)]))
    for ids in (["a", "a", "b"], ["", "", ""], ["a", "", "b"]):
        same = evaluation(ids, (1, 0, 1))
        with pytest.raises(cl.CorelensError, match="an id for each sample"):
            cl.paired(same, same)
    with pytest.raises(cl.CorelensError, match="what is asked differs"):
        cl.paired(evaluation("ab", (1, 1), "xy"), evaluation("ab", (1, 1), "yx"))


def test_samples_without_ids_are_told_apart_by_what_they_ask():
    model = cl.load_demo("qwen3vl-s")
    samples = cl.synthetic("refer", 3, seed=1)
    assert [sample.id for sample in samples] == ["refer-1-0000", "refer-1-0001", "refer-1-0002"]
    for sample in samples:
        sample.id = ""
    ours = cl.evaluate(model, samples)
    assert [answer.id for answer in ours.per_sample] == [
        "sample-0000",
        "sample-0001",
        "sample-0002",
    ]
    assert cl.paired(ours, cl.evaluate(model, samples, batch_size=1)).difference == 0
    with pytest.raises(cl.CorelensError, match="what is asked differs"):
        cl.paired(ours, cl.evaluate(model, samples[::-1]))


def test_kl_is_scipys_relative_entropy_from_the_clean_run():
    model = cl.load_demo("qwen3vl-s")
    sample = cl.synthetic("refer", 1, seed=1)[0]
    clean, other = model.prepare(sample), model.prepare(cl.counterfactual(sample, "noise"))
    result = cl.activation_patch(
        model, clean, other, site="resid_post", metric=cl.interventions.kl(), per=("layer",)
    )
    p, q = (model(inputs)[0, -1].float().softmax(-1).detach().numpy() for inputs in (clean, other))
    assert stats.entropy(p, q) != pytest.approx(stats.entropy(q, p), rel=0.05)
    assert float(result.base[0]) == pytest.approx(stats.entropy(p, q), rel=1e-3)
