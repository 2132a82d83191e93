"""Families × properties: every hook point of every family against the wrapped model itself."""

import pytest
import torch
from einops import rearrange

from corelens.inputs.prepare import Inputs
from helpers.families import FAMILIES, rounding
from helpers.family_runs import SAMPLES, alone, batch_of, hooked, real, reference

pytestmark = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def test_unhooked_it_is_the_wrapped_model_bit_for_bit(family):
    model, batch = hooked(family), batch_of(family)
    assert torch.equal(model(batch), reference(family))


@torch.no_grad()
def test_reading_changes_nothing(family):
    model, batch = hooked(family), batch_of(family)
    rows = [
        f"blocks.{layer}.attn.{name}"
        for layer in range(4)
        for name in ("hook_pattern_rows", "hook_result")
    ]
    logits, _ = model.run_with_cache(batch)
    assert torch.equal(logits, reference(family))
    logits, _ = model.run_with_cache(batch, names_filter=rows)
    assert torch.equal(logits, reference(family))


@torch.no_grad()
def test_hooked_pattern_is_eager_attention(family):
    model, batch = hooked(family), batch_of(family)
    names = [
        f"blocks.{layer}.attn.{name}"
        for layer in range(4)
        for name in ("hook_pattern", "hook_pattern_rows")
    ]
    logits, cached = model.run_with_cache(batch, names_filter=names)
    keep, plain = real(batch), reference(family)
    torch.testing.assert_close(logits[keep], plain[keep], atol=rounding(plain), rtol=1e-5)
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        wanted = model.hf(**batch.tensors, output_attentions=True, use_cache=False).attentions
    finally:
        model.hf.set_attn_implementation(before)
    for layer in range(4):
        actual = cached[f"blocks.{layer}.attn.hook_pattern"]
        assert actual.dtype == torch.float32
        mask = keep[:, None, :, None].expand_as(actual)
        torch.testing.assert_close(actual[mask], wanted[layer][mask], atol=3e-6, rtol=0)
        rows = cached[f"blocks.{layer}.attn.hook_pattern_rows"]
        for i, token_map in enumerate(batch.token_maps):
            question = token_map.question
            torch.testing.assert_close(
                rows[i, :, : len(question)], actual[i][:, question], atol=3e-6, rtol=0
            )


@torch.no_grad()
def test_zeroed_z_is_a_pre_hook_on_the_output_projection(family):
    model, batch = hooked(family), batch_of(family)
    actual = model.run_with_hooks(
        batch, fwd_hooks=[("blocks.1.attn.head.2.hook_z", lambda z, hook: z * 0)]
    )
    d = model.cfg.d_head

    def pre(module, args):
        x = args[0].clone()
        x[..., 2 * d : 3 * d] = 0
        return (x,)

    o_proj = model.layout.decoder(model.hf).layers[1].get_submodule(model.layout.o_proj)
    handle = o_proj.register_forward_pre_hook(pre)
    wanted = model(batch)
    handle.remove()
    assert torch.equal(actual, wanted)
    assert not torch.equal(actual, reference(family))


@torch.no_grad()
def test_an_edited_pattern_gives_z_by_the_closed_form(family):
    model, batch = hooked(family), batch_of(family)
    made = {}

    def replace(x, hook):
        made["pattern"] = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
        return made["pattern"]

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", replace)]):
        _, cached = model.run_with_cache(
            batch, names_filter=["blocks.2.attn.hook_v", "blocks.2.attn.hook_z"]
        )
    v = cached["v", 2].repeat_interleave(model.cfg.n_heads // model.cfg.n_kv_heads, dim=2)
    torch.testing.assert_close(
        cached["z", 2], torch.einsum("bhqk,bkhd->bqhd", made["pattern"], v), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_the_residual_stream_adds_up(family):
    """Results sum to what the projection gives; blocks and DeepStack sum to the stream."""
    model, batch = hooked(family), batch_of(family)
    _, cached = model.run_with_cache(
        batch, names_filter=lambda name: "pattern" not in name and "scores" not in name
    )
    layers = model.layout.decoder(model.hf).layers
    keep = real(batch)
    assert torch.equal(cached["hook_embed"], cached["resid_pre", 0])
    for layer in range(4):
        o_proj = layers[layer].get_submodule(model.layout.o_proj)
        projected = cached["result", layer].sum(2)
        projected = projected if o_proj.bias is None else projected + o_proj.bias
        wanted = o_proj(rearrange(cached["z", layer], "b p h d -> b p (h d)"))
        torch.testing.assert_close(projected, wanted, atol=1e-5, rtol=1e-5)
        if model.layout.attn_out == model.layout.attention:
            torch.testing.assert_close(
                projected[keep], cached["attn_out", layer][keep], atol=1e-5, rtol=1e-5
            )
        else:
            norm = layers[layer].get_submodule(model.layout.attn_out)
            torch.testing.assert_close(
                norm(projected)[keep], cached["attn_out", layer][keep], atol=1e-5, rtol=1e-5
            )
        mid, post = cached["resid_mid", layer], cached["resid_post", layer]
        torch.testing.assert_close(
            cached["resid_pre", layer] + cached["attn_out", layer], mid, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(mid + cached["mlp_out", layer], post, atol=1e-6, rtol=0)
        if layer + 1 < 4:
            added = cached.cache_dict.get(f"blocks.{layer}.hook_deepstack", torch.zeros_like(post))
            torch.testing.assert_close(
                post + added, cached["resid_pre", layer + 1], atol=1e-6, rtol=0
            )
        for norm_name, path, x in (
            ("ln1", model.layout.ln1, cached["resid_pre", layer]),
            ("ln2", model.layout.ln2, mid),
        ):
            norm = layers[layer].get_submodule(path)
            weight = norm.weight + model.layout.norm_weight_offset
            normalized = cached[f"blocks.{layer}.{norm_name}.hook_normalized"]
            torch.testing.assert_close(normalized * weight, norm(x), atol=1e-5, rtol=1e-5)
    norm = model.layout.decoder(model.hf).norm
    weight = norm.weight + model.layout.norm_weight_offset
    torch.testing.assert_close(
        cached["ln_final.hook_normalized"] * weight,
        norm(cached["resid_post", 3]),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_gives_hugging_faces_tokens_hooked_or_not(family, kind):
    model, batch = hooked(family), batch_of(family)
    options = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": kind,
    }
    length = batch.tensors["input_ids"].shape[1]
    wanted = model.hf.generate(**batch.tensors, **options)[:, length:]
    assert torch.equal(model.generate(batch, **options), wanted)
    seen = []

    def identity(x, hook):
        seen.append((x.shape[-1], hook.ctx["positions"].tolist()))
        return x.clone()

    for layer in range(4):
        names = [
            f"blocks.{layer}.attn.{name}"
            for name in ("hook_v", "hook_rot_k", "hook_rot_q", "hook_pattern")
        ]
        seen.clear()
        with model.hooks(fwd_hooks=[(name, identity) for name in names]):
            assert torch.equal(model.generate(batch, **options), wanted)
        assert seen[3::4] == [(length, list(range(length)))] + [
            (length + i + 1, [length + i]) for i in range(4)
        ]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single(family, side):
    model, together = hooked(family), batch_of(family, side)
    pos_first = ["hook_embed", "ln_final.hook_normalized", "hook_logits"]
    for layer in range(4):
        pos_first += [
            f"blocks.{layer}.attn.{n}"
            for n in ("hook_q", "hook_rot_k", "hook_v", "hook_z", "hook_result")
        ]
        pos_first += [
            f"blocks.{layer}.{n}"
            for n in ("hook_resid_pre", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
        ]
    patterns = [
        f"blocks.{layer}.attn.{n}"
        for layer in range(4)
        for n in ("hook_pattern", "hook_attn_scores")
    ]
    _, cached = model.run_with_cache(together, names_filter=pos_first + patterns)
    for i in range(len(SAMPLES)):
        keep = together.token_maps[i].real
        _, wanted = model.run_with_cache(alone(family, i), names_filter=pos_first + patterns)
        for name in pos_first:
            torch.testing.assert_close(cached[name][i, keep], wanted[name][0], atol=1e-5, rtol=1e-5)
        for name in patterns:
            actual = cached[name][i][:, keep][:, :, keep]
            torch.testing.assert_close(actual, wanted[name][0], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_plain_model(family):
    model, batch = hooked(family), alone(family, 0)
    hf, last = model.hf, batch.token_maps[0].last
    hf.zero_grad()
    hf(**batch.tensors, use_cache=False).logits[0, last].sum().backward()
    wanted = {name: p.grad.clone() for name, p in hf.named_parameters() if p.grad is not None}
    names = [
        "hook_embed",
        *(
            f"blocks.1.attn.{n}"
            for n in ("hook_q", "hook_rot_k", "hook_pattern", "hook_z", "hook_result")
        ),
    ]
    names += [
        "blocks.2.hook_resid_mid",
        "blocks.2.attn.hook_pattern_rows",
        "blocks.2.ln1.hook_scale",
    ]
    hf.zero_grad()
    grads = {}

    def forward(x, hook):
        return x * 1.0

    def backward(grad, hook):
        grads[hook.name] = grad[0] if isinstance(grad, tuple) else grad

    with model.hooks(
        fwd_hooks=[(n, forward) for n in names], bwd_hooks=[(n, backward) for n in names]
    ):
        model(batch)[0, last].sum().backward()
    assert set(grads) == set(names)
    for name, parameter in hf.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], atol=2e-4, rtol=1e-3)
    hf.zero_grad(set_to_none=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_edits_of_k_and_v_enter_the_cache(family, kind):
    """Cached generation under edits is running the whole sequence again under the same edits for
    each token."""
    model, batch = hooked(family), alone(family, 0)
    hooks = [(f"blocks.{layer}.attn.hook_rot_k", lambda x, hook: x * 0.3) for layer in range(2)]
    hooks += [
        (f"blocks.{layer}.attn.kv_head.0.hook_v", lambda x, hook: x * -0.5) for layer in (0, 2, 3)
    ]
    sequence, tokens = dict(batch.tensors), []
    with model.hooks(fwd_hooks=hooks):
        actual = model.generate(
            batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=kind
        )
        for _ in range(5):
            token = model(Inputs(sequence, batch.token_maps, batch.samples))[:, -1:].argmax(-1)
            tokens.append(token)
            new = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}
            new["token_type_ids"] = model.layout.answer_type_id
            for name in new.keys() & sequence.keys():
                sequence[name] = torch.cat(
                    [sequence[name], torch.zeros_like(token) + new[name]], dim=1
                )
    assert torch.equal(actual, torch.cat(tokens, dim=1))


def test_backward_hooks_see_gradients_at_every_point(family):
    model, batch = hooked(family), alone(family, 0)
    names = [
        n
        for n in model.hook_names()
        if not n.startswith("vision.") and not n.endswith(("edges", "hook_logits"))
    ]
    names += [
        "blocks.1.attn.head.2.hook_z",
        "blocks.1.attn.kv_head.0.hook_k",
        "blocks.1.attn.head.0.hook_pattern",
    ]
    grads = {}

    def backward(grad, hook):
        grads[hook.name] = (grad[0] if isinstance(grad, tuple) else grad).abs().sum()

    with model.hooks(bwd_hooks=[(name, backward) for name in names]):
        model(batch)[0, batch.token_maps[0].question].sum().backward()
    model.hf.zero_grad(set_to_none=True)
    # only what is read goes through these
    beside = ("hook_pattern_rows", "hook_result", "scale", "normalized")
    assert not [name for name in names if name not in grads and not name.endswith(beside)]
    assert all(torch.isfinite(grad) for grad in grads.values())


def test_sampling_and_several_answers_a_prompt(family):
    model, batch = hooked(family), batch_of(family)
    options = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": True,
        "num_return_sequences": 2,
    }
    torch.manual_seed(3)
    wanted = model.hf.generate(**batch.tensors, **options)[:, batch.length :]
    shapes = []

    def cut(edges, hook):
        edges.cut([0], "question", "visual")
        edges.cut([1], "last+answer", "visual")

    def read(x, hook):
        shapes.append(x.shape[0])

    torch.manual_seed(3)
    with model.hooks(
        fwd_hooks=[("blocks.1.attn.hook_pattern_rows", read), ("blocks.0.hook_resid_post", read)]
    ):
        assert torch.equal(model.generate(batch, **options), wanted)
    assert set(shapes) == {4}
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_edges", cut)]):
        assert model.generate(batch, **options).shape == (4, 3)
