"""What large models bring: weights spread over CPU and disk, half precision, compiled and quantised
modules."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerate import disk_offload
from torch import nn

from corelens.errors import CorelensError
from corelens.evaluation.evaluate import evaluate
from corelens.layouts.base import Layout
from corelens.metrics.score import score_heads
from corelens.model.hooked import HookedMLLM
from corelens.model.projections import head_results
from corelens.tokens.regions import Box
from helpers.families import tiny
from helpers.family_runs import SAMPLES, alone, batch_of, hooked, reference

EVERYTHING = [
    "hook_embed",
    "vision.hook_out",
    "hook_logits",
    "blocks.0.hook_deepstack",
    "ln_final.hook_scale",
]
for n in range(4):
    EVERYTHING += [
        f"blocks.{n}.attn.{p}"
        for p in ("hook_q", "hook_rot_k", "hook_v", "hook_pattern", "hook_result")
    ]
    EVERYTHING += [
        f"blocks.{n}.{p}"
        for p in ("ln1.hook_scale", "ln2.hook_normalized", "mlp.hook_post", "hook_resid_post")
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    hf, processor = tiny("qwen3_vl")
    hf.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@torch.no_grad()
def test_a_model_split_over_cpu_and_disk(folder, tmp_path):
    """Half of the decoder lies on disk: reads, writes, weights and generation are those of the
    whole model."""
    whole, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    places = {"model.visual": "cpu", "lm_head": "cpu", "model.language_model.embed_tokens": "cpu"}
    places |= {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu"}
    places |= {f"model.language_model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}
    model = HookedMLLM.from_pretrained(
        folder, dtype="float32", device_map=places, offload_folder=tmp_path
    )
    assert next(model.layout.decoder(model.hf).layers[3].parameters()).device.type == "meta"
    assert torch.equal(model(batch), reference("qwen3_vl"))
    _, cached = model.run_with_cache(batch, names_filter=EVERYTHING)
    _, wanted = whole.run_with_cache(batch, names_filter=EVERYTHING)
    for name in EVERYTHING:
        assert cached[name].device.type == "cpu"
        torch.testing.assert_close(cached[name], wanted[name], atol=1e-6, rtol=1e-6)
    for name in (
        "blocks.3.attn.hook_result",
        "blocks.3.ln1.hook_scale",
        "blocks.2.attn.head.1.hook_z",
    ):
        hooks = [(name, lambda x, hook: x * 1.5)]
        actual, plain = (
            model.run_with_hooks(batch, fwd_hooks=hooks),
            whole.run_with_hooks(batch, fwd_hooks=hooks),
        )
        torch.testing.assert_close(actual, plain, atol=1e-5, rtol=1e-5)
    for name in ("W_Q", "W_O", "b_O"):
        assert torch.equal(getattr(model.blocks[3].attn, name), getattr(whole.blocks[3].attn, name))
    assert torch.equal(model.W_out, whole.W_out)
    _, cached = model.run_with_cache(batch)
    torch.testing.assert_close(
        cached.stack_head_results().sum(0),
        sum(cached["attn_out", n] for n in range(4)),
        atol=1e-5,
        rtol=1e-5,
    )
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with model.hooks(fwd_hooks=[("blocks.3.attn.hook_v", lambda x, hook: x * 0.5)]):
        actual = model.generate(batch, **options)
    with whole.hooks(fwd_hooks=[("blocks.3.attn.hook_v", lambda x, hook: x * 0.5)]):
        assert torch.equal(actual, whole.generate(batch, **options))


@torch.no_grad()
@pytest.mark.parametrize("where", ["embedding", "everything"])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava_onevision"])
def test_scores_and_answers_of_a_model_on_disk(family, where, tmp_path):
    """The embedding on disk, or all of it: the device is the one that computes; weights and their
    hash are the same."""
    hf, processor = copy.deepcopy(tiny(family)[0]), tiny(family)[1]
    if where == "everything":
        disk_offload(hf, tmp_path, execution_device=torch.device("cpu"))
    else:
        disk_offload(hf.get_input_embeddings(), tmp_path, execution_device=torch.device("cpu"))
    model, whole = HookedMLLM(hf, processor), hooked(family)
    assert hf.get_input_embeddings().weight.device.type == "meta"
    assert (
        model.device == model.cfg.device == torch.device("cpu") and model.cfg.dtype == torch.float32
    )
    sample = replace(SAMPLES[0], regions=[Box(0, 0, 40, 40)], id="0")
    assert torch.equal(
        model.prepare(sample).tensors["input_ids"], whole.prepare(sample).tensors["input_ids"]
    )
    actual, wanted = (score_heads(m, [sample], ("ram", "value_mass")) for m in (model, whole))
    for name in ("ram", "value_mass"):
        assert (actual[name].values == wanted[name].values).all()
        assert actual[name].meta["weight_hash"] == wanted[name].meta["weight_hash"]
    theirs, ours = evaluate(whole, [sample]), evaluate(model, [sample])
    assert ours.answer_logprob == theirs.answer_logprob and torch.equal(model.W_E, whole.W_E)
    assert model.layout.norm_weight_offset == whole.layout.norm_weight_offset
    residual = model(model.prepare(sample), stop_at_layer=2)
    assert torch.equal(residual, whole(whole.prepare(sample), stop_at_layer=2))


@torch.no_grad()
def test_the_norms_of_a_family_without_a_layout_are_read_from_disk(tmp_path):
    """Whether a norm multiplies by its weight or by 1 + weight is measured on the first layer."""
    hf = copy.deepcopy(tiny("gemma3")[0])
    assert Layout().fitted(hf).norm_weight_offset == 1.0
    disk_offload(hf, tmp_path, execution_device=torch.device("cpu"))
    assert Layout().fitted(hf).norm_weight_offset == 1.0


@torch.no_grad()
def test_adapters_of_a_model_on_disk(tmp_path):
    peft = pytest.importorskip("peft")
    hf = copy.deepcopy(tiny("qwen2_vl")[0])
    for kind, dora in (("lora", False), ("dora", True)):
        config = peft.LoraConfig(
            r=4, target_modules=["o_proj"], init_lora_weights=False, use_dora=dora
        )
        adapted = peft.inject_adapter_in_model(config, copy.deepcopy(hf)).eval()
        whole = HookedMLLM(copy.deepcopy(adapted), tiny("qwen2_vl")[1])
        disk_offload(adapted, tmp_path / kind, execution_device=torch.device("cpu"))
        model = HookedMLLM(adapted, tiny("qwen2_vl")[1])
        try:
            weight = model.blocks[1].attn.W_O
        except (CorelensError, NotImplementedError, RuntimeError):
            # which reads its own weights where accelerate has not loaded them
            assert kind == "dora"
            continue
        torch.testing.assert_close(weight, whole.blocks[1].attn.W_O, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_device_map_auto(folder):
    model = HookedMLLM.from_pretrained(folder, dtype="float32", device_map="auto")
    batch = model.prepare(SAMPLES)
    assert torch.equal(model(batch).cpu(), reference("qwen3_vl"))
    _, cached = model.run_with_cache(batch, device="cpu")
    assert all(x.device.type == "cpu" for x in cached.values())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llava"])
def test_half_precision(family, dtype):
    model = HookedMLLM(copy.deepcopy(tiny(family)[0]).to(dtype), tiny(family)[1])
    batch = batch_of(family).to(dtype=dtype)
    plain = model.hf(**batch.tensors, use_cache=False).logits
    assert torch.equal(model(batch), plain) and model.cfg.dtype == dtype
    names = [f"blocks.1.attn.{n}" for n in ("hook_q", "hook_rot_k", "hook_z", "hook_result")]
    names += ["blocks.1.ln1.hook_normalized", "blocks.1.mlp.hook_post", "vision.hook_out"]
    wide = [
        f"blocks.1.{n}"
        for n in (
            "attn.hook_pattern",
            "attn.hook_pattern_rows",
            "attn.hook_attn_scores",
            "ln1.hook_scale",
        )
    ]
    _, cached = model.run_with_cache(batch, names_filter=names)
    assert {x.dtype for x in cached.values()} == {dtype}
    logits, cached = model.run_with_cache(batch, names_filter=wide)
    assert {x.dtype for x in cached.values()} == {torch.float32}
    assert (logits - plain).abs().max() < 0.1 * plain.abs().max()
    for name in names + wide:

        def identity(x, hook):
            return x.clone()

        edited = model.run_with_hooks(batch, fwd_hooks=[(name, identity)])
        assert edited.dtype == dtype and (edited - plain).abs().max() < 0.1 * plain.abs().max(), (
            name
        )
    ids = model.generate(batch, max_new_tokens=2, min_new_tokens=2)
    assert ids.shape == (2, 2)


@torch.no_grad()
def test_a_compiled_model_runs_without_hooks_and_with():
    hf, processor = tiny("llava")
    hf = copy.deepcopy(hf)
    model, batch = HookedMLLM(hf, processor), alone("llava", 0)
    plain = model(batch)
    for layer in model.layout.decoder(hf).layers:
        layer.compile(backend="eager")
    torch.testing.assert_close(model(batch), plain, atol=1e-5, rtol=1e-5)
    hooked_run = model.run_with_hooks(
        batch, fwd_hooks=[("blocks.1.attn.head.2.hook_z", lambda z, hook: z * 0)]
    )
    wanted = hooked("llava").run_with_hooks(
        batch, fwd_hooks=[("blocks.1.attn.head.2.hook_z", lambda z, hook: z * 0)]
    )
    torch.testing.assert_close(hooked_run, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(batch), plain, atol=1e-5, rtol=1e-5)


class Packed(nn.Module):
    """A projection whose weight is no matrix of numbers, as quantised ones are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.inner = [linear]
        self.weight = nn.Parameter(
            linear.weight.detach().to(torch.int8).flatten(), requires_grad=False
        )
        self.bias = linear.bias

    def forward(self, x):
        return self.inner[0](x)


@torch.no_grad()
def test_results_of_a_quantised_projection_and_its_weights_refused():
    hf = copy.deepcopy(tiny("qwen2_vl")[0])
    model, batch = HookedMLLM(hf, tiny("qwen2_vl")[1]), alone("qwen2_vl", 0)
    _, wanted = model.run_with_cache(batch, names_filter="blocks.1.attn.hook_result")
    attention = model.layout.decoder(hf).layers[1].self_attn
    attention.o_proj = Packed(attention.o_proj)
    _, cached = model.run_with_cache(batch, names_filter="blocks.1.attn.hook_result")
    torch.testing.assert_close(cached["result", 1], wanted["result", 1], atol=1e-6, rtol=1e-5)
    with pytest.raises(CorelensError, match="quantisation"):
        _ = model.blocks[1].attn.W_O
    linear = nn.Linear(8, 8)
    z = torch.randn(3, 2, 4)
    torch.testing.assert_close(head_results(Packed(linear), z), head_results(linear, z))


def test_split_models_move_back(tmp_path):
    """accelerate's own hooks are still there after a hooked run that raised."""
    hf = copy.deepcopy(tiny("qwen2_vl")[0])
    disk_offload(hf, tmp_path, execution_device=torch.device("cpu"))
    model, batch = HookedMLLM(hf, tiny("qwen2_vl")[1]), alone("qwen2_vl", 0)
    plain = model(batch)

    def explode(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.2.attn.hook_pattern", explode)])
    assert torch.equal(model(batch), plain)
