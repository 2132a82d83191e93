"""Models without a layout: they wrap and hook all the same, soft caps, sinks and windows
honoured."""

import pytest
import torch

from corelens.errors import CorelensError
from corelens.model.hooked import HookedMLLM
from helpers.family_parts import randomise
from helpers.other_models import soft_capped, with_a_picture, with_sinks

MODELS = {"softcap": soft_capped, "sinks": with_sinks, "picture": with_a_picture}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    hf = randomise(MODELS[request.param]())
    hf.set_attn_implementation("eager")
    ids = torch.randint(1, 60, (2, 28), generator=torch.Generator().manual_seed(0))
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tensors["attention_mask"][1, :3] = 0
    if request.param == "picture":
        ids[:, 4:20] = 63
        tensors["pixel_values"] = torch.randn(
            2, 3, 56, 56, generator=torch.Generator().manual_seed(1)
        )
    return HookedMLLM(hf), tensors


@torch.no_grad()
def test_patterns_are_those_of_eager_attention(case):
    model, tensors = case
    inputs = model.inputs(**tensors)
    out = model.hf(**tensors, output_attentions=True, use_cache=False)
    assert torch.equal(model(inputs), out.logits)
    names = [f"blocks.{n}.attn.hook_pattern" for n in range(4)]
    logits, cached = model.run_with_cache(inputs, names_filter=names)
    real = tensors["attention_mask"].bool()
    torch.testing.assert_close(logits[real], out.logits[real], atol=1e-5, rtol=1e-5)
    for name, wanted in zip(names, out.attentions, strict=True):
        keep = real[:, None, :, None].expand_as(cached[name])
        torch.testing.assert_close(cached[name][keep], wanted[keep], atol=3e-6, rtol=0)
    with model.pattern_rows("last"):
        rows = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern_rows")[1]
    torch.testing.assert_close(
        rows["pattern_rows", 1], cached["pattern", 1][:, :, -1:], atol=1e-6, rtol=0
    )
    z = model.run_with_hooks(
        inputs, fwd_hooks=[("blocks.1.attn.head.2.hook_z", lambda x, hook: x.clone())]
    )
    torch.testing.assert_close(z[real], out.logits[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_analyses_and_generation(case):
    model, tensors = case
    inputs = model.inputs(**tensors)
    _, cached = model.run_with_cache(inputs)
    torch.testing.assert_close(
        cached.decompose_resid().sum(0), cached["resid_post", 3], atol=1e-5, rtol=1e-5
    )
    values = cached.logit_lens(positions=None).values[-1]
    real = tensors["attention_mask"].bool()
    torch.testing.assert_close(values[real], model(inputs)[real], atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted = model.hf.generate(**tensors, **options)[:, 28:]
    with model.hooks(
        fwd_hooks=[(f"blocks.{n}.attn.hook_pattern", lambda x, hook: x.clone()) for n in range(4)]
    ):
        assert torch.equal(model.generate(inputs, **options), wanted)


def test_regions_need_a_layout(case):
    model, tensors = case
    token_map = model.inputs(**tensors).token_maps[0]
    with pytest.raises(CorelensError, match=r"Sample|layout"):
        _ = token_map.regions
    if "vision.hook_out" not in model.hook_dict:
        with pytest.raises(CorelensError, match="get_image_features"):
            model.run_with_cache(model.inputs(**tensors), names_filter="vision.hook_out")
