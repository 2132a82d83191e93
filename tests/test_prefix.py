"""Runs that share the keys and values before them, against runs that hold them themselves."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from corelens.hooks.prefix import Prefix
from corelens.hooks.rows import Call, rows_z
from corelens.inputs.prepare import Sample
from corelens.interventions import activation_patch, knockout
from corelens.interventions.replay import Replay, Start
from corelens.model.hooked import HookedMLLM
from helpers.families import tiny

# grouped KV heads, DeepStack; no grouping; a mixture of experts
FAMILIES = ["qwen3_vl", "llava_next", "qwen3_vl_moe"]


@cache
def hooked(family: str) -> HookedMLLM:
    return HookedMLLM(*tiny(family))


def asking(question: str, seed: int = 0) -> Sample:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Sample(images=[Image.fromarray(noise)], question=question, answer="7", id=str(seed))


def measure(logits):
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    return logits[:, -1].softmax(-1) @ weights


@pytest.fixture
def shared(monkeypatch) -> list[bool]:
    """For each layer that had a prefix: whether its runs shared it."""
    calls: list[bool] = []
    plain = Prefix.z

    def z(self, *args):
        result = plain(self, *args)
        calls.append(result is not None)
        return result

    monkeypatch.setattr(Prefix, "z", z)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 2])
def test_a_sweep_over_rows_behind_the_picture_is_one_forward_a_patch(family, n, shared):
    model = hooked(family)
    clean, corrupted = (
        model.prepare([asking(question, seed) for seed in range(n)])
        for question in ("What digit is on the red circle?", "What circle is on the red digit?")
    )
    fast = activation_patch(model, clean, corrupted, "z", measure)
    assert shared and all(shared)
    slow = activation_patch(model, clean, corrupted, "z", measure, fast=False)
    np.testing.assert_allclose(fast.values, slow.values, atol=1e-5, rtol=0)
    assert abs(slow.effect).max() > 1e-3


@torch.no_grad()
def test_hooks_see_every_key_of_every_run(shared):
    """Pattern, rows and edges in one layer; all other layers go on sharing."""
    model = hooked("qwen3_vl")
    inputs = model.prepare(asking("What digit is on the red circle?"))
    row = inputs.length - 6
    hooks = knockout([(1, 2)], rows=[row + 2], columns=[3, row + 1])
    pattern_names = [f"blocks.2.attn.{point}" for point in ("hook_attn_scores", "hook_pattern")]
    names = [*pattern_names, "blocks.3.attn.hook_rot_k"]
    with model.hooks(fwd_hooks=hooks):
        wanted_logits, wanted = model.run_with_cache(inputs, names_filter=names)
    replay = Replay(model, model.encode(inputs))
    read = {}

    def reading(x, hook):
        read[hook.name] = x.clone()

    logits = replay.run(Start(0, row, 3), hooks, dict.fromkeys(names, reading))
    assert shared == [True, True]  # layers 0 and 3
    assert read[names[0]].shape == (3, model.cfg.n_heads, 6, inputs.length)
    for run in range(3):
        torch.testing.assert_close(logits[run], wanted_logits[0], atol=1e-5, rtol=0)
        for name in pattern_names:
            torch.testing.assert_close(read[name][run], wanted[name][0, :, row:], atol=1e-5, rtol=0)
        new_keys = wanted[names[2]][0, row:]
        torch.testing.assert_close(read[names[2]][run], new_keys, atol=1e-5, rtol=0)


def test_prompts_of_unequal_length_repeat_the_prefix(shared):
    model = hooked("qwen3_vl")
    samples = [asking("What digit is on the red circle?"), asking("Which?")]
    replay = Replay(model, model.encode(model.prepare(samples)))
    logits = replay.run(replay.begin(1, replay.length - 4), [])
    assert shared and not any(shared)  # the second sample is padded
    torch.testing.assert_close(logits, replay.logits, atol=1e-5, rtol=0)


# --- the function itself


def causal(before: int, rows: int) -> torch.Tensor:
    return torch.ones(rows, before + rows, dtype=torch.bool).tril(before)[None, None]


@pytest.mark.parametrize("n, runs, rows", [(1, 1, 1), (1, 3, 5), (2, 4, 7)])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_z_is_dense_attention_over_repeated_keys(n, runs, rows, kind):
    torch.manual_seed(0)
    before, query = 33, torch.randn(n * runs, 6, rows, 16)
    key, value = torch.randn(2, n * runs, 2, rows, 16)
    prefix = Prefix(*torch.randn(2, n, 2, before, 16))
    mask = causal(before, rows)
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    call = Call.of(nn.Module(), query, mask, {})
    z = prefix.z(query, key, value, call)
    wanted, _ = rows_z(query, *prefix.before(key, value), None, None, call)
    assert z is not None
    torch.testing.assert_close(z, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "change",
    ["hidden in the prefix", "hidden behind it", "sees ahead", "soft cap", "sinks", "bias"],
)
def test_other_attention_is_left_to_repeated_keys(change):
    before, rows, query = 9, 4, torch.randn(3, 4, 4, 16)
    key, value = torch.randn(2, 3, 2, rows, 16)
    prefix, mask = Prefix(*torch.randn(2, 1, 2, before, 16)), causal(before, rows)
    arguments = {
        "soft cap": {"softcap": 30.0},
        "sinks": {"s_aux": torch.zeros(4)},
        "bias": {"position_bias": torch.zeros(1, 4, rows, before + rows)},
    }.get(change, {})
    assert prefix.z(query, key, value, Call.of(nn.Module(), query, mask, {})) is not None
    if change == "hidden in the prefix":
        mask[..., 2, 0] = False
    elif change == "hidden behind it":
        mask[..., 3, before + 1] = False
    elif change == "sees ahead":
        mask[..., 0, before + 1] = True
    assert prefix.z(query, key, value, Call.of(nn.Module(), query, mask, arguments)) is None
