"""The model checks itself: faults that a hook's mere presence brings are caught at the first hooked
run."""

import functools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from corelens import hf as reach
from corelens.errors import CorelensError
from corelens.hooks import exchange
from corelens.interventions.ablation import ablate
from corelens.model import self_check, wiring
from corelens.model.hooked import HookedMLLM
from helpers.family_parts import TEXT, randomise
from helpers.odd_models import masks_by_name, merges_by_ids
from helpers.text_models import text, text_model

Z = "blocks.1.attn.hook_z"


def same(x, hook):
    return x.clone()


@pytest.fixture
def forwards(monkeypatch):
    """How often a model's forward is called."""
    calls = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        calls.append(kwargs.get("logits_to_keep"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return calls


# --- the two models that were wrong in silence


@torch.no_grad()
@pytest.mark.parametrize("build", [merges_by_ids, masks_by_name])
def test_models_that_branch_on_ids_or_names_run_the_same_under_hooks(build):
    hf, tensors = build()
    plain = hf(**tensors, use_cache=False).logits
    pixels = next(name for name in tensors if "pixel_values" in name)
    blind = hf(**tensors | {pixels: torch.zeros_like(tensors[pixels])}, use_cache=False).logits
    assert not torch.allclose(plain, blind, atol=1e-2)  # the picture counts
    model = HookedMLLM(hf)
    for name in ("hook_embed", "blocks.0.hook_resid_pre", Z):
        assert torch.equal(model.run_with_hooks(tensors, fwd_hooks=[(name, same)]), plain), name
    assert model.verify(tensors).ok


def embeds_for_ids(run, begin, caching):
    """The decoder's hook as it was: ids become embeddings, and are dropped."""
    hook = ORIGINAL_HOOK(run, begin, caching)

    def with_embeddings(decoder, args, kwargs):
        hook(decoder, args, kwargs)
        return args, kwargs | {
            "input_ids": None,
            "inputs_embeds": decoder.embed_tokens(kwargs["input_ids"]),
        }

    return with_embeddings


ORIGINAL_HOOK = wiring._on_decoder


def test_a_decoder_that_loses_its_picture_is_caught(monkeypatch):
    hf, tensors = merges_by_ids()
    monkeypatch.setattr(wiring, "_on_decoder", embeds_for_ids)
    with pytest.raises(CorelensError, match=r"logits differ.*'hook_embed'"):
        HookedMLLM(hf).run_with_hooks(tensors, fwd_hooks=[(Z, same)])
    HookedMLLM(hf, check=False).run_with_hooks(tensors, fwd_hooks=[(Z, same)])


def test_an_implementation_of_another_name_is_caught(monkeypatch):
    hf, tensors = masks_by_name()
    AttentionInterface.register("sdpa_by_another_name", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_by_another_name", sdpa_mask)
    monkeypatch.setattr(exchange, "NAME", "sdpa_by_another_name")
    try:
        with pytest.raises(CorelensError, match=r"logits differ.*'blocks\.0\.attn\.hook_z'"):
            HookedMLLM(hf).run_with_hooks(tensors, fwd_hooks=[("blocks.2.attn.hook_z", same)])
        HookedMLLM(hf, check=False).run_with_hooks(tensors, fwd_hooks=[(Z, same)])
    finally:
        reach.forget_attention("sdpa_by_another_name")


def test_the_layer_at_fault_is_named(monkeypatch):
    from corelens.hooks import attention_function

    kernel = attention_function._z_without_pattern

    def faulty(inputs, plan):
        z = kernel(inputs, plan)
        return z + 0.1 if inputs.call.module.layer_idx == 2 else z

    model = text_model()
    monkeypatch.setattr(attention_function, "_unhooked", lambda inputs, run: kernel(inputs, None))
    monkeypatch.setattr(attention_function, "_z_without_pattern", faulty)
    with pytest.raises(CorelensError, match=r"'blocks\.2\.attn\.hook_z'"):
        model.run_with_hooks(text(), fwd_hooks=[("blocks.0.hook_resid_pre", same)])
    monkeypatch.undo()
    # it is checked again
    assert torch.equal(model.run_with_hooks(text(), fwd_hooks=[(Z, same)]), model(text()))


# --- what it costs


def test_two_forwards_at_the_first_hooked_run_and_none_later(forwards):
    model, seen = text_model(), []
    model(text())
    assert forwards == [None]
    model.run_with_hooks(
        text(), fwd_hooks=[(Z, lambda z, hook: seen.append(hook.ctx["positions"]))]
    )
    assert forwards == [None, 1, 1, None]  # the check asks for the last row's logits alone
    assert len(seen) == 1  # the user's hooks are not run by it
    model.run_with_cache(text(1, 5))
    with model.hooks(fwd_hooks=[(Z, same)]):
        model.generate(text(), max_new_tokens=3, min_new_tokens=3)
    assert len(forwards) == 4 + 1 + 3
    unchecked = text_model(check=False)
    unchecked.run_with_hooks(text(), fwd_hooks=[(Z, same)])
    assert len(forwards) == 8 + 1


def test_training_mode_is_left_as_it_was():
    config = LlamaConfig(**TEXT, vocab_size=64, pad_token_id=0, attention_dropout=0.5)
    hf = randomise(LlamaForCausalLM(config)).train()
    hf.model.norm.eval()
    modes = [module.training for module in hf.modules()]
    HookedMLLM(hf).run_with_hooks(text(), fwd_hooks=[(Z, same)])
    assert [module.training for module in hf.modules()] == modes


def test_logits_that_are_not_finite_are_compared_where_they_are():
    hf = text_model().hf
    hf.lm_head.weight.data[3] = float("nan")
    assert HookedMLLM(hf).run_with_hooks(text(), fwd_hooks=[(Z, same)])[..., 3].isnan().all()
    plain = torch.randn(2, 64)
    assert self_check.distance(plain, plain) == 0
    assert self_check.distance(plain.where(plain < 1, torch.inf), plain) == float("inf")


# --- caches


def test_a_cache_under_an_unknown_name_is_an_error(monkeypatch):
    model = text_model()
    monkeypatch.setattr(reach.kv_cache, "CACHE_ARGUMENTS", ("kv",))
    with (
        model.hooks(fwd_hooks=[(Z, same)]),
        pytest.raises(CorelensError, match=r"(cache|past_key_values)=\w*Cache"),
    ):
        model.generate(text())
    model.generate(text())  # without hooks the names are no matter


def test_a_step_that_believes_it_is_the_first_is_an_error(monkeypatch):
    model = text_model()
    monkeypatch.setattr(wiring, "cache_in", lambda arguments: None)
    monkeypatch.setattr(wiring, "unknown_caches", lambda arguments: {})
    with (
        model.hooks(fwd_hooks=[(Z, same)]),
        pytest.raises(CorelensError, match="after 9, and no KV cache"),
    ):
        model.generate(text())
    with model.hooks(fwd_hooks=[(Z, same)]):
        model.generate(text(), use_cache=False)


def test_paged_caches_are_refused_by_name():
    class PagedAttentionCache:
        pass

    model = text_model()
    with pytest.raises(CorelensError, match="paged"):
        model.generate(text(), cache_implementation="paged")
    refused = reach.unknown_caches({"cache": PagedAttentionCache(), "hidden_states": None})
    assert list(refused) == ["cache"] and not reach.unknown_caches(
        {"cache": None, "past_key_values": None}
    )


def test_attention_that_calls_no_interface_has_no_points():
    model = text_model()
    layer = model.hf.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (
        layer.o_proj(layer.q_proj(hidden_states)),
        None,
    )
    with pytest.raises(CorelensError, match=r"'blocks\.1\.attn\.hook_z'[\s\S]*interface"):
        model.run_with_hooks(text(), fwd_hooks=[(Z, same)])
    assert "blocks.2.attn.hook_z" in model.hook_dict and Z not in model.hook_dict
    for name in ("blocks.1.attn.hook_pattern", "blocks.1.attn.head.2.hook_z"):
        with pytest.raises(CorelensError, match="interface"):
            model.run_with_hooks(text(), fwd_hooks=[(name, same)])


def test_a_model_without_a_decoder_says_what_was_looked_for():
    from transformers import ViTConfig, ViTModel

    vit = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(CorelensError, match=r"looked for what get_decoder\(\)"):
        HookedMLLM(vit)


# --- gradients


@pytest.mark.parametrize("kind", ["scale", "ablate", "pattern"])
def test_gradients_under_checkpointing_are_those_without(kind):
    hooks = {
        "scale": [(Z, lambda z, hook: z * 0.5)],
        "ablate": ablate([(1, 2), (2, 0)], "zero"),
        "pattern": [("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.5)],
    }[kind]
    gradients = []
    for checkpointed in (False, True):
        hf = text_model().hf.train()
        if checkpointed:
            getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)()
        model = HookedMLLM(hf)
        if checkpointed:
            with pytest.warns(UserWarning, match="checkpointing is off for this run"):
                logits = model.run_with_hooks(text(), fwd_hooks=hooks)
            assert all(layer.gradient_checkpointing for layer in hf.model.layers)
        else:
            logits = model.run_with_hooks(text(), fwd_hooks=hooks)
        logits[:, -1].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in hf.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
