"""Weights and head results are those of the map that a module computes: adapters and other linear
modules included."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from corelens.errors import CorelensError
from corelens.metrics.score import score_heads
from corelens.model.hooked import HookedMLLM
from corelens.model.projections import head_results, projection, projection_bias
from corelens.tokens.regions import Box
from helpers.families import FAMILIES, tiny
from helpers.family_runs import SAMPLES, alone

peft = pytest.importorskip("peft")
# peft asks transformers for a name that it is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WEIGHTS = {
    "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_O"),
    "mlp": ("W_gate", "W_in", "W_out", "b_out"),
}


def adapted(family, targets=("o_proj",), **options):
    """A copy of the family's tiny model with an adapter whose weights are random, and the
    wrapper."""
    hf = copy.deepcopy(tiny(family)[0])
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    wrapper = peft.get_peft_model(hf, config).eval()
    if options.get("use_dora"):
        for name, parameter in wrapper.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return HookedMLLM(hf, tiny(family)[1]), wrapper


def weights_of(model, layer=1):
    block = model.blocks[layer]
    return {
        f"{part}.{n}": getattr(getattr(block, part), n).clone()
        for part, names in WEIGHTS.items()
        for n in names
    }


def check_results(model, batch, layer=1, atol=2e-5):
    """An edit that changes nothing moves nothing; what heads add sums up to what attention adds."""
    name = f"blocks.{layer}.attn.hook_result"
    plain = model(batch)
    same = model.run_with_hooks(batch, fwd_hooks=[(name, lambda x, hook: x.clone())])
    size = plain.abs().max().item()
    torch.testing.assert_close(same, plain, atol=atol * size, rtol=0)
    _, cached = model.run_with_cache(batch, names_filter=[name, f"blocks.{layer}.attn.hook_z"])
    attention = model.layout.decoder(model.hf).layers[layer].get_submodule(model.layout.o_proj)
    wanted = attention(cached["z", layer].flatten(-2))
    actual = cached["result", layer].sum(2) + model.blocks[layer].attn.b_O
    torch.testing.assert_close(actual, wanted, atol=atol * wanted.abs().max().item(), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_head_results_of_an_adapted_projection(family):
    model, _ = adapted(family)
    check_results(model, alone(family, 0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava", "internvl"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "bias", "two", "ia3"])
def test_weights_are_those_of_the_merged_model(family, kind):
    options = {
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "bias": {"lora_bias": True},
    }
    if kind == "ia3":
        hf = copy.deepcopy(tiny(family)[0])
        config = peft.IA3Config(
            target_modules=EVERY, feedforward_modules=["down_proj"], init_ia3_weights=False
        )
        model, wrapper = HookedMLLM(hf, tiny(family)[1]), peft.get_peft_model(hf, config).eval()
        for name, parameter in wrapper.named_parameters():
            if "ia3" in name:
                parameter.data.copy_(torch.rand_like(parameter) + 0.5)
    else:
        model, wrapper = adapted(family, EVERY, **options.get(kind, {}))
    if kind == "two":
        wrapper.add_adapter(
            "second", peft.LoraConfig(r=2, target_modules=EVERY, init_lora_weights=False)
        )
        wrapper.base_model.set_adapter(["default", "second"])
    base = weights_of(HookedMLLM(copy.deepcopy(tiny(family)[0])))
    actual = weights_of(model)
    check_results(model, alone(family, 0))
    if kind == "bias":  # which peft cannot merge into layers without one
        return
    wanted = weights_of(HookedMLLM(copy.deepcopy(wrapper).merge_and_unload()))
    for name, weight in wanted.items():
        torch.testing.assert_close(actual[name], weight, atol=1e-5, rtol=1e-5, msg=name)
        if name.split(".")[1].startswith("W_"):
            assert not torch.allclose(actual[name], base[name], atol=1e-3), name


@torch.no_grad()
def test_adapters_that_are_merged_disabled_or_switched():
    """The weight is that of what runs: base and adapter, whichever of both the base module holds
    now."""
    model, wrapper = adapted("qwen2_vl", ["o_proj", "down_proj"])
    batch = alone("qwen2_vl", 0)
    apart, logits = weights_of(model), model(batch)
    base = weights_of(HookedMLLM(copy.deepcopy(tiny("qwen2_vl")[0])))
    wrapper.merge_adapter()
    check_results(model, batch)
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, apart[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(batch), logits, atol=1e-4, rtol=1e-4)
    wrapper.unmerge_adapter()
    with wrapper.disable_adapter():
        check_results(model, batch)
        for name, weight in weights_of(model).items():
            torch.testing.assert_close(weight, base[name], atol=1e-5, rtol=1e-5)
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, apart[name], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_wrapper_itself_can_be_hooked_and_its_scores_know_the_adapter():
    """value_mass reads W_O: with an adapter it is that of the merged model."""
    model, wrapper = adapted("qwen2_vl", EVERY)
    whole = HookedMLLM(wrapper, tiny("qwen2_vl")[1])
    batch = alone("qwen2_vl", 0)
    assert torch.equal(whole(batch), model(batch))
    check_results(whole, batch)
    sample = replace(SAMPLES[0], regions=[Box(0, 0, 40, 40)])
    actual = score_heads(whole, sample, "value_mass")["value_mass"].values
    merged = HookedMLLM(copy.deepcopy(wrapper).merge_and_unload(), tiny("qwen2_vl")[1])
    wanted = score_heads(merged, sample, "value_mass")["value_mass"].values
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(wanted), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_adapted_embeddings_and_unembedding():
    model, wrapper = adapted("qwen2_vl", ["embed_tokens", "lm_head"])
    base = model.hf.get_input_embeddings().base_layer.weight
    merged = HookedMLLM(copy.deepcopy(wrapper).merge_and_unload())
    for name in ("W_E", "W_U"):
        torch.testing.assert_close(
            getattr(model, name), getattr(merged, name), atol=1e-5, rtol=1e-5
        )
    assert not torch.allclose(model.W_E, base, atol=1e-3) and torch.equal(
        model.embed.W_E, model.W_E
    )
    gemma, _ = adapted("gemma3", ["embed_tokens"])  # its embeddings are multiplied by a factor
    with pytest.raises(CorelensError, match="merge"):
        _ = gemma.W_E


@torch.no_grad()
def test_half_precision_below_a_float32_adapter():
    """peft keeps adapters in float32: head results are summed as precisely as the module's own
    output."""
    hf = copy.deepcopy(tiny("llava")[0]).to(torch.bfloat16)
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(hf, config).eval()
    model = HookedMLLM(hf, tiny("llava")[1])
    assert model.blocks[1].attn.W_O.dtype == torch.bfloat16
    check_results(model, alone("llava", 0).to(dtype=torch.bfloat16), atol=0.05)


# --- modules that have no one matrix: an error, never the base weight


class Gated(nn.Module):
    """A projection whose output depends on its input in another way, with the weight of a plain
    one."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.weight, self.bias, self.in_features = (
            linear,
            linear.weight,
            linear.bias,
            32,
        )

    def forward(self, x):
        return self.base_layer(x) * x.sum(-1, keepdim=True).sigmoid()


@torch.no_grad()
def test_what_is_no_linear_map_is_refused():
    model, batch = (
        HookedMLLM(copy.deepcopy(tiny("qwen2_vl")[0]), tiny("qwen2_vl")[1]),
        alone("qwen2_vl", 0),
    )
    attention = model.layout.decoder(model.hf).layers[1].self_attn
    attention.o_proj = Gated(attention.o_proj)
    with pytest.raises(CorelensError, match="no one matrix"):
        _ = model.blocks[1].attn.W_O
    with pytest.raises(CorelensError, match="no one matrix"):
        model.run_with_cache(batch, names_filter="blocks.1.attn.hook_result")


@torch.no_grad()
def test_dropout_of_a_model_in_training_and_adapters_that_differ_by_sample_are_refused():
    model, wrapper = adapted("qwen2_vl", lora_dropout=0.5)
    model.train()
    with pytest.raises(CorelensError, match="eval"):
        model.run_with_cache(alone("qwen2_vl", 0), names_filter="blocks.1.attn.hook_result")
    model.eval()
    wrapper.add_adapter(
        "second", peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    )
    batch = model.prepare(SAMPLES)

    def mixed(module, args, kwargs):
        return args, kwargs | {"adapter_names": ["default", "second"]}

    o_proj = model.layout.decoder(model.hf).layers[1].self_attn.o_proj
    handle = o_proj.register_forward_pre_hook(mixed, with_kwargs=True)
    with pytest.raises(CorelensError, match="one adapter"):
        model.run_with_cache(batch, names_filter="blocks.1.attn.hook_result")
    handle.remove()


@torch.no_grad()
def test_a_plain_projection_is_a_view_and_a_replaced_forward_is_seen():
    linear = nn.Linear(8, 6)
    assert (
        projection(linear).data_ptr() == linear.weight.data_ptr()
        and projection_bias(linear) is linear.bias
    )
    z = torch.randn(2, 3, 4, 2)
    wanted = head_results(linear, z)
    plain = linear.forward
    linear.forward = lambda x: 2 * plain(x)
    torch.testing.assert_close(projection(linear), 2 * linear.weight)
    torch.testing.assert_close(projection_bias(linear), 2 * linear.bias)
    torch.testing.assert_close(head_results(linear, z), 2 * wanted)
