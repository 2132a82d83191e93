"""What a call is given: misspelt keywords, stop_at_layer, losses, padding on the wrong side."""

import copy

import pytest
import torch

from corelens.errors import CorelensError
from corelens.model.batch import arguments_of
from corelens.model.hooked import HookedMLLM
from helpers.families import FAMILIES, tiny
from helpers.family_runs import SAMPLES, alone, batch_of, hooked

over_families = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
@over_families
def test_a_keyword_that_nothing_reads_is_refused_with_the_nearest(family):
    model, batch = hooked(family), alone(family, 0)
    hooks = [("blocks.1.attn.hook_z", lambda z, hook: z * 0)]
    calls = {
        "fwd_hooks": lambda: model.run_with_hooks(batch, fwd_hook=hooks),
        "names_filter": lambda: model.run_with_cache(batch, name_filter="blocks.1.attn.hook_z"),
        "logits_to_keep": lambda: model(batch, logits_to_kepp=1),
        "stop_at_layer": lambda: model(batch, stop_at_layr=1),
        "attention_mask": lambda: model(batch, attention_masc=torch.ones(1, 3)),
        "pixel_values": lambda: model({**batch.tensors, "pixel_valuse": torch.ones(1)}),
        "max_new_tokens": lambda: model.generate(batch, max_new_token=2),
        "do_sample": lambda: model.generate(batch, do_sampel=False),
    }
    for near, call in calls.items():
        with pytest.raises(CorelensError, match=near):
            call()
    with pytest.raises(CorelensError, match="pixel_values"):
        model.inputs(**batch.tensors, pixel_valuse=torch.ones(1))
    for keyword, where in {
        "prepend_bos": "template",
        "past_kv_cache": "generate",
        "tokens": "bind",
    }.items():
        with pytest.raises(CorelensError, match=where):
            model(batch, **{keyword: None})
    assert not any(point.active for point in model.hook_points())


@torch.no_grad()
@over_families
def test_what_the_processor_makes_and_the_model_takes_is_accepted(family):
    """As keywords, as a dict and as Inputs: the same run; options of transformers pass through."""
    model, batch = hooked(family), alone(family, 0)
    plain = model(batch)
    assert torch.equal(model(**batch.tensors), plain) and torch.equal(
        model(dict(batch.tensors)), plain
    )
    assert torch.equal(model(batch, output_hidden_states=True), plain)
    encoded = model.encode(batch)
    torch.testing.assert_close(model(**encoded.tensors), plain, atol=1e-5, rtol=1e-5)
    assert set(batch.tensors) | set(model.processor.model_input_names) <= arguments_of(model)
    ids = model.generate(batch, max_new_tokens=2, do_sample=False, return_dict_in_generate=False)
    assert ids.shape[1] <= 2


@torch.no_grad()
@over_families
def test_stop_at_layer(family):
    """What enters the layer, after edits and DeepStack; later layers are not run, and nothing stays
    behind."""
    model, batch = hooked(family), batch_of(family)
    names = [f"blocks.{n}.hook_resid_pre" for n in range(4)]
    logits, cached = model.run_with_cache(batch, names_filter=[*names, "ln_final.hook_scale"])
    for layer in (0, 1, 3):
        assert torch.equal(model(batch, stop_at_layer=layer), cached[names[layer]])
        assert torch.equal(model(batch, stop_at_layer=layer - 4), cached[names[layer]])
    last = model(batch, stop_at_layer=4)
    torch.testing.assert_close(model.unembed(model.ln_final(last)), logits, atol=1e-4, rtol=1e-4)
    residual, part = model.run_with_cache(batch, stop_at_layer=2, return_type=None)
    assert torch.equal(residual, cached[names[2]])
    assert (
        "blocks.1.hook_resid_post" in part
        and "blocks.2.hook_resid_pre" not in part
        and "hook_logits" not in part
    )
    halved = [("blocks.1.hook_resid_post", lambda x, hook: x * 0.5)]
    _, wanted = model.run_with_cache(batch, names_filter=names[2])
    with model.hooks(fwd_hooks=halved):
        _, wanted = model.run_with_cache(batch, names_filter=names[2])
        assert torch.equal(model(batch, stop_at_layer=2), wanted[names[2]])
    assert torch.equal(model(batch), logits)
    for layer in (5, -5):
        with pytest.raises(CorelensError, match="-4 to 4"):
            model(batch, stop_at_layer=layer)
    with pytest.raises(CorelensError, match="leave one"):
        model(batch, stop_at_layer=1, return_type="loss")


def test_gradients_flow_through_a_stopped_run():
    model, batch = HookedMLLM(copy.deepcopy(tiny("llava")[0]), tiny("llava")[1]), alone("llava", 0)
    model(batch, stop_at_layer=2).sum().backward()
    layers = model.layout.decoder(model.hf).layers
    assert (
        layers[1].self_attn.o_proj.weight.grad is not None
        and layers[2].self_attn.o_proj.weight.grad is None
    )


@torch.no_grad()
@over_families
def test_loss_is_the_cross_entropy_of_words(family):
    """By hand, and as transformers computes it of labels without padding and pictures."""
    model, batch = hooked(family), batch_of(family)
    logits, loss = model(batch, return_type="both")
    each = model(batch, return_type="loss", loss_per_token=True)
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"].bool()
    pictures = torch.isin(ids, torch.tensor(model.layout.placeholders(model.hf.config)))
    targets = ids.masked_fill(pictures | ~mask, -100)
    targets[:, 1:].masked_fill_(~mask[:, :-1], -100)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="none"
    ).view_as(each)
    torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        loss, wanted.sum() / (targets[:, 1:] != -100).sum(), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(model(batch, return_type="loss"), loss)
    assert torch.equal(model.loss_fn(logits, ids, mask), loss)
    for options in ({"return_type": "loss", "logits_to_keep": 1}, {"loss_per_token": True}):
        with pytest.raises(CorelensError):
            model(batch, **options)


@torch.no_grad()
@over_families
def test_generate_after_padding_is_refused(family):
    model = hooked(family)
    right = batch_of(family, "right")
    if bool(right.tensors["attention_mask"].all()):
        pytest.skip("both samples are of one length")
    with pytest.raises(CorelensError, match="padding_side='left'"):
        model.generate(right, max_new_tokens=2)
    with pytest.raises(CorelensError, match="padding_side='left'"):
        model.generate(right.tensors, max_new_tokens=2)
    assert model.generate(model.prepare(SAMPLES), max_new_tokens=1).shape == (2, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava_onevision"])
def test_the_shape_says_dtype_and_device_of_now(family):
    """After model.hf.to(...), which the hooked model does not see."""
    model = HookedMLLM(copy.deepcopy(tiny(family)[0]), tiny(family)[1])
    assert model.cfg.dtype == torch.float32 and model.cfg.device == torch.device("cpu")
    model.hf.to(torch.bfloat16)
    assert model.cfg.dtype == torch.bfloat16 and "bfloat16" in repr(model)
    model.hf.to(torch.float64)
    assert model.cfg.dtype == torch.float64
    assert model.hf.to("meta") is not None and model.device.type == "meta"
