"""Evaluation by one forward against generation; sweeps, their controls and their errors."""

import warnings

import numpy as np
import pytest
import torch

import corelens as cl
from corelens import testbed
from corelens.evaluation.evaluate import Answer, Evaluation, batches, bootstrap_mean
from corelens.evaluation.sweep import Point, Sweep, conditions
from corelens.heads.intervals import accuracy_difference, accuracy_interval
from helpers.families import tiny
from helpers.samples import sample


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def answered(model):
    """Eight questions with answers; the random model gets none of them right."""
    samples = [sample(i, (64 + 32 * (i % 3), 64)) for i in range(8)]
    for i, sample_ in enumerate(samples):
        sample_.id = str(i)
    return samples


@torch.no_grad()
def test_one_forward_gives_what_generation_gives(model):
    """Exact match and log-probability against greedy decoding, token by token, in a batch and
    alone.

    Under a hook that makes the random model speak in digits alone, one of which ends its answers.
    """
    digits = torch.tensor([model.to_single_token(str(i)) for i in range(10)])

    def digits_only(logits, hook):
        logits[..., digits] += 100.0

    speak = [("hook_logits", digits_only)]
    samples = [sample(i, (64 + 32 * (i % 3), 64)) for i in range(12)]

    def says(sample_, n):
        with model.hooks(fwd_hooks=speak):
            return model.generate(model.prepare(sample_), max_new_tokens=n, do_sample=False)[
                0
            ].tolist()

    before = model.hf.generation_config.eos_token_id
    try:
        model.hf.generation_config.eos_token_id = None
        model.hf.generation_config.eos_token_id = end = says(samples[0], 3)[2]
        for i, sample_ in enumerate(samples):
            spoken = [token for token in says(sample_, 1 + i % 3) if token != end] or [
                int(digits[0])
            ]
            sample_.id, sample_.answer = (
                str(i),
                model.tokenizer.decode(spoken if i % 4 else spoken[::-1]),
            )
        ev = cl.evaluate(model, samples, speak, batch_size=5)
        for sample_, answer in zip(samples, ev.per_sample, strict=True):
            gold = model.prepare(sample_, answer=True)
            wanted = gold.tensors["input_ids"][0, gold.token_maps[0].answer]
            logits = model.run_with_hooks(gold, fwd_hooks=speak)[
                0, gold.token_maps[0].answer - 1
            ].log_softmax(-1)
            assert answer.logprob == pytest.approx(
                float(logits.gather(1, wanted[:, None]).sum()), abs=1e-4
            )
            assert answer.correct == (says(sample_, len(wanted) + 1) == [*wanted.tolist(), end]), (
                sample_.answer
            )
        assert 0 < ev.accuracy < 1
    finally:
        model.hf.generation_config.eos_token_id = before


def test_evaluation_under_hooks_is_evaluation_of_the_edited_model(model, answered):
    hooks = cl.ablate([(1, 0), (2, 3)], "zero")
    ev = cl.evaluate(model, answered, hooks)
    prepared = batches(model, answered, batch_size=3)
    again = cl.evaluate(model, prepared, hooks)
    np.testing.assert_allclose(
        [a.logprob for a in ev.per_sample], [a.logprob for a in again.per_sample], atol=1e-4
    )
    first = model.prepare(answered[0], answer=True)
    with torch.no_grad():
        logits = model.run_with_hooks(first, fwd_hooks=hooks)[0]
    tm = first.token_maps[0]
    rows = logits[tm.answer - 1].log_softmax(-1)
    wanted = rows.gather(1, first.tensors["input_ids"][0, tm.answer][:, None]).sum()
    assert ev.per_sample[0].logprob == pytest.approx(float(wanted), abs=1e-4)
    assert ev.answer_logprob != cl.evaluate(model, answered).answer_logprob


def test_intervals_and_pairs():
    def evaluation(bits):
        return Evaluation([Answer(str(i), "7", "7", bool(bit), -1.0) for i, bit in enumerate(bits)])

    rng = np.random.default_rng(0)
    bits = rng.random(400) < 0.8
    ev = evaluation(bits)
    assert ev.ci.low < ev.accuracy < ev.ci.high
    # the normal interval
    assert ev.ci.high - ev.ci.low == pytest.approx(2 * 1.96 * np.sqrt(0.16 / 400), rel=0.2)
    worse = evaluation(bits & (rng.random(400) < 0.9))
    difference = cl.paired(ev, worse)
    assert (
        difference.difference == pytest.approx(ev.accuracy - worse.accuracy)
        and difference.ci.low > 0
    )
    unpaired = np.sqrt(0.16 / 400 * 2) * 2 * 1.96
    assert difference.ci.high - difference.ci.low < 0.8 * unpaired  # pairing is worth something
    with pytest.raises(cl.CorelensError, match="same samples"):
        cl.paired(ev, evaluation(bits[:10]))
    assert bootstrap_mean(np.ones(5)).low == 1.0


def test_conditions_are_the_controls(model):
    scores = cl.HeadScores(values=np.arange(96, dtype=np.float32).reshape(8, 12))
    sets = conditions(scores, 0.05, draws=4)
    top = sets["top"][0]
    assert len(top) == 5 and sets["bottom"][0] == cl.HeadSet([(0, i) for i in range(5)])
    assert len(sets["random"]) == len(sets["layer-matched"]) == 4
    for heads in sets["random"] + sets["layer-matched"]:
        assert len(heads) == 5 and not heads & top
    for heads in sets["layer-matched"]:
        assert {layer: len(h) for layer, h in heads.by_layer().items()} == {7: 5}
    assert len(set(sets["random"])) > 1


def test_sweep_measures_what_ablation_by_hand_measures(model, answered):
    scores = cl.score_heads(model, answered, ["ram"])["ram"]
    reference = cl.mean_z(model, answered)
    for kind in ("zero", "mean", "knockout", "uniform"):
        sweep = cl.ablation_sweep(
            model, answered, scores, fractions=(0.1, 0.25), kind=kind, draws=2, reference=reference
        )
        assert set(sweep.curves) == {"top", "bottom", "random", "layer-matched"}
        top = scores.top(0.25)
        by_hand = cl.evaluate(
            model, answered,
            cl.knockout(top) if kind == "knockout" else cl.ablate(top, kind, reference=reference if kind == "mean" else None),
        )  # fmt: skip
        assert sweep.curves["top"][1].accuracy.value == pytest.approx(by_hand.accuracy)
        assert sweep.curves["top"][1].k == 4
    assert sweep.to_json()["curves"]["random"][0]["heads"]
    assert sweep.plot() is not None


def swept(top, random):
    """A sweep in which so many of ten answers are lost."""
    lost = {"top": top, "random": random}
    curves = {}
    for name, counts in lost.items():
        points = []
        for place, count in enumerate(counts):
            changed = np.array([0.0] * count + [1.0] * (10 - count))
            drop = accuracy_difference(np.ones(10), changed)
            points.append(Point(0.05 * (place + 1), 1, accuracy_interval(changed), drop))
        curves[name] = points
    return Sweep("zero", accuracy_interval(np.ones(10)), curves, {"label": "ram"})


def test_a_sweep_says_where_its_top_heads_cost_no_more_than_random_ones():
    assert swept([9], [0]).hint is None and swept([0, 9], [0, 1]).hint is None
    for sweep in (swept([0, 1], [0, 0]), swept([9], [9])):
        assert "by ram cost no more than random" in sweep.hint and "cl.where_read" in sweep.hint
        assert sweep.to_json()["hint"] == sweep.hint and sweep.hint in sweep._repr_html_()


def test_a_sweep_of_heads_that_nothing_needs_warns_once():
    model, samples = testbed.core_model(), testbed.samples(24, seed=4)
    ram = cl.score_heads(model, samples[:4], ["ram"])["ram"]
    assert "cl.where_read" in ram.meta["note"]
    lowest = cl.HeadScores(-ram.values, meta={"key": "none"})
    with pytest.warns(UserWarning, match="by none cost no more than random") as warned:
        cl.ablation_sweep(model, samples[4:], lowest, (0.05,), kind="zero", draws=1)
    assert len([w for w in warned if "cost no more" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cost no more.*")
        cl.ablation_sweep(model, samples[4:], ram, (0.05,), kind="zero", draws=1)


def test_mistakes_are_named(model, answered):
    with pytest.raises(cl.CorelensError, match="without an answer"):
        cl.evaluate(model, [cl.Sample(images=answered[0].images, question="What?")])
    other = cl.HeadScores(values=np.random.default_rng(0).random((9, 9)).astype(np.float32))
    with pytest.raises(cl.CorelensError, match="another model"):
        cl.ablation_sweep(model, answered, other)
    torch.manual_seed(0)
