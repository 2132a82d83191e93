"""The hand-built models do what their plan says, and path patching recovers exactly that."""

import warnings
from functools import cache

import numpy as np
import pytest
import torch

from corelens import testbed
from corelens.errors import CorelensError
from corelens.evaluation.evaluate import evaluate
from corelens.heads.head_set import HeadSet
from corelens.interventions import (
    ablate,
    activation_patch,
    attribution_patch,
    counterfactual,
    knockout,
    logit_diff,
    mean_z,
    path_patch,
)  # fmt: skip
from corelens.metrics.score import score_heads
from corelens.model.hooked import HookedMLLM
from corelens.tokens.regions import Box

WHERE, BACKUP, COPY = (0, 0), (1, 1), (2, 2)
DECOYS = [(0, 1), (1, 2), (2, 1)]
HEADS = [(layer, head) for layer in range(3) for head in range(4)]
CIRCUIT = "blocks.2.attn.head.2"


@cache
def circuit() -> HookedMLLM:
    return testbed.circuit_model()


@cache
def looking() -> HookedMLLM:
    return testbed.looking_model()


@cache
def boards() -> list:
    return testbed.samples(6)


@cache
def twins() -> list:
    """The same boards with the red frame around another cell."""
    return testbed.samples(6, moved=True)


@cache
def runs():
    return circuit().prepare(boards()), circuit().prepare(twins())


def only(effect: np.ndarray, which: dict[int, float], atol: float = 0.05) -> None:
    """These effects and no others, averaged over samples."""
    wanted = np.zeros(effect.shape[1:])
    for flag, value in which.items():
        wanted[flag] = value
    np.testing.assert_allclose(effect.mean(0), wanted, atol=atol)


# --- what the models do


def test_the_picture_arrives_as_flags():
    model, (clean, _) = circuit(), runs()
    with torch.no_grad():
        _, cache_ = model.run_with_cache(clean, names_filter="hook_embed")
    embed = cache_["hook_embed"]
    assert (embed.pow(2).sum(-1) - 4).abs().max() < 0.01
    for i, sample in enumerate(boards()):
        for number, position in enumerate(clean.token_maps[i].visual):
            set_ = embed[i, position].round().nonzero()[:, 0].tolist()
            frame = (
                1
                if number == sample.meta["marked"]
                else 2
                if number == sample.meta["distractor"]
                else 0
            )
            assert set_ == [sample.meta["digits"][number], 10 + frame, 13 + number, 29]
        assert clean.token_maps[i].region.tolist() == [
            int(clean.token_maps[i].visual[sample.meta["marked"]])
        ]


def test_the_circuit_answers_and_stops():
    assert evaluate(circuit(), boards()).accuracy == evaluate(circuit(), twins()).accuracy == 1
    clean, moved = runs()
    for inputs, samples in ((clean, boards()), (moved, twins())):
        ids = circuit().generate(inputs, max_new_tokens=4)
        end = circuit().tokenizer.eos_token_id
        assert [circuit().tokenizer.decode([int(line[0])]) for line in ids] == [
            sample.answer for sample in samples
        ]
        assert (ids[:, 1] == end).all()


def test_each_head_looks_where_the_plan_says():
    model, inputs = looking(), looking().prepare(boards())
    name = "blocks.0.attn.hook_pattern"
    with torch.no_grad():
        pattern = model.run_with_cache(inputs, names_filter=name)[1][name]
    for i, (sample, token_map) in enumerate(zip(boards(), inputs.token_maps, strict=True)):
        for row in torch.cat([token_map.question, token_map.last]).tolist():
            target, distractor, uniform, sink = pattern[i, :, row]
            assert target[token_map.visual[sample.meta["marked"]]] > 1 - 1e-6
            assert distractor[token_map.visual[sample.meta["distractor"]]] > 1 - 1e-6
            torch.testing.assert_close(
                uniform[: row + 1], torch.full((row + 1,), 1 / (row + 1)), atol=1e-6, rtol=0
            )
            assert sink[0] > 1 - 1e-6
        before = token_map.visual[0] - 1  # no picture seen yet
        assert (pattern[i, [0, 1, 3], before, 0] > 1 - 1e-6).all()


def test_metrics_rank_as_the_plan_says_and_where_they_are_fooled():
    scores = score_heads(
        looking(), boards(), ["ram", "ram_excess", "visual_mass", "precision", "lift"]
    )
    values = {name: score.values[0] for name, score in scores.items()}
    rows = runs()[0].token_maps[0]
    # the uniform head's mass on one cell, by row
    even = np.mean([1 / (row + 1) for row in rows.question.tolist()])
    np.testing.assert_allclose(values["ram"], [1, 0, even, 0], atol=1e-5)
    np.testing.assert_allclose(values["ram_excess"], [1 - 1 / 16, -1 / 16, 0, 0], atol=1e-5)
    np.testing.assert_allclose(values["precision"][:3], [1, 0, 1 / 16], atol=1e-5)
    np.testing.assert_allclose(values["lift"][:3], [16, 0, 1], atol=1e-4)
    # visual mass cannot tell the head that looks at the evidence from the one that looks past it
    np.testing.assert_allclose(values["visual_mass"][:2], [1, 1], atol=1e-5)
    # raw RAM grows with the region: over the whole picture the distractor head is as good as the
    # target, lift says 1
    wide = [testbed.samples(6)[i] for i in range(6)]
    for sample in wide:
        sample.regions = [Box(0, 0, 64, 64)]
    scores = score_heads(looking(), wide, ["ram", "lift"])
    np.testing.assert_allclose(scores["ram"].values[0, :2], [1, 1], atol=1e-5)
    np.testing.assert_allclose(scores["lift"].values[0, :3], [1, 1, 1], atol=1e-5)


# --- what interventions find


def test_ablating_the_first_head_changes_nothing_since_a_backup_takes_over():
    accuracy = {
        name: evaluate(circuit(), boards(), hooks).accuracy
        for name, hooks in {
            "where": ablate([WHERE]),
            "backup": ablate([BACKUP]),
            "both": ablate([WHERE, BACKUP]),
            "copy": ablate([COPY]),
            "decoys": ablate(DECOYS),
            "cut from the picture": knockout([COPY], "last", "visual"),
            "copy, mean": ablate(
                [COPY], "mean", reference=mean_z(circuit(), twins(), positions="last")
            ),
        }.items()
    }
    assert accuracy["where"] == accuracy["backup"] == accuracy["decoys"] == 1
    assert accuracy["both"] == accuracy["copy"] == accuracy["cut from the picture"] == 0
    assert accuracy["copy, mean"] < 1


def test_activation_patching_finds_the_circuit():
    clean, moved = runs()
    for direction in ("denoising", "noising"):
        result = activation_patch(circuit(), clean, moved, "z", logit_diff(), direction=direction)
        wanted = np.zeros((3, 4))
        wanted[WHERE] = wanted[COPY] = 1
        np.testing.assert_allclose(result.recovered.mean(0), wanted, atol=1e-3)
    places = activation_patch(
        circuit(),
        clean,
        moved,
        "resid_post",
        logit_diff(),
        per=("layer", "role"),
        positions=["visual", "question", "last"],
    )
    np.testing.assert_allclose(
        places.recovered.mean(0), [[0, 0, 1], [0, 0, 1], [0, 0, 1]], atol=1e-3
    )
    keys = activation_patch(circuit(), clean, moved, "k", logit_diff(), per=("layer", "kv_head"))
    np.testing.assert_allclose(keys.recovered.mean(0), [[1, 0], [0, 0], [0, 0]], atol=1e-3)


def test_path_patching_recovers_senders_receivers_and_positions():
    model, (clean, moved) = circuit(), runs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads that cannot reach a receiver
        to_logits = path_patch(
            model, clean, moved, HEADS, "hook_logits", logit_diff(), per="sender"
        )
        to_query = path_patch(
            model, clean, moved, HEADS, f"{CIRCUIT}.hook_q", logit_diff(), per="sender"
        )
    whole = float((to_query.other - to_query.base).mean())
    assert whole < -12
    only(to_logits.effect, {HEADS.index(COPY): whole})
    only(to_query.effect, {HEADS.index(WHERE): whole})
    axes = to_query.plot().axes[0]  # senders that are heads are drawn as layers × heads
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "head",
        "layer",
    ) and "hook_q" in axes.get_title(loc="left")

    heads = [f"blocks.{layer}.attn.head.{head}" for layer in (1, 2) for head in range(4)]
    receivers = [f"{head}.hook_{what}" for head in heads for what in "qkv"] + ["hook_logits"]
    from_where = path_patch(model, clean, moved, [WHERE], receivers, logit_diff(), per="receiver")
    only(from_where.effect, {receivers.index(f"{CIRCUIT}.hook_q"): whole})

    by_position = path_patch(
        model, clean, moved, [WHERE], f"{CIRCUIT}.hook_q", logit_diff(), per="position"
    )
    assert by_position.axes["position"] == [str(position) for position in range(clean.length)]
    only(by_position.effect, {int(clean.token_maps[0].last): whole})

    # upstream: the picture sends the frame to the keys of the where head; the digits have not moved
    first = [f"blocks.0.attn.head.0.hook_{what}" for what in "qkv"] + [f"{CIRCUIT}.hook_v"]
    picture = path_patch(model, clean, moved, "visual", first, logit_diff(), per="receiver")
    only(picture.effect, {0: 0, 1: whole})


def test_a_changed_digit_goes_through_the_values_of_the_copy_head():
    """The red frame stays; the digit in it becomes another: nothing that finds the cell changes."""
    model = circuit()
    clean = testbed.samples(4, seed=3)
    changed = []
    for sample in clean:
        digit = (sample.meta["digits"][sample.meta["marked"]] + 1) % 10
        digits = [
            digit if cell == sample.meta["marked"] else d
            for cell, d in enumerate(sample.meta["digits"])
        ]
        other = testbed.board(digits, sample.meta["marked"], sample.meta["distractor"])
        twin = counterfactual(
            sample, "replace", other=other.crop(sample.regions[0].bounds), answer=str(digit)
        )
        assert np.array_equal(np.asarray(twin.images[0]), np.asarray(other))
        changed.append(twin)
    receivers = [f"{CIRCUIT}.hook_{what}" for what in "qkv"] + [
        f"blocks.0.attn.head.0.hook_{what}" for what in "qkv"
    ]
    result = path_patch(
        model,
        model.prepare(clean),
        model.prepare(changed),
        "visual",
        receivers,
        logit_diff(),
        per="receiver",
    )
    only(result.effect, {2: float((result.other - result.base).mean())})


def test_the_backup_shows_up_only_when_the_first_is_gone():
    model, (clean, moved) = circuit(), runs()
    for hooks, expected in (([], WHERE), (ablate([WHERE]), BACKUP)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = path_patch(
                model,
                clean,
                moved,
                HEADS,
                f"{CIRCUIT}.hook_q",
                logit_diff(),
                per="sender",
                hooks=hooks,
            )
        only(result.effect, {HEADS.index(expected): float((result.other - result.base).mean())})
        patched = activation_patch(model, clean, moved, "z", logit_diff(), hooks=hooks)
        wanted = np.zeros((3, 4))
        wanted[expected] = wanted[COPY] = 1
        np.testing.assert_allclose(patched.recovered.mean(0), wanted, atol=1e-3)


def test_attribution_is_blind_behind_a_saturated_softmax():
    """A known limit: the where head's gradient vanishes, the copy head's does not."""
    clean, moved = runs()
    estimate = attribution_patch(circuit(), clean, moved, "z", logit_diff())
    wanted = np.zeros((3, 4))
    wanted[COPY] = 1
    np.testing.assert_allclose(estimate.recovered.mean(0), wanted, atol=0.15)


# --- the models as models


def test_they_are_ordinary_models(tmp_path):
    model = circuit()
    model.hf.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = HookedMLLM.from_pretrained(tmp_path, dtype="float32")
    with torch.no_grad():
        assert torch.equal(loaded(loaded.prepare(boards()[:2])), model(model.prepare(boards()[:2])))
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_kv_heads) == (3, 4, 2)
    assert HeadSet([COPY]).check(model.cfg.n_layers, model.cfg.n_heads)


def test_the_same_seed_gives_the_same_boards():
    again = testbed.samples(3)
    for a, b, twin in zip(boards(), again, twins(), strict=False):
        assert a.id == b.id and np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
        assert a.meta["other"] == twin.meta["marked"] and a.answer != twin.answer
    assert testbed.samples(0) == []


def test_mistakes_are_named():
    for call, message in (
        (lambda: testbed.build([("where", "think")]), "think"),
        (lambda: testbed.build([("where", "sink"), ("sink",)]), "same even number"),
        (lambda: testbed.build([]), "same even number"),
        (lambda: testbed.samples(-1), "n=-1"),
    ):
        with pytest.raises(CorelensError, match=message):
            call()
