"""Activation patching: identities, and every fast way against one whole forward a patch."""

import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions import (
    PatchResult,
    ablate,
    accuracy,
    activation_patch,
    answer_logprob,
    attribution_patch,
    counterfactual,
    counterfactual_pairs,
    kl,
    knockout,
    logit_diff,
    patch,
)  # fmt: skip
from corelens.interventions.branch import branch
from corelens.interventions.replay import Replay
from corelens.interventions.sites import axis_of
from corelens.model.hooked import HookedMLLM
from corelens.tokens.regions import Box, Mask, Tube
from helpers.families import tiny

FAMILIES = ["qwen3_vl", "llava_next", "gemma3", "paligemma", "qwen3_vl_moe"]


def sample(seed: int, question: str = "What digit is on the red circle?") -> Sample:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (64, 96, 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    return Sample(
        images=[picture], question=question, answer="7", regions=[Box(10, 10, 60, 40)], id=str(seed)
    )


@cache
def hooked(family: str) -> HookedMLLM:
    return HookedMLLM(*tiny(family))


@cache
def runs(family: str) -> dict[str, Inputs]:
    """Clean; another picture; another text of as many tokens (the rows before it are the same)."""
    model = hooked(family)
    return {
        "clean": model.prepare([sample(0), sample(1, "Which colour?")]),
        "picture": model.prepare([sample(7), sample(8, "Which colour?")]),
        "text": model.prepare(
            [sample(0, "What circle is on the red digit?"), sample(1, "Which colour?")]
        ),
    }


def measure(logits):
    """Three rows and all of the vocabulary."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    return logits[:, -1] @ weights + logits[:, -3] @ weights.flip(0) + logits[:, 5, 4]


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=atol, rtol=1e-5)


# --- identities


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_into_clean_does_nothing(family):
    model, clean = hooked(family), runs(family)["clean"]
    names = [
        "hook_embed",
        *(
            n
            for n in model.hook_names()
            if n.startswith("blocks.") and not n.endswith("hook_edges")
        ),
    ]
    with torch.no_grad():
        logits, cache_ = model.run_with_cache(clean, names_filter=names)
        again = model.run_with_hooks(clean, fwd_hooks=patch(names, cache_))
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=0)
    assert (activation_patch(model, clean, clean, "z", measure).effect == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_patched_make_the_other_run(family):
    """Every hook_attn_out is the other run's; with the embeddings and what DeepStack adds, the
    logits are too."""
    model, clean, other = hooked(family), runs(family)["clean"], runs(family)["picture"]
    attn_out = [f"blocks.{layer}.hook_attn_out" for layer in range(4)]
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    deepstack = model.hook_names("hook_deepstack")
    with torch.no_grad():
        wanted, source = model.run_with_cache(
            other, names_filter=[*attn_out, *z, *deepstack, "hook_embed"]
        )
        with model.hooks(fwd_hooks=patch(z, source)):
            _, actual = model.run_with_cache(clean, names_filter=attn_out)
        logits = model.run_with_hooks(
            clean, fwd_hooks=patch([*z, "hook_embed", *deepstack], source)
        )
    for name in attn_out:
        torch.testing.assert_close(actual[name], source[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    everything = activation_patch(model, other, clean, "visual", measure, per=())
    close(everything.values, everything.other)
    close(everything.recovered, 1, atol=1e-3)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_patching_the_projectors_output_is_patching_the_visual_features(family):
    model, clean, other = hooked(family), runs(family)["clean"], runs(family)["picture"]
    with torch.no_grad():
        _, source = model.run_with_cache(clean, names_filter="vision.hook_out")
        actual = measure(model.run_with_hooks(other, fwd_hooks=patch("vision.hook_out", source)))
    close(activation_patch(model, clean, other, "vision.hook_out", measure, per=()).values, actual)


def test_a_patch_per_head_at_some_positions_is_that_slice():
    model, clean, other = hooked("qwen3_vl"), runs("qwen3_vl")["clean"], runs("qwen3_vl")["picture"]
    name = "blocks.2.attn.head.3.hook_z"
    with torch.no_grad():
        _, source = model.run_with_cache(other)
        with model.hooks(
            fwd_hooks=patch(
                [name, "blocks.1.attn.kv_head.1.hook_v"], source, positions="region+last"
            )
        ):
            _, actual = model.run_with_cache(
                clean, names_filter=["blocks.2.attn.hook_z", "blocks.1.attn.hook_v"]
            )
        _, plain = model.run_with_cache(
            clean, names_filter=["blocks.2.attn.hook_z", "blocks.1.attn.hook_v"]
        )
    for i, token_map in enumerate(clean.token_maps):
        where = torch.zeros(clean.length, dtype=torch.bool)
        where[token_map.positions("region+last")] = True
        assert torch.equal(actual["z", 2][i, where, 3], source["z", 2][i, where, 3])
        assert torch.equal(actual["v", 1][i, where, 1], source["v", 1][i, where, 1])
        assert torch.equal(actual["v", 1][i, ~where], plain["v", 1][i, ~where])


def test_a_patch_leaves_generated_tokens_alone():
    model, clean, other = hooked("qwen3_vl"), runs("qwen3_vl")["clean"], runs("qwen3_vl")["picture"]
    with torch.no_grad():
        _, source = model.run_with_cache(other)
    hooks, seen = patch("blocks.1.hook_resid_pre", source), []
    hooks.append(("blocks.1.hook_resid_pre", lambda x, hook: seen.append(x.clone())))
    with model.hooks(fwd_hooks=hooks):
        model.generate(clean, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(seen[0], source["resid_pre", 1]) and [x.shape[1] for x in seen] == [
        clean.length,
        1,
        1,
    ]


# --- the runner against the plain loop

SWEEPS = [
    ("resid_pre", ("layer", "role"), {}),
    ("resid_mid", ("position",), {"positions": "question+last"}),
    ("resid_post", ("layer",), {"positions": "region"}),
    ("attn_out", ("role", "layer"), {"positions": ["region", "question", "last"]}),
    ("mlp_out", ("layer",), {}),
    ("mlp_post", ("layer", "neuron"), {"block": 24}),
    ("z", ("layer", "head"), {}),
    ("z", ("layer", "head", "region"), {}),
    ("result", ("layer", "head"), {"positions": "last"}),
    ("q", ("head",), {}),
    ("rot_q", ("layer", "head"), {}),
    ("k", ("layer", "kv_head"), {}),
    ("v", ("layer", "kv_head"), {"positions": "visual"}),
    ("pattern", ("layer", "head"), {}),
    ("pattern", ("layer",), {"positions": "last"}),
    ("embed", ("role",), {}),
    ("visual", (), {}),
    ("visual", ("region",), {}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", ["picture", "text"])
def test_every_sweep_equals_one_whole_forward_a_patch(family, other):
    model, clean, corrupted = hooked(family), runs(family)["clean"], runs(family)[other]
    if family == "qwen3_vl":
        sweeps = SWEEPS if other == "picture" else SWEEPS[1:14:4]
    else:
        sweeps = SWEEPS[6:17:10] if other == "picture" else SWEEPS[7:14:6]
    for site, per, options in sweeps:
        fast = activation_patch(model, clean, corrupted, site, measure, per, **options)
        slow = activation_patch(model, clean, corrupted, site, measure, per, fast=False, **options)
        close(fast.values, slow.values)
        close(fast.base, slow.base)
        assert fast.dims == ("sample", *per) and fast.axes == slow.axes
        assert list(fast.values.shape[1:]) == [len(labels) for labels in fast.axes.values()]
        if other == "picture":
            assert abs(fast.effect).max() > 1e-3, (site, per)


def test_the_plain_loop_is_what_a_user_would_write():
    model, clean, corrupted = (
        hooked("qwen3_vl"),
        runs("qwen3_vl")["clean"],
        runs("qwen3_vl")["picture"],
    )
    result = activation_patch(model, clean, corrupted, "z", measure)
    with torch.no_grad():
        logits, source = model.run_with_cache(clean)
        base = measure(model(corrupted))
        for layer in range(4):
            for head in range(4):
                hooks = patch(f"blocks.{layer}.attn.head.{head}.hook_z", source)
                wanted = measure(model.run_with_hooks(corrupted, fwd_hooks=hooks))
                close(result.values[:, layer, head], wanted)
                # a difference: twice the rounding
                close(result.effect[:, layer, head], wanted - base, atol=3e-5)
                close(
                    result.recovered[:, layer, head],
                    (wanted - base) / (measure(logits) - base),
                    atol=1e-3,
                )
    noised = activation_patch(model, clean, corrupted, "z", measure, direction="noising")
    close(noised.base, result.other)
    close(noised.other, result.base)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_under_other_hooks_and_in_small_batches(family):
    model, clean, corrupted = hooked(family), runs(family)["clean"], runs(family)["text"]
    hooks = ablate([(0, 1), (2, 2)]) + knockout(None, rows="question", columns="region")
    hooks += [
        ("blocks.2.hook_resid_pre", lambda x, hook: x + 0.1),
        ("hook_embed", lambda x, hook: x * 1.1),
    ]
    slow = activation_patch(
        model, clean, corrupted, "attn_out", measure, ("layer", "role"), hooks=hooks, fast=False
    )
    for size in (1, 200, 100_000):
        fast = activation_patch(
            model,
            clean,
            corrupted,
            "attn_out",
            measure,
            ("layer", "role"),
            hooks=hooks,
            batch_tokens=size,
        )
        close(fast.values, slow.values)
        assert abs(fast.effect).max() > 1e-3
    plain = activation_patch(model, clean, corrupted, "attn_out", measure, ("layer", "role"))
    assert abs(plain.values - slow.values).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_begins_late_is_the_base_run(family):
    model, clean = hooked(family), runs(family)["clean"]
    wanted = model(clean)
    real = torch.stack([token_map.real for token_map in clean.token_maps])
    replay = Replay(model, model.encode(clean))
    # there, pictures or prompts attend both ways
    assert replay.suffixes == (family not in ("gemma3", "paligemma"))
    for layer, row, runs_ in ((0, 0, 1), (2, 0, 3), (0, 25, 2), (3, 30, 2)):
        start = replay.begin(layer, row, runs_)
        actual = replay.run(start, [])
        for run in range(runs_):
            torch.testing.assert_close(actual[run::runs_][real], wanted[real], atol=1e-5, rtol=0)
    assert not any("forward" in vars(layer) for layer in replay.decoder.layers)
    assert not any(point.active for point in model.hook_points())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_another_question_begins_at_its_first_new_row(family):
    """In each family; None where pictures or prompts attend both ways."""
    model, clean, asked = hooked(family), runs(family)["clean"], runs(family)["text"]
    names = [f"blocks.{i}.attn.{point}" for i in (0, 3) for point in ("hook_z", "hook_pattern")]
    replay = Replay(model, model.encode(clean), names=names)
    lengths = []
    handle = replay.decoder.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(
            (args or [kwargs["hidden_states"]])[0].shape[1]
        ),
        with_kwargs=True,
    )
    branched = branch(replay, model.encode(asked), names)
    handle.remove()
    if not replay.suffixes:
        assert branched is None
        return
    values, logits = branched
    differs = clean.tensors["input_ids"] != asked.tensors["input_ids"]
    assert lengths == [clean.length - int(differs.any(0).nonzero()[0])]
    with torch.no_grad():
        wanted_logits, wanted = model.run_with_cache(asked, names_filter=names)
    real = torch.stack([token_map.real for token_map in asked.token_maps])
    torch.testing.assert_close(logits[real], wanted_logits[real], atol=1e-5, rtol=0)
    for name in names:
        rows = axis_of(name)[0]
        actual, expected = (x.transpose(1, rows)[real] for x in (values[name], wanted[name]))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_runs_that_share_no_opening_are_run_whole():
    model, pair = hooked("qwen3_vl"), runs("qwen3_vl")
    names = ["blocks.0.attn.hook_z"]
    replay = Replay(model, model.encode(pair["clean"]), names=names)
    assert branch(replay, model.encode(pair["picture"]), names) is None
    assert branch(replay, model.encode(pair["text"]), ["vision.hook_out"]) is None
    values, logits = branch(replay, model.encode(pair["text"]), names)
    assert (logits[0] != replay.logits[0]).any() and torch.equal(logits[1], replay.logits[1])
    assert torch.equal(values[names[0]][1], replay.cache[names[0]][1])  # it asks the same
    values, logits = branch(replay, model.encode(pair["clean"]), names)
    assert logits is replay.logits and values[names[0]] is replay.cache[names[0]]
    under = Replay(model, model.encode(pair["clean"]), knockout([(0, 1)]), names=names)
    assert branch(under, model.encode(pair["text"]), names) is None


def test_a_sample_that_does_not_differ_keeps_the_base_run_s_values_to_the_last_bit(monkeypatch):
    model, pair = hooked("qwen3_vl"), runs("qwen3_vl")  # the second sample asks the same
    name = "blocks.0.attn.hook_z"
    replay = Replay(model, model.encode(pair["clean"]), names=[name])

    def zeros(self, start, hooks, reading):
        reading[name](
            torch.zeros_like(self.cache[name][:, start.row :]), SimpleNamespace(name=name)
        )
        return torch.zeros_like(self.logits)

    monkeypatch.setattr(Replay, "run", zeros)
    values, logits = branch(replay, model.encode(pair["text"]), [name])
    assert not values[name][0, -1].any() and not logits[0].any()
    assert torch.equal(values[name][1], replay.cache[name][1])
    assert torch.equal(logits[1], replay.logits[1])


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_videos_are_patched_as_pictures_are(family):
    model = hooked(family)
    samples = []
    for seed in (0, 5):
        frames = [sample(seed + i).images[0] for i in range(4)]
        samples.append(Sample(video=frames, question="Which colour?", answer="7"))
    clean, corrupted = (model.prepare(sample_) for sample_ in samples)
    for site, per in (("z", ("layer",)), ("visual", ())):
        fast = activation_patch(model, clean, corrupted, site, measure, per)
        slow = activation_patch(model, clean, corrupted, site, measure, per, fast=False)
        close(fast.values, slow.values)
    close(fast.values, fast.other)


# --- attribution


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_attribution_is_the_derivative_of_the_exact_effect(family):
    """Against a central difference: a small part of the way to the other run's value (norms compute
    in float32)."""
    precise = HookedMLLM(copy.deepcopy(hooked(family).hf).double(), hooked(family).processor)
    clean, corrupted = (runs(family)[name].to(dtype=torch.float64) for name in ("clean", "picture"))
    step = 3e-2
    for site, point, axis in (
        ("z", "attn.hook_z", 2), ("v", "attn.hook_v", 2), ("pattern", "attn.hook_pattern", 1),
        ("mlp_out", "hook_mlp_out", 0),
        ("resid_pre", "hook_resid_pre", 0), ("result", "attn.hook_result", 2), ("q", "attn.hook_q", 2),
    ):  # fmt: skip
        per = ("layer", {"v": "kv_head"}.get(site, "head")) if axis else ("layer",)
        estimate = attribution_patch(precise, clean, corrupted, site, precisely, per)
        name = f"blocks.2.{point}"
        with torch.no_grad():
            _, source = precise.run_with_cache(clean, names_filter=name)

        def nudged(by, source=source, name=name, axis=axis):
            def nudge(x, hook):
                part = (slice(None),) * axis + (1,) if axis else ()
                x[part] += by * (source[name] - x)[part]

            with torch.no_grad():
                return precisely(precise.run_with_hooks(corrupted, fwd_hooks=[(name, nudge)]))

        wanted = (nudged(step) - nudged(-step)) / (2 * step)
        actual = estimate.effect[:, 2, 1] if axis else estimate.effect[:, 2]
        assert abs(wanted).max() > 1e-3
        np.testing.assert_allclose(
            actual, wanted, rtol=1e-2, atol=5e-3 * float(abs(wanted).max()), err_msg=site
        )


def precisely(logits):
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3)).double()
    return logits[:, -1] @ weights


def test_integrated_gradients_add_up_to_the_difference_of_the_runs():
    """Completeness: over the inputs themselves, effects sum to the metric's difference."""
    model, clean, corrupted = (
        hooked("qwen3_vl"),
        runs("qwen3_vl")["clean"],
        runs("qwen3_vl")["picture"],
    )
    plain, integrated = (
        attribution_patch(model, clean, corrupted, "visual", measure, per=(), steps=steps)
        for steps in (0, 24)
    )
    gap = integrated.other - integrated.base
    assert abs(integrated.effect - gap).max() < 0.1 * abs(gap).max() < abs(plain.effect - gap).max()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "24 steps" in integrated.meta["method"]


def test_attribution_of_a_metric_without_gradient_is_zero():
    model, clean, corrupted = (
        hooked("llava_next"),
        runs("llava_next")["clean"],
        runs("llava_next")["text"],
    )
    result = attribution_patch(model, clean, corrupted, "z", accuracy("7"), hooks=ablate([(1, 1)]))
    assert (result.effect == 0).all() and result.values.shape == (2, 4, 4)


# --- counterfactuals


def painted() -> Sample:
    """A grey picture with a red and a blue square."""
    picture = Image.new("RGB", (96, 64), (128, 128, 128))
    picture.paste((255, 0, 0), (8, 8, 24, 24))
    picture.paste((0, 0, 255), (60, 30, 84, 54))
    boxes = [Box(8, 8, 24, 24), Box(60, 30, 84, 54)]
    return Sample(images=[picture], question="Which colour?", answer="red", regions=boxes, id="p")


def test_each_counterfactual_changes_its_region_and_nothing_else():
    clean = painted()
    before = np.asarray(clean.images[0])
    other = Sample(
        images=[Image.new("RGB", (40, 40), (0, 255, 0))],
        answer="green",
        regions=[Box(5, 5, 30, 30)],
    )
    for kind, options in (
        ("blur", {}),
        ("noise", {"seed": 3}),
        ("mask", {}),
        ("replace", {"other": other}),
    ):
        twin = counterfactual(clean, kind, **options)
        after = np.asarray(twin.images[0])
        inside = np.zeros((64, 96), dtype=bool)
        inside[8:24, 8:24] = True
        assert after.shape == before.shape and (after[~inside] == before[~inside]).all()
        if kind == "blur":  # of one colour all over: nothing to see
            assert (after == before).all()
        else:
            assert (after[inside] != before[inside]).any()
        assert (
            twin.id == f"p:{kind}"
            and twin.question == clean.question
            and twin.regions == clean.regions
        )
        assert twin.answer == ("green" if kind == "replace" else None)
    assert (
        np.asarray(counterfactual(clean, "replace", other=other).images[0])[10, 10] == (0, 255, 0)
    ).all()
    mean = before.reshape(-1, 3).mean(0).round()
    assert (np.asarray(counterfactual(clean, "mask").images[0])[10, 10] == mean).all()
    assert (np.asarray(clean.images[0]) == before).all()
    wide = counterfactual(clean, "blur", region=Box(0, 0, 96, 64))
    assert (np.asarray(wide.images[0]) != before).any()


def test_swap_exchanges_two_regions():
    clean = painted()
    for options in ({"other": 1}, {"other": Box(60, 30, 84, 54)}, {"region": 1, "other": 0}):
        after = np.asarray(counterfactual(clean, "swap", answer="blue", **options).images[0])
        assert (after[8:24, 8:24] == (0, 0, 255)).all() and (
            after[30:54, 60:84] == (255, 0, 0)
        ).all()
    with pytest.raises(CorelensError, match="overlap"):
        counterfactual(clean, "swap", other=Box(20, 20, 40, 40))


def test_masks_and_tubes():
    form = np.zeros((64, 96), dtype=bool)
    form[10:20, 10:20] = np.tri(10, dtype=bool)
    after = np.asarray(counterfactual(painted(), "noise", region=Mask(form)).images[0])
    before = np.asarray(painted().images[0])
    assert (after[~form] == before[~form]).all() and (after[form] != before[form]).any()
    frames = [Image.new("RGB", (64, 64), (40 * i, 0, 0)) for i in range(4)]
    video = Sample(
        video=frames, question="?", regions=[Tube({1: Box(0, 0, 9, 9), 2: Box(4, 4, 9, 9)})]
    )
    twin = counterfactual(video, "noise")
    changed = [
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(frames, twin.video, strict=True)
    ]
    assert changed == [False, True, True, False]


def test_pairs_share_their_token_grid_or_are_refused():
    model = hooked("qwen3_vl")
    clean = [painted(), sample(0)]
    for kind, options in (
        ("blur", {}),
        ("swap", {"other": Box(70, 0, 90, 20), "answer": ["blue", "3"]}),
    ):
        pairs = counterfactual_pairs(clean, kind, model=model, **options)
        assert [a for a, _ in pairs] == clean and all(
            b.images[0].size == (96, 64) for _, b in pairs
        )
        inputs = [model.prepare([members[side] for members in pairs]) for side in (0, 1)]
        result = activation_patch(model, *inputs, "z", measure, per="layer")
        assert result.values.shape == (2, 4)
    assert [b.answer for _, b in pairs] == ["blue", "3"]
    same = counterfactual(sample(0), "text", other="What circle is on the red digit?", model=model)
    assert same.question == "What circle is on the red digit?"
    small = Sample(images=[Image.new("RGB", (64, 64))], question="Which colour?")
    for call, message in (
        (
            lambda: counterfactual(sample(0), "text", other="Which colour?", model=model),
            "they part at token",
        ),
        (lambda: counterfactual_pairs([painted()], [small]), "pictures of the same sizes"),
        (
            lambda: counterfactual_pairs([painted()], [sample(0, "Which?")], model=model),
            "they part",
        ),
        (lambda: counterfactual_pairs([painted()], []), "one twin a sample"),
        (lambda: counterfactual(painted(), "erase"), "swap, replace, blur"),
        (lambda: counterfactual(painted(), "swap"), "without other="),
        (lambda: counterfactual(painted(), "blur", other=1), "with other="),
        (lambda: counterfactual(painted(), "blur", region=7), "which has 2"),
        (lambda: counterfactual(painted(), "blur", region=Box(0, 0, 300, 10)), "outside"),
        (lambda: counterfactual(painted(), "swap", other=painted()), "a Box, Mask or Tube"),
        (lambda: counterfactual(painted(), "text", other=""), "another question"),
    ):
        with pytest.raises(CorelensError, match=message):
            call()


# --- metrics


@torch.no_grad()
def test_metrics_against_their_formulas():
    model, clean, corrupted = (
        hooked("qwen3_vl"),
        runs("qwen3_vl")["clean"],
        runs("qwen3_vl")["picture"],
    )
    a, b = model.to_single_token("7"), model.to_single_token("3")
    for batch in (clean, model.prepare(clean.samples, padding_side="right")):
        logits = model(batch)
        per_sample = torch.stack(
            [logits[i, token_map.last[0]] for i, token_map in enumerate(batch.token_maps)]
        )
        other = torch.randn_like(logits)
        rows = torch.stack(
            [other[i, token_map.last[0]] for i, token_map in enumerate(batch.token_maps)]
        )
        for metric, wanted in (
            (logit_diff("7", "3"), rows[:, a] - rows[:, b]),
            (
                logit_diff(["7", "3"], ["3", "7"]),
                torch.stack([rows[0, a] - rows[0, b], rows[1, b] - rows[1, a]]),
            ),
            (logit_diff(wrong="3"), rows[:, a] - rows[:, b]),
            (logit_diff(a, b), rows[:, a] - rows[:, b]),
            (answer_logprob(), rows.log_softmax(-1)[:, a]),
            (answer_logprob("3"), rows.log_softmax(-1)[:, b]),
            (accuracy(), (rows.argmax(-1) == a).float()),
            (accuracy(int(rows[0].argmax())), (rows.argmax(-1) == rows[0].argmax()).float()),
            (
                kl(),
                torch.nn.functional.kl_div(
                    rows.log_softmax(-1), per_sample.softmax(-1), reduction="none"
                ).sum(-1),
            ),
        ):
            bound = metric.bind(model, batch, corrupted)
            torch.testing.assert_close(bound(other), wanted)
            torch.testing.assert_close(bound(other[:, -bound.keep :]), wanted)
    assert (kl().bind(model, clean)(model(clean)).abs() < 1e-6).all()
    logits = model(clean)
    torch.testing.assert_close(logit_diff(a, b)(logits), logits[:, -1, a] - logits[:, -1, b])


@torch.no_grad()
def test_an_answer_of_several_tokens_is_teacher_forced():
    model = hooked("llava_next")
    samples = [sample(0), sample(1, "Which colour?")]
    samples[0].answer = "77 red"
    batch = model.prepare(samples, answer=True)
    logits = model(batch)
    wanted, right = [], []
    for i, token_map in enumerate(batch.token_maps):
        ids = batch.tensors["input_ids"][i, token_map.answer]
        rows = logits[i, token_map.answer - 1].log_softmax(-1)
        wanted.append(rows.gather(1, ids[:, None]).sum())
        right.append(float((rows.argmax(-1) == ids).all()))
    metric = answer_logprob().bind(model, batch)
    torch.testing.assert_close(metric(logits), torch.stack(wanted))
    torch.testing.assert_close(metric(logits[:, -metric.keep :]), torch.stack(wanted))
    assert accuracy().bind(model, batch)(logits).tolist() == right
    with pytest.raises(CorelensError, match=r"3 tokens: \[' 7', '7', ' red'\]"):
        logit_diff().bind(model, batch, batch)


def test_our_metrics_in_a_sweep_read_the_last_row_alone():
    model, clean, corrupted = (
        hooked("qwen3_vl"),
        runs("qwen3_vl")["clean"],
        runs("qwen3_vl")["text"],
    )
    a, b = model.to_single_token("7"), model.to_single_token("3")
    fast = activation_patch(model, clean, corrupted, "z", logit_diff("7", "3"))
    slow = activation_patch(
        model, clean, corrupted, "z", lambda x: x[:, -1, a] - x[:, -1, b], fast=False
    )
    close(fast.values, slow.values)
    assert fast.meta["metric"] == "logit difference" and fast.meta["direction"] == "denoising"
    same = activation_patch(
        model, clean, corrupted, "resid_pre", kl(), per="layer", positions="question+last"
    )
    assert (abs(same.other) < 1e-6).all() and (same.base[0] > 1e-4)
    whole = activation_patch(
        model, clean, corrupted, "resid_pre", kl(), per="layer", positions="last", fast=False
    )
    assert (whole.other == 0).all()


# --- the result


def made() -> PatchResult:
    values = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    axes = {"layer": ["0", "1"], "head": ["0", "1", "2"]}
    base, other = np.array([1, 2], dtype=np.float32), np.array([3, 2], dtype=np.float32)
    return PatchResult(
        values,
        base,
        other,
        axes,
        ["a", "b"],
        {"metric": "logit difference", "direction": "noising"},
    )


def test_a_result_saves_and_loads(tmp_path):
    result = made()
    result.save(tmp_path / "patch.safetensors")
    again = PatchResult.load(tmp_path / "patch.safetensors")
    assert (
        (again.values == result.values).all()
        and again.axes == result.axes
        and again.samples == ["a", "b"]
    )
    assert again.meta == result.meta and (again.base == result.base).all()
    blob = (tmp_path / "patch.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(blob[: len(blob) // 2])
    for path in ("short.safetensors", "none.safetensors"):
        with pytest.raises(CorelensError, match="cannot be read"):
            PatchResult.load(tmp_path / path)


def test_a_result_speaks_for_itself():
    result = made()
    assert result.dims == ("sample", "layer", "head")
    assert (result.effect == result.values - np.array([1, 2])[:, None, None]).all()
    # the runs do not differ there
    assert result.recovered[0, 0, 2] == 0.5 and np.isnan(result.recovered[1]).all()
    assert result.top(1) == [({"layer": "1", "head": "2"}, float(result.effect.mean(0).max()))]
    part = result.select(layer=1)
    assert part.axes == {"head": ["0", "1", "2"]} and (part.values == result.values[:, 1]).all()
    assert "layer 1 head 2" in repr(result)
    alone = repr(result.select(layer=1).select(head=2))
    assert "one patch" in alone and f"logit difference {result.top(1)[0][1]:+.3f}" in alone
    assert "<img" in result._repr_html_()
    assert result.plot("recovered") and part.plot() and result.plot_against(made())
    for call, message in (
        (lambda: result.select(layer=7), "one of"),
        (lambda: result.select(row=7), "an axis"),
        (lambda: result.select(layer=0).select(head=0).plot(), "one or two"),
        (lambda: result.plot("mean"), "recovered"),
        (lambda: result.plot_against(part), "same axes"),
    ):
        with pytest.raises(CorelensError, match=message):
            call()


# --- mistakes


def test_mistakes_are_named():
    model, clean, corrupted = (
        hooked("qwen3_vl"),
        runs("qwen3_vl")["clean"],
        runs("qwen3_vl")["picture"],
    )
    longer = model.prepare(
        [sample(0, "What digit is on the red circle on the left?"), sample(1, "Which colour?")]
    )
    wide = Sample(images=[Image.new("RGB", (160, 64))], question="Which colour?")
    with torch.no_grad():
        _, source = model.run_with_cache(longer)
    ok = {"metric": measure}
    for call, message in (
        (lambda: activation_patch(model, clean, longer, **ok), "sample '0': .*they part at token"),
        (lambda: activation_patch(model, sample(1, "Which colour?"), wide, **ok), "visual"),
        (lambda: activation_patch(model, clean, sample(0), **ok), "2 clean and 1 corrupted"),
        (lambda: activation_patch(model, clean, corrupted, "zz", measure), "the site 'zz'"),
        (lambda: activation_patch(model, clean, corrupted, "k", measure), "KV heads"),
        (
            lambda: activation_patch(model, clean, corrupted, "z", measure, per=("layer", "layer")),
            "none twice",
        ),
        (lambda: activation_patch(model, clean, corrupted, "z", measure, per="row"), "axes among"),
        (lambda: activation_patch(model, clean, corrupted, "z"), "no metric"),
        (lambda: activation_patch(model, clean, corrupted, "z", 3), "a metric 3"),
        (
            lambda: activation_patch(model, clean, corrupted, "z", lambda x: x.mean()),
            r"returned \[\] for logits",
        ),
        (lambda: activation_patch(model, clean, corrupted, "z", lambda x: 1.0), "float"),
        (
            lambda: activation_patch(model, clean, corrupted, "z", logit_diff("7", "77")),
            r"2 tokens: \['7', '7'\]",
        ),
        (
            lambda: activation_patch(model, clean, corrupted, "z", logit_diff(["7"], "3")),
            "1 answers for 2",
        ),
        (
            lambda: activation_patch(model, clean, corrupted, "z", measure, direction="up"),
            "denoising",
        ),
        (lambda: activation_patch(model, "clean", corrupted, "z", measure), "to patch"),
        (lambda: logit_diff("7", "3")(torch.zeros(1, 2, 3)), "bind"),
        (
            lambda: model.run_with_hooks(clean, fwd_hooks=patch("blocks.0.attn.hook_z", source)),
            "same positions",
        ),
        (lambda: patch("blocks.0.attn.hook_zz", source), "a source without"),
        (
            lambda: patch(
                "blocks.0.attn.kv_head.2.hook_k", {"blocks.0.attn.hook_k": torch.zeros(1, 2, 2, 8)}
            ),
            "a source",
        ),
    ):
        with pytest.raises(CorelensError, match=message):
            call()
    assert not any(point.active for point in model.hook_points())
