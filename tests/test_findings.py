"""Findings: each criterion at its threshold on made numbers, the statistics against closed forms,
every family."""

import json
import warnings
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import corelens as cl
from corelens.evaluation import late_runs
from corelens.evaluation.evaluate import batches
from corelens.evaluation.late_runs import LateRuns
from corelens.findings import (
    criteria,
    f1_sparsity,
    f2_stability,
    f3_layers,
    f4_localise,
    paired_cost,
    run,
)
from corelens.findings.criteria import above, at_least, at_most
from corelens.findings.f7_acceleration import allowed_speedup
from corelens.findings.faithfulness import areas, auroc
from corelens.findings.options import LAST
from corelens.findings.reading import judged_reading
from corelens.findings.repeats import agreement_over_n
from corelens.findings.result import FINDINGS, Study
from corelens.findings.verdict import (
    CANNOT,
    LEFT_OUT,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    Verdict,
    combine,
    of_worlds,
)
from corelens.findings.world import World, resampled
from corelens.heads.intervals import clopper_pearson
from corelens.heads.scores import HeadScores
from corelens.sparse import SparseInference, Streaming
from helpers import published
from helpers.families import FAMILIES, tiny

RAM = "ram"


def one_world(id, numbers, **changed):
    world = {"serves": [id], "skipped": {}, "why_not": None, "numbers": {id: numbers}} | changed
    return {"reading": {"key": RAM, "reason": ""}, "worlds": {"w": world}}


def concluded(id, numbers, **changed):
    return FINDINGS[id].conclude(one_world(id, numbers, **changed))


# --- each criterion at its threshold


def test_findings_are_frozen_dataclasses_whose_words_name_their_thresholds():
    assert list(FINDINGS) == [f"F{i}" for i in range(1, 9)]
    for id, finding in FINDINGS.items():
        assert (
            finding.claim
            and finding.source
            and finding.criterion
            and finding.if_reproduced
            and finding.if_not
        )
        with pytest.raises(FrozenInstanceError):
            finding.quantile = 0.5
        assert id == finding.id
    named = {threshold.finding for threshold in criteria.THRESHOLDS}
    assert named >= {"all", "F1", "F2", "F3", "F5", "F6", "F7", "F8"}


def f1(value, low, high):
    return {"judged": RAM, RAM: {"half_in": {"value": value, "low": low, "high": high}, "n": 7}}


def test_f1_at_its_threshold():
    assert concluded("F1", f1(0.1, 0.09, 0.102)).word == REPRODUCED
    assert concluded("F1", f1(0.2, 0.103, 0.3)).word == NOT_REPRODUCED
    between = concluded("F1", f1(0.1, 0.09, 0.103))
    assert between.word == NOT_JUDGED and str(between) == "not judged (n = 7)"


def f2(rho_of_second, cost=0.5):
    first, second = np.arange(101.0), np.arange(101.0)
    # Spearman's ρ is 1 − Σd² · 6 / (n (n² − 1)): swap far ends until it is as low as wanted
    if rho_of_second < 1:
        rng = np.random.default_rng(0)
        while np.corrcoef(first, second)[0, 1] > rho_of_second:
            i, j = rng.choice(101, 2, replace=False)
            second[i], second[j] = second[j], second[i]
    worlds = {}
    for name, values in (("a", first), ("b", second)):
        transfer = {
            other: dict.fromkeys(("value", "low"), 1.0 if other == name else cost) for other in "ab"
        }
        numbers = {"values": [values.tolist()], "split_half": 0.9, "transfer": transfer, "n": 100}
        worlds[name] = {
            "serves": ["F2"],
            "skipped": {},
            "why_not": None,
            "numbers": {"F2": numbers},
        }
    return {"reading": {"key": RAM, "reason": ""}, "worlds": worlds}


def test_f2_at_its_thresholds():
    finding = FINDINGS["F2"]
    assert finding.conclude(f2(1.0, 0.5)).word == REPRODUCED
    assert finding.conclude(f2(1.0, 0.49)).word == NOT_REPRODUCED
    low = f2(0.79)
    rho = finding.pairs({name: world["numbers"]["F2"] for name, world in low["worlds"].items()})[0][
        "spearman"
    ]
    assert replace(finding, least_spearman=rho).conclude(low).word == REPRODUCED
    assert rho < 0.79 and finding.conclude(low).word == NOT_REPRODUCED
    for world in low["worlds"].values():
        # a reliability of 0.75: no ρ of 0.79 can be seen
        world["numbers"]["F2"]["split_half"] = 0.6
    assert finding.conclude(low).word == NOT_JUDGED
    low["worlds"]["b"]["why_not"] = "not answered"
    assert finding.conclude(low).word == CANNOT


def test_f2_takes_no_share_of_a_cost_that_may_be_none():
    model = f2(1.0, 1.0)
    for name, world in model["worlds"].items():
        world["numbers"]["F2"]["transfer"][name]["low"] = -0.01
    verdict = FINDINGS["F2"].conclude(model)
    assert verdict.word == NOT_JUDGED and "own top heads cost nothing" in verdict.reason
    assert verdict.number == "ρ = 1.00"
    first = model["worlds"]["a"]["numbers"]["F2"]["transfer"]
    first["a"]["low"] = 0.01  # what can be told of one direction is not enough to reproduce it
    assert FINDINGS["F2"].conclude(model).word == NOT_JUDGED
    first["b"]["value"] = 0.4  # but enough to refute it
    assert FINDINGS["F2"].conclude(model).word == NOT_REPRODUCED


def test_f2_needs_two_domains_and_settings_of_one_world_are_one():
    model = f2(1.0)
    names = {"a": "refer:objects=1", "b": "refer:objects=2"}
    for world in model["worlds"].values():
        numbers = world["numbers"]["F2"]
        numbers["transfer"] = {names[x]: cost for x, cost in numbers["transfer"].items()}
    model["worlds"] = {names[x]: world for x, world in model["worlds"].items()}
    verdict = FINDINGS["F2"].conclude(model)
    assert verdict.word == CANNOT and "settings of one" in verdict.reason


def f3(low, high):
    return {
        "judged": RAM,
        RAM: {"depth": {"value": 0.5, "low": low, "high": high}, "layers": [], "n": 9},
    }


def test_f3_at_its_threshold_and_by_its_slope():
    assert concluded("F3", f3(0.5, 0.6)).word == REPRODUCED
    assert concluded("F3", f3(0.4, 0.499)).word == NOT_REPRODUCED
    assert concluded("F3", f3(0.4, 0.5)).word == NOT_JUDGED
    deep, finding = one_world("F3", f3(0.5, 0.6)), FINDINGS["F3"]
    for depths, half, word, slope in (
        ((0.5, 0.6, 0.7), 0.1, REPRODUCED, "+0.10 [+0.03, +0.17] in w"),
        ((0.7, 0.6, 0.5), 0.1, NOT_REPRODUCED, "-0.10 [-0.17, -0.03] in w"),
        ((0.5, 0.6, 0.7), 0.2, NOT_JUDGED, "+0.10 [-0.04, +0.24] in w"),
    ):
        sizes = [sized(i, depth, half) for i, depth in zip((6, 7, 8), depths, strict=True)]
        verdict = finding.conclude(deep | {"sizes": {"w": sizes}})
        assert verdict.word == word and slope in verdict.number
        # two sizes have no slope
        assert finding.conclude(deep | {"sizes": {"w": sizes[:2]}}).word == REPRODUCED


def sized(log_parameters, depth, half):
    return [10.0**log_parameters, depth, depth - half, depth + half]


def test_the_slope_over_sizes_and_its_interval():
    sizes = [sized(6, 0.5, 0.1), sized(7, 0.8, 0.3), sized(8, 0.7, 0.2)]
    slope, low, high = f3_layers.slope_over_sizes(sizes)
    assert slope == pytest.approx(0.1)
    # the middle one has no weight, the others a half each
    assert (slope - low, high - slope) == pytest.approx((0.05**0.5 / 2,) * 2)
    # the largest may lie less deep, or the smallest deeper: the lower end moves alone
    sizes = [sized(6, 0.5, 0), sized(7, 0.8, 0), [1e8, 0.7, 0.3, 0.7]]
    assert f3_layers.slope_over_sizes(sizes) == pytest.approx((0.1, -0.1, 0.1))
    sizes = [[1e6, 0.5, 0.5, 0.9], sized(7, 0.8, 0), sized(8, 0.7, 0)]
    assert f3_layers.slope_over_sizes(sizes) == pytest.approx((0.1, -0.1, 0.1))


def test_a_shallow_model_keeps_its_verdict_and_shows_its_slope():
    sizes = [sized(6, 0.1, 0.1), sized(7, 0.2, 0.1), sized(8, 0.3, 0.1)]
    verdict = FINDINGS["F3"].conclude(one_world("F3", f3(0.1, 0.2)) | {"sizes": {"w": sizes}})
    assert verdict.word == NOT_REPRODUCED
    assert "with ten times the parameters: +0.10 [+0.03, +0.17] in w" in verdict.number


def test_sizes_are_those_of_one_family_on_one_world_by_one_reading():
    def studied(family, parameters, judged=RAM, world="w"):
        numbers = {"F3": {"judged": judged, judged: f3(0.5, 0.6)[RAM]}}
        return {
            "about": {"family": family, "parameters": parameters},
            "worlds": {world: {"numbers": numbers, "why_not": None}},
        }

    models = {
        "s": studied("a", 1e6), "m": studied("a", 1e7), "other": studied("b", 1e8),
        "last": studied("a", 1e9, LAST), "elsewhere": studied("a", 1e9, world="v"),
    }  # fmt: skip
    sizes = {name: x["sizes"] for name, x in Study({"models": models})._models().items()}
    assert sizes == {
        "s": {"w": [[1e6, 0.5, 0.5, 0.6], [1e7, 0.5, 0.5, 0.6]]},
        "m": {"w": [[1e6, 0.5, 0.5, 0.6], [1e7, 0.5, 0.5, 0.6]]},
        "other": {"w": [[1e8, 0.5, 0.5, 0.6]]},
        "last": {"w": [[1e9, 0.5, 0.5, 0.6]]},
        "elsewhere": {"v": [[1e9, 0.5, 0.5, 0.6]]},
    }


def test_f4_at_its_threshold():
    def f4(precision, n=100):
        return {
            "judged": RAM,
            RAM: {"precision": precision, "matched": [i / 100 for i in range(n)], "n": 10},
        }

    limit = float(np.quantile([i / 100 for i in range(100)], 0.95))
    assert concluded("F4", f4(limit + 1e-9)).word == REPRODUCED
    assert concluded("F4", f4(limit)).word == NOT_REPRODUCED
    assert concluded("F4", f4(1.0, n=19)).word == NOT_JUDGED


def interval(value, half=0.0):
    return {"value": value, "low": value - half, "high": value + half}


def test_an_interval_that_contains_the_threshold_tells_nothing():
    assert at_least(interval(0.5, 0.1), 0.4) and at_most(interval(0.5, 0.1), 0.6)
    assert (
        at_least(interval(0.5, 0.1), 0.61) is False and at_most(interval(0.5, 0.1), 0.39) is False
    )
    assert at_least(interval(0.5, 0.1), 0.41) is None and at_most(interval(0.5, 0.1), 0.59) is None
    assert above(interval(0.5, 0.1), 0.399) and above(interval(0.5, 0.1), 0.4) is None
    assert above(interval(0.5, 0.1), 0.6) is False  # where it ends it is not above


def f5(top=0.2, bottom=0.05, random=(0.0,) * 100, half=0.0, clean=1.0):
    judged = {
        "k": 2,
        "top": {"zero": interval(top, half)},
        "bottom": {"zero": interval(bottom, half), "heads": [[0, 1], [2, 3]]},
    }
    return {"judged": RAM, "n": 100, "clean": clean, RAM: judged, "random": {"zero": list(random)}}


def test_f5_at_its_thresholds():
    assert concluded("F5", f5()).word == REPRODUCED
    assert concluded("F5", f5(top=0.199)).word == NOT_REPRODUCED
    bottom = concluded("F5", f5(bottom=0.051))
    assert bottom.word == NOT_REPRODUCED and "1 of 2 in layer 0" in bottom.reason
    harmful = [0.0] * 94 + [0.2] * 6  # six of a hundred random sets cost as much as the top
    assert concluded("F5", f5(random=harmful)).word == NOT_REPRODUCED
    assert concluded("F5", f5(random=[0.0] * 96 + [0.2] * 4)).word == REPRODUCED
    assert concluded("F5", f5(random=[0.0] * 19)).word == NOT_JUDGED


def test_f5_is_judged_by_intervals_and_as_shares_of_the_clean_accuracy():
    assert concluded("F5", f5(top=0.3, bottom=0.0, half=0.05)).word == REPRODUCED
    straddling = concluded("F5", f5(top=0.24, bottom=0.0, half=0.05))
    assert str(straddling) == "not judged (n = 100)" and "cost too little" in straddling.reason
    assert concluded("F5", f5(top=0.14, bottom=0.0, half=0.05)).word == NOT_REPRODUCED
    assert concluded("F5", f5(top=0.5, bottom=0.0, half=0.06)).word == NOT_JUDGED  # the bottom
    assert concluded("F5", f5(top=0.5, bottom=0.11, half=0.05)).word == NOT_REPRODUCED
    near = f5(top=0.5, bottom=0.0, half=0.05, random=[0.46] * 100)
    assert concluded("F5", near).word == NOT_JUDGED
    # 10 points of 50 are 20% of them
    assert concluded("F5", f5(top=0.1, bottom=0.0, clean=0.5)).word == REPRODUCED
    assert concluded("F5", f5(top=0.1, bottom=0.0, clean=0.51)).word == NOT_REPRODUCED


def f6(alone=0.9, fed=None, random=0.0, half=0.0, clean=1.0):
    def seeing(x, feeders=()):
        lost = interval(clean - x, half)
        return interval(x, half) | {"lost": lost, "random": [random] * 20, "feeders": list(feeders)}

    numbers = {"k": 2, "n": 100, "clean": clean, "alone": seeing(alone)}
    return numbers | {"with feeders": None if fed is None else seeing(fed, [[0, 1]])}


def test_f6_at_its_thresholds():
    assert concluded("F6", f6(alone=0.9001)).word == REPRODUCED
    assert concluded("F6", f6(alone=0.899)).word == NOT_REPRODUCED
    assert concluded("F6", f6(alone=0.95, random=0.95)).word == NOT_REPRODUCED
    fed = concluded("F6", f6(alone=0.5, fed=0.9001))
    assert fed.word == REPRODUCED and "1 feeders" in fed.number


def test_f6_is_judged_by_intervals():
    assert concluded("F6", f6(alone=0.97, half=0.05)).word == REPRODUCED
    straddling = concluded("F6", f6(alone=0.93, half=0.05))
    assert str(straddling) == "not judged (n = 100)" and "do not suffice" in straddling.reason
    assert concluded("F6", f6(alone=0.84, half=0.05)).word == NOT_REPRODUCED
    assert concluded("F6", f6(alone=0.97, half=0.05, random=0.95)).word == NOT_JUDGED
    assert concluded("F6", f6(alone=0.82, clean=0.9)).word == REPRODUCED  # 91% of it


def f7(value=0.01, low=0.0, high=0.03, allows=1.2, median=0.84, random=0.5):
    plan = {
        "window": 1024,
        "allows": allows,
        "value": value,
        "low": low,
        "high": high,
        "random": [random] * 20,
    }
    speed = {"median": median, "allows": allows, "window": 1024}
    return {"tokens": 16000, "n": 200, "plans": [plan], "speed": speed}


def test_f7_at_its_thresholds():
    assert concluded("F7", f7()).word == REPRODUCED  # 0.84x is 70% of 1.2x
    assert concluded("F7", f7(median=0.83)).word == NOT_REPRODUCED
    assert concluded("F7", f7(value=0.011)).word == NOT_JUDGED  # its interval begins at 0
    assert concluded("F7", f7(value=0.02, low=0.011)).word == NOT_REPRODUCED
    assert concluded("F7", f7(high=0.031)).word == NOT_JUDGED
    assert concluded("F7", f7(random=0.01)).word == NOT_REPRODUCED
    numbers = f7(value=0.011) | {"speed": None}
    numbers["plans"].append(numbers["plans"][0] | {"window": 2048, "value": 0.4})
    number = concluded("F7", numbers).number  # of every plan where none met parity
    assert "window of 1024; random heads full 50 at" in number and "40 [0, 3]" in number
    short = concluded("F7", f7(allows=1.19))
    assert short.word == CANNOT and "too short" in short.reason


def f8(low=0.001, half=0.05):
    gain = {"keys": 24, "value": 1.0, "low": low, "high": 2.0}
    return {
        "half_in": {"value": half, "low": half, "high": half},
        "budgets": [gain],
        "tested": 60,
        "n": 60,
    }


def test_f8_at_its_thresholds():
    assert concluded("F8", f8()).word == REPRODUCED
    assert concluded("F8", f8(low=0.0)).word == NOT_REPRODUCED
    assert concluded("F8", f8(half=0.051)).word == NOT_REPRODUCED
    assert concluded("F8", f8() | {"budgets": []}).word == CANNOT
    assert concluded("F8", f8(low=0.0) | {"tested": 10}).word == NOT_JUDGED


def test_a_world_that_is_not_answered_and_a_reading_whose_rows_do_not_matter_judge_nothing():
    assert concluded("F5", f5(), why_not="the model answers 20%") == Verdict(
        CANNOT, reason="the model answers 20%", worlds={"w": CANNOT}
    )
    left_out = concluded("F5", f5(), skipped={"F5": f"{LEFT_OUT}: the limit of 8 core-hours"})
    assert str(left_out) == NOT_JUDGED and "core-hours" in left_out.reason
    model = one_world("F5", f5())
    model["reading"] = {"key": None, "reason": "cutting costs nothing"}
    assert FINDINGS["F5"].conclude(model) == Verdict(CANNOT, reason="cutting costs nothing")


# --- what verdicts are made of


def test_texts_that_differ_in_numbers_alone_are_said_once():
    texts = {"a": "half in 6.2% [5, 7]", "b": "half in 2.1% [2, 9]", "c": "half in -3% [-4, 1]"}
    assert of_worlds(texts) == "3 worlds: half in -3 to 6.2% [-4, 9]"
    assert of_worlds(texts | {"d": "none"}) == "a, b, c: half in -3 to 6.2% [-4, 9]; d: none"
    assert of_worlds({"a": "1%", "b": "2%"}) == "a: 1%; b: 2%" and of_worlds({"a": "1%"}) == "1%"
    assert of_worlds({"a": "1%"}, 2) == "a: 1%"
    ranges = {"a": "ρ = 0.6 to 0.9", "b": "ρ = 0.5 to 0.98", "c": "ρ = 0.53 to 0.95"}
    assert of_worlds(ranges, of="models") == "3 models: ρ = 0.5 to 0.98"
    layers = {"a": "in layers 1, 2", "b": "in layers 3, 9", "c": "in layers 0, 4"}
    assert of_worlds(layers) == "; ".join(f"{world}: {text}" for world, text in layers.items())
    assert of_worlds(dict.fromkeys("abc", "in layers 1, 2")) == "3 worlds: in layers 1, 2"


def test_worlds_combine_into_one_verdict():
    yes, no = Verdict(REPRODUCED, "1"), Verdict(NOT_REPRODUCED, "0", "missed")
    cannot, few = Verdict(CANNOT, reason="short"), Verdict(NOT_JUDGED, reason="few", n=4)
    assert combine({"a": yes, "b": cannot}).word == REPRODUCED
    mixed = combine({"a": yes, "b": no})
    assert mixed.word == NOT_REPRODUCED and mixed.reason == "missed; reproduced in a"
    silent = combine({"a": Verdict(REPRODUCED, ""), "b": Verdict(NOT_REPRODUCED, "")})
    assert silent.reason == "reproduced in a"
    assert (
        combine({"a": cannot, "b": few}).word == NOT_JUDGED
        and combine({"a": cannot}).word == CANNOT
    )
    # what was left out for want of time might have failed; what did fail stands
    late = Verdict(NOT_JUDGED, reason=f"{LEFT_OUT}: the limit of 1 core-hours was reached")
    unfinished = combine({"a": yes, "b": late})
    assert unfinished.word == NOT_JUDGED and "1 core-hours" in unfinished.reason
    assert combine({"a": no, "b": late}).word == NOT_REPRODUCED


def test_the_reading_is_the_one_whose_rows_the_answer_hangs_on():
    def costs(question, last):
        rows = {"question": question, "last": last, "all": max(question, last)}
        return {group: {"value": x, "low": x - 0.05, "high": x + 0.05} for group, x in rows.items()}

    assert judged_reading({"a": costs(0.9, 0.9)})["key"] == RAM
    assert judged_reading({"a": costs(0.3, 0.9)})["key"] == LAST
    assert judged_reading({"a": costs(0.9, 0.0), "b": costs(0.5, 0.9)})["key"] == RAM
    assert (
        judged_reading({"a": costs(0.0, 0.0)})["key"] is None and judged_reading({})["key"] is None
    )


def test_exact_intervals_are_those_of_the_binomial():
    assert clopper_pearson(0, 20)[1:] == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert clopper_pearson(20, 20)[1:] == pytest.approx((0.025 ** (1 / 20), 1.0))
    clean, changed = np.ones(50), np.array([0.0] * 10 + [1.0] * 40)
    cost = paired_cost.cost(clean, changed)
    assert cost.value == 0.2 and 0 < cost.low < 0.2 < cost.high
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        lost = rng.random(60) < 0.2
        low, high = paired_cost.cost(np.ones(60), 1.0 - lost)[1:]
        covered += low <= 0.2 <= high
    assert covered >= 190


def test_half_of_the_excess_is_counted_in_heads():
    assert f1_sparsity.half_in(np.array([[1.0, 0.0], [0.0, 0.0]])) == 0.25
    assert f1_sparsity.half_in(np.ones((4, 5))) == 0.5
    # negative values hold nothing
    assert f1_sparsity.half_in(np.array([[3.0, 2.0], [-5.0, 1.0]])) == 0.25
    assert f1_sparsity.half_in(np.zeros((2, 2))) == 1.0
    # of the heads that exist
    assert f1_sparsity.half_in(np.array([[1.0, 0.0], [np.nan, np.nan]])) == 0.5


def test_resampled_scores_have_the_spread_of_a_mean():
    per_sample = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32)
    boot = resampled(HeadScores(per_sample=per_sample), seed=0, draws=2000)
    np.testing.assert_allclose(boot.mean(0), per_sample.mean(0), atol=0.01)
    np.testing.assert_allclose(boot.std(0), per_sample.std(0) / 20, rtol=0.1)


def test_matched_sets_have_the_visual_mass_of_the_top_and_none_of_its_heads():
    masses = np.linspace(0, 1, 60).reshape(6, 10)
    top = np.zeros((6, 10), dtype=bool)
    top[2, 5] = top[2, 6] = True
    sets = f4_localise.matched(top, masses, draws=30, seed=0)
    assert all(subset.sum() == 2 and not (subset & top).any() for subset in sets)
    assert max(abs(masses[subset].mean() - masses[top].mean()) for subset in sets) < 0.1
    parts = masses / 2, masses
    assert f4_localise.precision_of(top, parts) == pytest.approx(0.5)


def test_reliability_and_faithfulness_have_their_closed_forms():
    assert (
        f2_stability.reliability(0.5) == pytest.approx(2 / 3)
        and f2_stability.reliability(float("nan")) == 0
    )
    assert areas([0.0, 1.0], [0.0, 1.0]) == {"cpr": 0.5, "cmd": 0.5}
    assert areas([0.0, 0.5, 1.0], [1.0, 2.0, 1.0]) == {"cpr": 1.5, "cmd": 0.5}
    values = np.array([[0.9, 0.1], [0.5, 0.5]])
    assert auroc(values, cl.HeadSet([(0, 0)])) == 1.0
    # above one, below one, beside one
    assert auroc(values, cl.HeadSet([(1, 0)])) == pytest.approx(0.5)


def test_agreement_grows_with_the_samples():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(6, 8))
    noisy = HeadScores(per_sample=(truth + 3 * rng.normal(size=(120, 6, 8))).astype(np.float32))
    rows = agreement_over_n(noisy)
    assert [row["n"] for row in rows] == [5, 10, 20, 50]
    assert [row["spearman"] for row in rows] == sorted(row["spearman"] for row in rows)


def test_the_allowed_speed_up_is_that_of_the_operation_count():
    class Shape:
        n_layers, n_heads, n_kv_heads, n_key_value_heads = 36, 32, 8, 8
        d_head, d_model, d_mlp = 128, 2560, 9728
        heads = (32,) * 36

    heads = cl.HeadSet([(layer, head) for layer in range(36) for head in range(32)][::20])  # 5%
    plan = SparseInference(heads, Streaming(sink=128, window=1024))
    counted = {4096: 1.08, 8192: 1.21, 16384: 1.49, 32768: 2.02}
    for tokens, allowed in counted.items():
        assert allowed_speedup(Shape, tokens, plan) == pytest.approx(allowed, abs=0.015)


def test_a_finding_that_a_study_did_not_ask_for_is_left_out():
    world = {"serves": ["F1"], "skipped": {}, "why_not": None, "numbers": {}}
    model = {"reading": {"key": "ram"}, "worlds": {"refer": world}}
    verdict = FINDINGS["F1"].conclude(model)
    assert verdict.word == NOT_JUDGED and verdict.reason.startswith(LEFT_OUT)


def test_feeders_get_the_random_sets_that_a_verdict_needs_where_few_are_asked_for():
    """What F6 needs of a world, in which only the fed heads answer."""
    top, feeding = cl.HeadSet([(1, 0)]), cl.HeadSet([(0, 0)])
    world = Mock(
        spec=World, options=SimpleNamespace(shares=(), draws=30, curve_draws=3),
        to_test=range(100), clean=SimpleNamespace(accuracy=1.0), top=lambda reading, share: top,
        random_sets=lambda reading, k, draws: [cl.HeadSet([(2, 0)])] * draws,
        only_seeing=lambda heads: np.full(100, float({*heads} == {*top, *feeding})),
        costs=lambda correct: paired_cost.cost(np.ones(100), correct)._asdict(),
        stored=lambda name, make: feeding.to_json(),
    )  # fmt: skip
    numbers = FINDINGS["F6"].measure(world, [world], "ram")
    assert len(numbers["alone"]["random"]) == 30 and len(numbers["with feeders"]["random"]) == 20
    assert FINDINGS["F6"].judge(numbers, {}).word == REPRODUCED


# --- every family, every public set

SMALL = {
    "draws": 1, "curve_draws": 1, "shares": (0.1,), "kinds": ("zero", "knockout"), "effect_samples": 2,
    "sparse_samples": 2, "score_share": 0.6, "batch_size": 8, "progress": False,
}  # fmt: skip


@pytest.fixture
def every_world_counts(monkeypatch):
    """Random weights answer nothing: let their worlds count, read at the last row."""
    monkeypatch.setattr(run, "ACCURACY", criteria.Threshold("all", 0.0, ""))
    last = {"words": "", "published": False, "reason": ""}
    monkeypatch.setattr(
        run, "judged_reading", lambda costs: last | {"key": LAST if costs else None}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_study_runs_on_every_family(family, every_world_counts):
    model = cl.HookedMLLM(*tiny(family))
    # (what stands beside the findings uses the same runs: of one family)
    without = () if family == "qwen3_vl" else ("design", "causal", "repeats", "faithfulness")
    samples = cl.synthetic("refer", 10, seed=2)
    study = cl.study(model, {"refer": samples}, out=None, without=without, **SMALL)
    (part,) = next(iter(study.data["models"].values()))["worlds"].values()
    assert set(part["numbers"]) == set(FINDINGS)
    if not without:
        assert part["faithfulness"]["n"] == 2
        assert part["design"]["n"] == 2 and part["repeats"]["other samples"]["n"] == 4
    assert {finding.verdict for finding in study.findings} <= {
        NOT_REPRODUCED,
        CANNOT,
        NOT_JUDGED,
        REPRODUCED,
    }
    # one random set
    assert json.loads(json.dumps(study.to_json()))["findings"][4]["verdict"] == NOT_JUDGED


@pytest.mark.parametrize("name", published.MAKERS)
def test_the_study_runs_on_every_public_set(name, tmp_path, every_world_counts):
    made = published.MAKERS[name](tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # questions without an answer to compare are left out
        loaded = cl.data.load_data(made)
    samples = [
        replace(sample, id=f"{sample.id} {i}")
        for i in range(10)
        for sample in loaded
        if sample.answer
    ][:10]
    samples = [
        replace(sample, meta={k: v for k, v in sample.meta.items() if k != "scoring"})
        for sample in samples
    ]
    model = cl.HookedMLLM(*tiny("qwen3_vl"))
    study = cl.study(
        model, {name: samples}, out=tmp_path / "out", findings=["F1", "F4", "F6"],
        without=("design", "causal", "repeats"), **SMALL,
    )  # fmt: skip
    (part,) = next(iter(study.data["models"].values()))["worlds"].values()
    if any(sample.regions for sample in samples):
        assert set(part["numbers"]) == {"F1", "F4", "F6"}
    else:
        assert part["why_not"] == "the samples have no regions"
        assert {finding.verdict for finding in study.findings} == {CANNOT}
        assert "the samples have no regions" in study.report.read_text()


def test_without_a_head_to_change_the_answers_are_the_clean_ones():
    model = cl.HookedMLLM(*tiny("qwen3_vl"))
    runs = LateRuns(model, batches(model, cl.synthetic("refer", 2, seed=2), 2))
    for answered in (
        runs.evaluate(cl.HeadSet([]), "text", "visual"), runs.ablated(cl.HeadSet([]), "zero")
    ):  # fmt: skip
        assert answered.logprobs.tolist() == runs.clean.logprobs.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_knockouts_begun_late_give_what_whole_forwards_give(family, monkeypatch):
    model = cl.HookedMLLM(*tiny(family))
    prepared = batches(model, cl.synthetic("refer", 3, seed=2), 2)  # of unequal sizes
    cases = [
        (None, "text", "visual"),
        (cl.HeadSet([(1, 0), (1, 1)]), "question+last+answer", "region"),
    ]
    late = [LateRuns(model, prepared).evaluate(*case) for case in cases]
    whole = [cl.evaluate(model, prepared, cl.knockout(*case)) for case in cases]
    for a, b in zip(late, whole, strict=True):
        assert [x.logprob for x in a.per_sample] == pytest.approx(
            [x.logprob for x in b.per_sample], abs=1e-5
        )
    # the cut is seen
    assert abs(late[0].answer_logprob - cl.evaluate(model, prepared).answer_logprob) > 1e-4
    monkeypatch.setattr(late_runs, "MOST_BYTES", 0)
    assert LateRuns(model, prepared).evaluate(*cases[1]).answer_logprob == whole[1].answer_logprob
