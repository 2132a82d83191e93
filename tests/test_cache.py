"""TransformerLens's analyses on a cache from here, each against a direct computation, on image
positions too."""

import pytest
import torch
from transformer_lens import ActivationCache as LensCache
from transformer_lens import patching

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.bound import bind
from corelens.model.cache import ActivationCache
from helpers.families import FAMILIES
from helpers.family_runs import SAMPLES, alone, batch_of, hooked, reference
from helpers.samples import picture

every_family = pytest.mark.parametrize("family", FAMILIES)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@every_family
@torch.no_grad()
def test_weight_views_make_the_activations(family):
    model, batch = hooked(family), batch_of(family)
    _, cached = model.run_with_cache(batch)
    offset, c = model.layout.norm_weight_offset, model.cfg
    for layer, block in enumerate(model.blocks):
        x = cached[f"blocks.{layer}.ln1.hook_normalized"] * block.ln1.w
        for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads)):
            weight, bias = (
                getattr(block.attn, f"W_{name.upper()}"),
                getattr(block.attn, f"b_{name.upper()}"),
            )
            assert weight.shape == (heads, c.d_model, c.d_head) and bias.shape == (heads, c.d_head)
            close(torch.einsum("bpm,hmd->bphd", x, weight) + bias, cached[name, layer])
        assert block.attn.W_O.shape == (c.n_heads, c.d_head, c.d_model)
        o_proj = model.layout.decoder(model.hf).layers[layer].get_submodule(model.layout.o_proj)
        assert (
            block.attn.W_O.untyped_storage().data_ptr()
            == o_proj.weight.untyped_storage().data_ptr()
        )
        if f"blocks.{layer}.mlp.hook_post" in model.hook_dict:
            x = cached[f"blocks.{layer}.ln2.hook_normalized"] * block.ln2.w
            close(x @ block.mlp.W_gate, cached["pre", layer])
            out = cached["post", layer] @ block.mlp.W_out + block.mlp.b_out
            close(
                out if block.mlp_post_norm is None else block.mlp_post_norm(out),
                cached["mlp_out", layer],
            )
        else:
            with pytest.raises(CorelensError, match="experts"):
                _ = block.mlp.W_out
    assert model.W_Q.shape == (c.n_layers, c.n_heads, c.d_model, c.d_head)
    assert model.W_E.shape == (c.d_vocab, c.d_model) and model.W_U.shape == (c.d_model, c.d_vocab)
    close(
        cached["ln_final.hook_normalized"]
        * (model.layout.decoder(model.hf).norm.weight + offset)
        @ model.W_U
        + model.b_U,
        reference(family),
    )


@every_family
@torch.no_grad()
def test_the_residual_stream_taken_apart(family):
    model, batch = hooked(family), batch_of(family)
    _, cached = model.run_with_cache(batch)
    assert isinstance(cached, LensCache)
    last = model.cfg.n_layers
    for layer in range(last + 1):
        whole = cached["resid_pre", layer] if layer < last else cached["resid_post", last - 1]
        parts, labels = cached.decompose_resid(layer, return_labels=True)
        assert len(parts) == len(labels) == 1 + 2 * layer + min(layer, model.cfg.n_deepstack)
        close(parts.sum(0), whole)
        parts, labels = cached.get_full_resid_decomposition(
            layer, expand_neurons=False, return_labels=True
        )
        assert len(parts) == len(labels)
        close(parts.sum(0), whole)
    parts, labels = cached.decompose_resid(apply_ln=True, pos_slice=-1, return_labels=True)
    close(parts.sum(0), cached["ln_final.hook_normalized"][:, -1])
    assert cached.decompose_resid(2, mode="attn", incl_embeds=False).shape[0] == 2
    heads, labels = cached.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels[5] == "L1H1" and len(labels) == last * model.cfg.n_heads + 1
    close(heads.sum(0), cached["resid_post", last - 1])
    for layer in range(last):
        block = model.blocks[layer]
        of_layer = heads[layer * model.cfg.n_heads : (layer + 1) * model.cfg.n_heads].sum(0)
        bias = block.attn.b_O if block.attn_post_norm is None else 0
        close(of_layer + bias, cached["attn_out", layer])


@every_family
@torch.no_grad()
def test_neurons(family):
    model, batch = hooked(family), alone(family, 0)
    _, cached = model.run_with_cache(batch)
    if any("mlp.hook_post" in name for name in model.hook_dict.absent):
        with pytest.raises(CorelensError, match="expand_neurons=False"):
            cached.get_full_resid_decomposition()
        return
    parts, labels = cached.get_full_resid_decomposition(return_labels=True, pos_slice=slice(0, 6))
    close(parts.sum(0), cached["resid_post", 3][:, :6])
    assert labels[4 * 4] == "L0N0"
    direction = torch.randn(model.cfg.d_model)
    for apply_ln in (False, True):
        whole = (
            cached.get_full_resid_decomposition(apply_ln=apply_ln, pos_slice=slice(0, 6))
            @ direction
        )
        projected = cached.get_full_resid_decomposition(
            apply_ln=apply_ln, pos_slice=slice(0, 6), project_output_onto=direction
        )
        close(projected, whole)


@every_family
@torch.no_grad()
def test_logit_attributions_sum_to_the_logit(family):
    model, batch = hooked(family), batch_of(family)
    logits, cached = model.run_with_cache(batch)
    parts = cached.decompose_resid()
    right, wrong = model.to_single_token("7"), torch.tensor(5)
    close(cached.logit_attrs(parts, right).sum(0), logits[..., right])
    close(
        cached.logit_attrs(parts, "7", incorrect_tokens=wrong).sum(0),
        logits[..., right] - logits[..., 5],
    )
    each = torch.tensor([right, 5])
    wanted = torch.stack([logits[0, :, right], logits[1, :, 5]])
    # at every position, image positions among them
    close(cached.logit_attrs(parts, each).sum(0), wanted)


@every_family
@torch.no_grad()
def test_the_logit_lens(family):
    model, batch = hooked(family), batch_of(family)
    logits, cached = model.run_with_cache(batch)
    norm, head = model.layout.decoder(model.hf).norm, model.hf.get_output_embeddings()
    lens = cached.accumulated_resid(apply_ln=True)
    wanted = torch.stack(
        [norm(cached["resid_pre", n]) for n in range(4)] + [norm(cached["resid_post", 3])]
    )
    close(lens, wanted)
    close(lens[-1] @ model.W_U + model.b_U, logits)
    close(cached.logit_lens(positions=None).values, head(wanted))
    close(model.unembed(wanted), head(wanted))


@torch.no_grad()
def test_a_cache_without_a_batch_axis_and_slices_of_one(tmp_path):
    model, batch = hooked("qwen3_vl"), alone("qwen3_vl", 0)
    _, with_batch = model.run_with_cache(batch)
    _, without = model.run_with_cache(batch, remove_batch_dim=True)
    close(without.decompose_resid(), with_batch.decompose_resid()[:, 0])
    close(without["blocks.1.attn.head.2.hook_z"], with_batch["blocks.1.attn.head.2.hook_z"][0])
    both = batch_of("qwen3_vl")
    _, cached = model.run_with_cache(both)
    assert isinstance(cached.apply_slice_to_batch_dim(0), ActivationCache)
    with pytest.raises(CorelensError, match="one sample"):
        model.run_with_cache(both, remove_batch_dim=True)
    names = ["blocks.1.attn.hook_z", "blocks.1.attn.head.2.hook_z", "blocks.1.attn.kv_head.1.hook_v",
             "blocks.1.attn.head.2.hook_pattern", "blocks.1.hook_resid_pre"]  # fmt: skip
    _, sliced = model.run_with_cache(both, names_filter=names, pos_slice=slice(2, 7))
    _, full = model.run_with_cache(both, names_filter=names)
    for name in names:
        assert torch.equal(sliced[name], full[name][:, 2:7]), name


@torch.no_grad()
def test_per_head_names_read_slices_of_what_was_kept():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    names = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_k", "blocks.1.attn.hook_pattern"]
    _, cached = model.run_with_cache(batch, names_filter=names)
    assert torch.equal(cached["blocks.1.attn.head.3.hook_z"], cached["z", 1][:, :, 3])
    assert torch.equal(cached["blocks.1.attn.head.3.hook_k"], cached["k", 1][:, :, 1])
    assert torch.equal(cached["blocks.1.attn.kv_head.1.hook_k"], cached["k", 1][:, :, 1])
    assert torch.equal(cached["blocks.1.attn.head.3.hook_pattern"], cached["pattern", 1][:, 3])
    assert "blocks.1.attn.head.3.hook_z" in cached and "blocks.0.attn.head.3.hook_z" not in cached
    with pytest.raises(CorelensError, match="0 to 3"):
        _ = cached["blocks.1.attn.head.4.hook_z"]
    with pytest.raises(CorelensError, match="does not hold"):
        _ = cached["blocks.0.attn.head.1.hook_z"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caching_over_generate_appends_steps(family, kind):
    """What was kept while tokens were generated is what one run on prompt and tokens keeps."""
    model, batch = hooked(family), alone(family, 0)
    names = ["hook_embed", "blocks.1.attn.hook_z", "blocks.1.attn.head.2.hook_q", "blocks.1.attn.kv_head.1.hook_v",
             "blocks.2.attn.hook_pattern", "blocks.0.attn.hook_attn_scores", "blocks.3.hook_resid_post"]  # fmt: skip
    held, forward_hooks, _ = model.get_caching_hooks(names)
    with model.hooks(forward_hooks):
        ids = model.generate(
            batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=kind
        )
    longer = dict(batch.tensors)
    longer["input_ids"] = torch.cat([longer["input_ids"], ids[:, :-1]], 1)
    for key, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if key in longer:
            longer[key] = torch.cat([longer[key], torch.full((1, 4), value)], 1)
    _, wanted = model.run_with_cache(
        Inputs(longer, batch.token_maps, batch.samples), names_filter=names
    )
    for name in names:
        close(held[name], wanted[name])
    with model.hooks(forward_hooks):
        model(batch)
    assert held["hook_embed"].shape[1] == batch.length  # a new run begins anew


@torch.no_grad()
def test_a_cache_on_disk(tmp_path):
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    _, memory = model.run_with_cache(batch)
    logits, disk = model.run_with_cache(batch, to_disk=tmp_path / "run")
    assert torch.equal(logits, reference("qwen3_vl"))
    again = ActivationCache.load(tmp_path / "run", model)
    assert set(disk) == set(again) == set(memory) and len(disk) == len(memory)
    for name in memory:
        assert torch.equal(disk[name], memory[name]) and torch.equal(again[name], memory[name])
    close(again.decompose_resid().sum(0), memory["resid_post", 3])
    close(again.stack_head_results().sum(0), memory.stack_head_results().sum(0))
    close(again["blocks.1.attn.head.2.hook_z"], memory["z", 1][:, :, 2])
    with pytest.raises(CorelensError, match="tensors already"):
        model.run_with_cache(batch, to_disk=tmp_path / "run")
    assert not list(tmp_path.glob("**/*.pkl"))


@torch.no_grad()
def test_the_first_point_that_is_not_finite_is_named():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    with model.check_finite():
        assert torch.equal(model(batch), reference("qwen3_vl"))

    def spoil(x, hook):
        x[0, 3, 1] = torch.nan

    with (
        pytest.raises(CorelensError, match=r"blocks\.2\.attn\.hook_z"),
        model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", spoil)]),
        model.check_finite(),
    ):
        model(batch)
    assert not any(point.active for point in model.hook_points())


# --- bound models


@torch.no_grad()
@pytest.mark.parametrize("encoded", [False, True])
def test_transformer_lens_patches_with_the_picture(encoded):
    """Each entry is what an explicit loop over the model itself gives."""
    model, clean = hooked("qwen3_vl"), alone("qwen3_vl", 0)
    corrupted = model.prepare(Sample(images=[picture(7, (96, 64))], question=SAMPLES[0].question))
    corrupted = model.encode(corrupted) if encoded else corrupted
    _, cache = model.run_with_cache(clean)
    bound = bind(model, corrupted)

    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 6]

    def patched(name, where):
        def put(x, hook):
            x[where] = cache[name][where]

        return metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, put)]))

    heads = patching.get_act_patch_attn_head_out_all_pos(bound, bound.tokens, cache, metric)
    wanted = [
        [patched(f"blocks.{n}.attn.hook_z", (slice(None), slice(None), h)) for h in range(4)]
        for n in range(4)
    ]
    close(heads, torch.tensor(wanted))
    values = patching.get_act_patch_attn_head_v_all_pos(bound, bound.tokens, cache, metric)
    wanted = [
        [patched(f"blocks.{n}.attn.hook_v", (slice(None), slice(None), h)) for h in range(2)]
        for n in range(4)
    ]
    close(values, torch.tensor(wanted))
    if encoded:
        stream = patching.get_act_patch_resid_pre(bound, bound.tokens, cache, metric)
        assert stream.shape == (4, corrupted.length)
        first, last = int(corrupted.token_maps[0].visual[0]), corrupted.length - 1
        for layer, position in ((0, first), (2, last), (3, 1)):
            close(
                stream[layer, position],
                patched(f"blocks.{layer}.hook_resid_pre", (slice(None), position)),
            )
        assert (stream[0] - metric(model(corrupted))).abs().max() > 1e-4  # the picture is seen
    with pytest.raises(CorelensError, match="not the bound ones"):
        bound.run_with_hooks(torch.zeros_like(bound.tokens))
    with pytest.raises(CorelensError, match="image"):
        model.run_with_hooks({"input_ids": bound.tokens})
    assert bound.W_U.shape == model.W_U.shape and torch.equal(bound(bound.tokens), model(corrupted))
