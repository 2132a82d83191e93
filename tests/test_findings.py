"""Findings: how verdicts are reached, their statistics against closed forms, and every family from end to end."""

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest

import corelens as cl
import published
from corelens.evaluation.evaluate import batches
from corelens.findings import f1_sparsity, f2_stability, f4_localise, late, setting
from corelens.findings.f6_sufficiency import regained
from corelens.findings.f7_acceleration import met
from corelens.findings.finding import judge
from corelens.findings.late import Knockouts
from corelens.findings.options import CONTROLLED, RANKINGS, selections
from corelens.findings.scenes import FRAMES
from corelens.heads.scores import HeadScores
from families import FAMILIES, tiny


def test_a_verdict_needs_every_setting_and_names_the_readings_that_meet_it():
    assert judge({}) == ("not judged", "")
    assert judge({"a": {"max": True, "last": True}}) == ("reproduced", "")
    assert judge({"a": {"max": False, "last": True}}) == ("reproduced", "by last; not by max")
    assert judge({"a": {"max": False, "last": False}}) == ("not reproduced", "")
    verdict, scope = judge({"a": {"max": True}, "b": {"max": False}})
    assert verdict == "not reproduced" and scope == "met in a; not in b"
    both = {"a": {"max": False, "mean": False, "last": True}, "b": {"max": False, "mean": True, "last": True}}
    assert judge(both) == ("reproduced", "by last; by mean only in b; not by max")
    assert judge({"a": {"max": True, "last": False}, "b": {"max": False, "last": True}}) == (
        "reproduced", "by max only in a; by last only in b"
    )  # fmt: skip


def test_chance_overlap_is_that_of_all_pairs_of_sets():
    n, k = 8, 3
    sets = [set(one) for one in itertools.combinations(range(n), k)]
    every = np.array([len(sets[0] & other) / len(sets[0] | other) for other in sets])
    expected, most = f2_stability.chance(n, k)
    assert expected == pytest.approx(every.mean())
    assert (every <= most).mean() >= 0.95 > (every < most).mean()


def test_resampled_scores_have_the_spread_of_a_mean():
    per_sample = np.random.default_rng(0).normal(size=(400, 2, 3)).astype(np.float32)
    boot = f1_sparsity.resampled(HeadScores(per_sample=per_sample), seed=0, draws=2000)
    np.testing.assert_allclose(boot.mean(0), per_sample.mean(0), atol=0.01)
    np.testing.assert_allclose(boot.std(0), per_sample.std(0) / 20, rtol=0.1)


def test_localisation_is_measured_on_other_samples_than_those_that_chose():
    chosen = np.array([[True, False], [False, False]])
    numerator = np.tile(np.array([[0.8, 0.1], [0.2, 0.3]]), (5, 1, 1))
    sides = f4_localise._sides(numerator, np.ones_like(numerator), chosen, seed=0)
    assert sides["top"] == pytest.approx([0.8] * 3) and sides["others"] == pytest.approx([0.2] * 3)
    assert sides["difference"] == pytest.approx([0.6] * 3)


def test_what_comes_back_is_counted_between_blind_and_clean():
    clean, blind = np.array([1.0] * 8 + [0.0] * 2), np.array([1.0] * 2 + [0.0] * 8)
    found = np.array([1.0] * 5 + [0.0] * 5)
    assert regained(clean, found, blind, 0)[0] == pytest.approx(0.5)
    assert regained(clean, clean, blind, 0)[:2] == [1.0, 1.0]


def test_acceleration_needs_parity_control_and_their_difference():
    one = {"top": {"value": 0.01, "high": 0.03}, "random": {"value": 0.5}, "gap": {"low": 0.4}}
    assert met(one)
    assert not met(one | {"top": {"value": 0.01, "high": 0.06}})
    assert not met(one | {"random": {"value": 0.1}}) and not met(one | {"gap": {"low": -0.1}})


def test_controls_are_as_many_and_random_ones_lie_outside_every_top():
    rng = np.random.default_rng(0)
    scores = {key: HeadScores(rng.random((6, 8)).astype(np.float32)) for key in RANKINGS.values()}
    found = selections(scores, 0.1, draws=3, seed=0)
    assert {len(heads) for sets in found.values() for heads in sets} == {5}
    tops = {head for name in RANKINGS for head in found["top", name][0]}
    assert all(not tops & set(heads) for heads in found["random", ""])
    for heads in found["layer-matched", CONTROLLED[1]]:
        top = found["top", CONTROLLED[1]][0]
        assert sorted(h.layer for h in heads) == sorted(h.layer for h in top) and not heads & top


SMALL = {
    "draws": 1, "kinds": ("knockout",), "fractions": (0.1,), "sweep_kinds": (), "kept": (), "scenes": 1, "windows": 1,
    "sparse_samples": 2, "score_share": 0.6, "fraction": 0.1, "batch_size": 8, "progress": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_study_runs_on_every_family(family, monkeypatch):
    monkeypatch.setattr(setting, "LEAST_ACCURACY", 0.0)  # random weights answer nothing
    model = cl.HookedMLLM(*tiny(family))
    found = cl.study(model, {"refer": cl.synthetic("refer", 10, seed=2)}, out=None, **SMALL)
    assert len(found.findings) == 8 and not any(finding.skipped for finding in found.findings)
    assert {"concentration", "layers", "localisation", "table", "sufficiency", "hybrid"} <= set(found.measured["refer"])
    assert found.finding("F5").verdict == "not reproduced"


@pytest.mark.parametrize("name", published.MAKERS)
def test_the_study_runs_on_every_public_set(name, tmp_path, monkeypatch):
    made = published.MAKERS[name](tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # questions without an answer to compare are left out
        found = cl.load_data(made)
    samples = [replace(one, id=f"{one.id} {i}") for i in range(10) for one in found if one.answer][:10]
    monkeypatch.setattr(setting, "LEAST_ACCURACY", 0.0)  # random weights answer nothing
    told = cl.study(cl.HookedMLLM(*tiny("qwen3_vl")), {name: samples}, out=tmp_path / "out", **SMALL)
    marked = [one for one in samples if one.regions]
    assert told.settings[0].samples == (marked or samples)
    if marked:
        assert {"localisation", "table", "sufficiency", "hybrid"} <= told.measured[name].keys()
    else:
        assert {f.id: f.skipped for f in told.findings} == {
            f"F{i}": {name: "the samples have no regions"} for i in range(1, 9)
        }
        page = told.report.read_text()
        assert f"Not measured on {name}: the samples have no regions." in page


@pytest.mark.parametrize("family", FAMILIES)
def test_knockouts_begun_late_give_what_whole_forwards_give(family, monkeypatch):
    model = cl.HookedMLLM(*tiny(family))
    prepared = batches(model, cl.synthetic("refer", 3, seed=2), 2)  # of unequal sizes
    cases = [(None, "text", "visual"), (cl.HeadSet([(1, 0), (1, 1)]), "question+last+answer", "region")]
    found = [Knockouts(model, prepared).evaluate(*case) for case in cases]
    whole = [cl.evaluate(model, prepared, cl.knockout(*case)) for case in cases]
    for a, b in zip(found, whole, strict=True):
        assert [x.logprob for x in a.per_sample] == pytest.approx([x.logprob for x in b.per_sample], abs=1e-5)
    assert abs(found[0].answer_logprob - cl.evaluate(model, prepared).answer_logprob) > 1e-4  # the cut is seen
    monkeypatch.setattr(late, "MOST_BYTES", 0)
    assert Knockouts(model, prepared).evaluate(*cases[1]).answer_logprob == whole[1].answer_logprob


def test_two_models_and_worlds_and_a_video(monkeypatch):
    models = {name: cl.HookedMLLM(*tiny(name)) for name in ("qwen2_vl", "qwen3_vl")}
    worlds = {"refer": cl.synthetic("refer", 10, seed=2), "video": cl.synthetic("video", 10, seed=2)}
    found = cl.study(models, worlds, out=None, findings=["F2", "F4"], **SMALL)
    assert [s.label for s in found.settings][:2] == ["qwen2_vl / refer", "qwen2_vl / video"]
    pairs = found.finding("F2").numbers["pairs"]
    assert {(p["model"], *p["worlds"]) for p in pairs} == {(name, "refer", "video") for name in models}
    lines = found.measured["qwen3_vl / video"]["scenes"][0]["lines"]
    assert len(lines) == 4 and all(1 < len(line) <= FRAMES for line in lines)
