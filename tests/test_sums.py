"""What each layer adds to the residual stream, of families that multiply it: measured at wrap time,
against PyTorch's own hooks."""

from functools import cache

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import corelens as cl
from corelens.errors import CorelensError
from families import shrink
from families.tensors import tensors_for
from helpers.family_parts import randomise

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}


@cache
def granite():
    config = GraniteConfig(**TEXT, residual_multiplier=0.22, attention_multiplier=0.3)
    model = cl.HookedMLLM(randomise(GraniteForCausalLM(config)))
    ids = torch.arange(5, 17)[None]
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def gemma4():
    hf = shrink.build("gemma4")
    return cl.HookedMLLM(hf), tensors_for("gemma4", hf)[0]


def every_result(name):
    return not name.endswith(("pattern_rows", "hook_logits"))


def test_a_residual_multiplier_is_measured_and_is_part_of_what_is_added():
    model, tensors = granite()
    assert [(b.parts.attn_scale, b.parts.mlp_scale) for b in model.blocks] == [(0.22, 0.22)] * 3
    layer, seen = model.hf.model.layers[1], {}
    handle = layer.self_attn.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
    _, cached = model.run_with_cache(tensors)
    handle.remove()
    torch.testing.assert_close(cached["attn_out", 1], 0.22 * seen["out"])
    torch.testing.assert_close(cached.decompose_resid().sum(0), cached["resid_post", 2])


@torch.no_grad()
def test_an_edit_of_what_is_added_is_that_edit_of_the_stream():
    model, tensors = granite()

    def add(module, args):
        args[0].add_(1.0)

    edit = lambda x, hook: x + 1.0  # noqa: E731
    logits = model.run_with_hooks(tensors, fwd_hooks=[("blocks.1.hook_attn_out", edit)])
    layer = model.hf.model.layers[1]
    handle = layer.post_attention_layernorm.register_forward_pre_hook(add)
    wanted = model.hf(**tensors, use_cache=False).logits
    handle.remove()
    torch.testing.assert_close(logits, wanted)
    same = model.run_with_hooks(tensors, fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: x)])
    assert torch.equal(same, model.hf(**tensors, use_cache=False).logits)


def test_heads_neurons_and_biases_are_what_of_them_is_added():
    model, tensors = granite()
    _, cached = model.run_with_cache(tensors, names_filter=every_result)
    heads = cached.stack_head_results(layer=2)
    torch.testing.assert_close(heads[4:8].sum(0), cached["attn_out", 1], atol=1e-5, rtol=1e-4)
    neurons = cached.get_neuron_results(1).sum(-2)
    torch.testing.assert_close(neurons, cached["mlp_out", 1], atol=1e-5, rtol=1e-4)
    whole = cached.get_full_resid_decomposition(expand_neurons=True).sum(0)
    torch.testing.assert_close(whole, cached["resid_post", 2], atol=1e-5, rtol=1e-4)


def test_a_gradient_reaches_what_is_added():
    model, tensors = granite()
    slopes = []
    with model.hooks(bwd_hooks=[("blocks.1.hook_attn_out", lambda g, hook: slopes.append(g))]):
        model(tensors)[0, -1, 5].backward()
    step = 1e-2 * torch.sign(slopes[0])

    def moved(sign):
        hooks = [("blocks.1.hook_attn_out", lambda x, hook: x + sign * step)]
        return model.run_with_hooks(tensors, fwd_hooks=hooks)[0, -1, 5].item()

    slope = (moved(1) - moved(-1)) / 2
    assert slope == pytest.approx((slopes[0] * step).sum().item(), rel=0.02)


@torch.no_grad()
def test_a_scaled_stream_and_an_input_a_layer_are_counted():
    model, tensors = gemma4()
    parts = [block.parts for block in model.blocks]
    assert {p.extra for p in parts} == {"post_per_layer_input_norm"}
    scales = [float(layer.layer_scalar) for layer in model.layout.decoder(model.hf).layers]
    assert [p.stream_scale for p in parts] == pytest.approx(scales) and scales[0] != 1.0
    _, cached = model.run_with_cache(tensors, names_filter=every_result)
    parts, labels = cached.decompose_resid(return_labels=True)
    torch.testing.assert_close(parts.sum(0), cached["resid_post", 3], atol=1e-4, rtol=1e-4)
    assert labels.count("1_extra") == 1
    middle = cached.decompose_resid(layer=2, mlp_input=True).sum(0)
    torch.testing.assert_close(middle, cached["resid_mid", 2], atol=1e-4, rtol=1e-4)
    stack, labels = cached.stack_head_results(return_labels=True)
    of_layer = stack[[i for i, label in enumerate(labels) if label.startswith("L1H")]].sum(0)
    reaching = scales[1] * scales[2] * scales[3]
    torch.testing.assert_close(of_layer, reaching * cached["attn_out", 1], atol=1e-4, rtol=1e-4)
    with pytest.raises(CorelensError, match="decompose_resid adds up"):
        cached.get_full_resid_decomposition(expand_neurons=False)
