"""Towers of families without a layout: their attention is found by what looks the attention
function up."""

from functools import cache

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

import corelens as cl
from corelens.errors import CorelensError
from helpers import family_recent
from helpers.family_parts import randomise

# linear and full attention; norms behind attention; rows of pixels; a batch axis and padding
FAMILIES = ["qwen3_5", "glm46v", "mistral3", "gemma4"]
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family):
    hf, processor = family_recent.BUILDERS[family]()
    return cl.HookedMLLM(randomise(hf).eval(), processor, check=False)


@cache
def inputs_of(family):
    pixels = np.random.default_rng(0).integers(0, 255, (96, 120, 3)).astype(np.uint8)
    return model_of(family).prepare(cl.Sample([Image.fromarray(pixels)], "What is it?"))


@torch.no_grad()
def plain(family):
    return model_of(family).hf(**inputs_of(family).tensors, use_cache=False).logits


@every_family
@torch.no_grad()
def test_reading_a_tower_leaves_the_logits_bit_for_bit(family):
    model = model_of(family)
    names = [n for n in model.hook_names("vision.") if not n.endswith("pattern")]
    assert len(names) == 1 + 6 * model.cfg.n_vision_layers == 13
    logits, cached = model.run_with_cache(inputs_of(family), names_filter=names)
    assert torch.equal(logits, plain(family)) and set(cached) == set(names)


@every_family
@torch.no_grad()
def test_an_edit_of_z_is_a_plain_hook_on_the_output_projection(family):
    model, inputs = model_of(family), inputs_of(family)
    for number, layer in enumerate(model.towers[0].layers):

        def second_head_off(module, args, heads=layer.n_heads):
            z = rearrange(args[0], "... (head d) -> ... head d", head=heads).clone()
            z[..., 1, :] = 0
            return (z.flatten(-2),)

        name = f"vision.blocks.{number}.attn.head.1.hook_z"
        edited = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda z, hook: z * 0)])
        handle = layer.module.get_submodule(layer.out).register_forward_pre_hook(second_head_off)
        wanted = plain(family)
        handle.remove()
        assert torch.equal(edited, wanted) and not torch.equal(edited, plain(family))


@every_family
@torch.no_grad()
def test_a_pattern_is_the_eager_one_and_gives_z(family):
    model, inputs = model_of(family), inputs_of(family)
    names = [f"vision.blocks.1.attn.hook_{word}" for word in ("pattern", "z")]
    logits, cached = model.run_with_cache(inputs, names_filter=names)
    torch.testing.assert_close(logits, plain(family), atol=1e-3, rtol=1e-4)
    eager = []

    def keep(module, args, output):
        eager.append(output[1] if isinstance(output, tuple) else None)

    layer = model.towers[0].layers[1]
    attends = layer.module.get_submodule(layer.attention)
    handle = attends.register_forward_hook(keep)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        plain(family)
    finally:
        model.hf.set_attn_implementation(before)
        handle.remove()
    if eager[0] is not None:  # (the Qwen and GLM modules drop the weights)
        torch.testing.assert_close(cached[names[0]], eager[0].float(), atol=1e-4, rtol=1e-3)
    rows = cached[names[0]].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


def test_a_tower_whose_projections_are_not_what_their_names_say_is_refused():
    hf, processor = family_recent.BUILDERS["glm46v"]()
    model = cl.HookedMLLM(randomise(hf).eval(), processor, check=False)
    attends = model.towers[0].layers[0].module.attn

    class Gated(nn.Module):
        """An output projection with a gate inside: what it gets is still z."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    class Before(nn.Module):
        """Something between z and the projection."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.flip(-1))

    inputs, name = inputs_of("glm46v"), "vision.blocks.0.attn.hook_z"
    inner = attends.proj
    attends.proj = Gated(inner)
    model.run_with_cache(inputs, names_filter=[name])
    model.towers[0].checked.clear()
    original = type(attends).forward

    def flipped(self, *args, **kwargs):
        handle = self.proj.register_forward_pre_hook(lambda m, a: (a[0].flip(-1),), prepend=True)
        try:
            return original(self, *args, **kwargs)
        finally:
            handle.remove()

    attends.forward = flipped.__get__(attends)
    with pytest.raises(CorelensError, match="something stands between"):
        model.run_with_cache(inputs, names_filter=[name])


def test_a_model_without_ears_has_no_points_of_an_audio_tower():
    model = model_of("gemma4")
    assert not any(name.startswith("audio.") for name in model.hook_names())
    with pytest.raises(CorelensError, match="get_audio_features"):
        model.hook_dict["audio.hook_out"]
