"""The vision side of the hook tree, on every family that has a tower: reads, writes, and what the
decoder gets."""

import pytest
import torch
from einops import rearrange

from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample
from helpers.families import FAMILIES, rounding
from helpers.family_runs import SAMPLES, alone, batch_of, hooked, reference
from helpers.samples import picture

every_family = pytest.mark.parametrize("family", FAMILIES)


def names_of(model, word: str) -> list[str]:
    return [name for name in model.hook_names(word) if name.startswith("vision.")]


@every_family
@torch.no_grad()
def test_reading_everything_but_patterns_leaves_the_logits_bit_for_bit(family):
    model, batch = hooked(family), batch_of(family)
    names = [name for name in names_of(model, "") if not name.endswith("pattern")]
    assert len(names) == 1 + 6 * model.cfg.n_vision_layers and model.cfg.n_vision_layers >= 2
    logits, cached = model.run_with_cache(batch, names_filter=names)
    assert torch.equal(logits, reference(family))
    for layer in range(model.cfg.n_vision_layers):
        block = f"vision.blocks.{layer}"
        images, pos, width = cached[f"{block}.hook_resid_pre"].shape
        heads = model.vision.blocks[layer].attn.hook_q.n_heads
        for name in ("q", "k", "v", "z"):
            assert cached[f"{block}.attn.hook_{name}"].shape == (images, pos, heads, width // heads)
        if layer:
            before = cached[f"vision.blocks.{layer - 1}.hook_resid_post"]
            assert torch.equal(cached[f"{block}.hook_resid_pre"].flatten(), before.flatten())


@every_family
@torch.no_grad()
def test_the_features_are_what_the_decoder_gets(family):
    model, batch = hooked(family), batch_of(family)
    _, cached = model.run_with_cache(batch, names_filter=["vision.hook_out", "hook_embed"])
    out = cached["vision.hook_out"]
    features = out if model.cfg.n_deepstack == 0 else out[:, 0]
    added = (1 + model.cfg.n_deepstack,) if model.cfg.n_deepstack else ()
    assert out.shape[1:] == (*added, model.cfg.d_model)
    placeholder = torch.cat(
        [cached["hook_embed"][i, tm.placeholder] for i, tm in enumerate(batch.token_maps)]
    )
    torch.testing.assert_close(features, placeholder, atol=1e-6, rtol=0)


@every_family
@torch.no_grad()
def test_patterns_give_z_and_their_rows_sum_to_one(family):
    model, batch = hooked(family), batch_of(family)
    names = names_of(model, "hook_pattern")
    lengths = {}

    def keep(x, hook):
        lengths[hook.name] = hook.ctx["lengths"]

    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits, cached = model.run_with_cache(
            batch, names_filter=names + names_of(model, "hook_v") + names_of(model, "hook_z")
        )
    plain = reference(family)
    torch.testing.assert_close(logits, plain, atol=rounding(plain), rtol=1e-5)
    for name in names:
        pattern, block = cached[name], name.removesuffix("hook_pattern")
        assert pattern.dtype == torch.float32
        torch.testing.assert_close(
            pattern.sum(-1), torch.ones(pattern.shape[:-1]), atol=1e-5, rtol=0
        )
        done, pos = [], cached[block + "hook_v"].shape[1]
        assert sum(lengths[name]) == pattern.shape[2] == pos
        values = cached[block + "hook_v"].split(lengths[name], 1)
        for part, v in zip(pattern.split(lengths[name], 2), values, strict=True):
            done.append(torch.einsum("bhqk,bkhd->bqhd", part[..., : v.shape[1]], v))
        torch.testing.assert_close(
            torch.cat(done, 1), cached[block + "hook_z"], atol=1e-5, rtol=1e-5
        )


@every_family
@torch.no_grad()
@pytest.mark.parametrize("point", ["hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_pattern",
                                   "attn.hook_z", "attn.head.1.hook_z", "hook_resid_post", "hook_out"])  # fmt: skip
def test_every_point_writes(family, point):
    model, batch = hooked(family), alone(family, 0)
    name = f"vision.{point}" if point == "hook_out" else f"vision.blocks.1.{point}"
    fired = []

    def scale(x, hook):
        fired.append(x.shape)
        return x * x - x  # (an affine edit of everything would vanish in the norm behind it)

    def scale_in_place(x, hook):
        x *= x - 1

    plain = model(batch)
    returned = model.run_with_hooks(batch, fwd_hooks=[(name, scale)])
    in_place = model.run_with_hooks(batch, fwd_hooks=[(name, scale_in_place)])
    assert len(fired) == 1
    assert (returned - plain).abs().max() > 1e-4
    torch.testing.assert_close(returned, in_place, atol=rounding(plain), rtol=1e-5)
    assert torch.equal(model(batch), plain)


@every_family
@torch.no_grad()
def test_the_pattern_is_made_of_edited_q_and_every_point_fires_once(family):
    model, batch = hooked(family), alone(family, 0)
    names, fired = names_of(model, "vision.blocks.0"), []

    def edit(x, hook):
        fired.append(hook.name)
        assert hook.ctx["inputs"] is batch
        return x * 2 if hook.name.endswith(("hook_q", "hook_v")) else None

    both = model.run_with_hooks(batch, fwd_hooks=[(name, edit) for name in names])
    assert sorted(fired) == sorted(names)
    alone_ = model.run_with_hooks(
        batch, fwd_hooks=[(n, edit) for n in names if n.endswith(("hook_q", "hook_v"))]
    )
    torch.testing.assert_close(both, alone_, atol=1e-5, rtol=1e-5)
    assert not torch.equal(both, model(batch))


@every_family
@torch.no_grad()
def test_an_edited_z_is_a_pre_hook_on_the_towers_output_projection(family):
    model, batch = hooked(family), alone(family, 0)
    layer = model.towers[0].layers[0]
    heads = model.vision.blocks[0].attn.hook_z.n_heads

    def pre(module, args):
        x = rearrange(args[0], "... (head d) -> ... head d", head=heads).clone()
        x[..., 1, :] = 0
        return (x.flatten(-2),)

    handle = layer.module.get_submodule(layer.out).register_forward_pre_hook(pre)
    wanted = model(batch)
    handle.remove()
    actual = model.run_with_hooks(
        batch, fwd_hooks=[("vision.blocks.0.attn.head.1.hook_z", lambda z, hook: z * 0)]
    )
    assert torch.equal(actual, wanted) and not torch.equal(actual, model(batch))


@every_family
@pytest.mark.parametrize("encoded", [False, True])
def test_patching_the_features_is_showing_the_other_picture(family, encoded):
    """DeepStack's features too: nothing of the picture that was replaced is left. In generation as
    well."""
    model, batch = hooked(family), alone(family, 0)
    other = model.prepare(Sample(images=[picture(9, (96, 64))], question=SAMPLES[0].question))
    with torch.no_grad():
        wanted, cached = model.run_with_cache(other, names_filter="vision.hook_out")

    def swap(x, hook):
        return cached["vision.hook_out"]

    running = model.encode(batch) if encoded else batch
    with torch.no_grad():
        plain = model(running)
        torch.testing.assert_close(
            model.run_with_hooks(running, fwd_hooks=[("vision.hook_out", swap)]),
            wanted,
            atol=1e-6,
            rtol=0,
        )
        assert torch.equal(model(running), plain) and not torch.equal(plain, wanted)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with model.hooks(fwd_hooks=[("vision.hook_out", swap)]):
        assert torch.equal(model.generate(running, **options), model.generate(other, **options))


@every_family
def test_gradients_reach_every_vision_point(family):
    model, batch = hooked(family), alone(family, 0)
    names = [
        "vision.hook_out",
        *(n for n in names_of(model, "vision.blocks.0") if not n.endswith("edges")),
    ]
    grads = {}

    def backward(grad, hook):
        grads[hook.name] = grad[0] if isinstance(grad, tuple) else grad

    with model.hooks(
        fwd_hooks=[(n, lambda x, hook: x * 1.0) for n in names],
        bwd_hooks=[(n, backward) for n in names],
    ):
        model(batch)[0, -1].sum().backward()
    assert set(grads) == set(names)
    assert all(grad.abs().sum() > 0 for grad in grads.values())
    model.hf.zero_grad(set_to_none=True)


def test_everything_is_undone_after_an_exception():
    model, batch = hooked("qwen3_vl"), alone("qwen3_vl", 0)

    def explode(x, hook):
        raise RuntimeError("on purpose")

    plain = model(batch).detach()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()]
    for name in [*names_of(model, "vision.blocks.1"), "vision.hook_out"]:
        with pytest.raises(RuntimeError, match="on purpose"):
            model.run_with_hooks(batch, fwd_hooks=[(name, explode)])
        assert [
            len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules()
        ] == before
        assert "get_image_features" not in vars(model.hf.model)
        assert {
            m.config._attn_implementation for m in model.hf.modules() if hasattr(m, "config")
        } == {"sdpa"}
        assert torch.equal(model(batch), plain)


def test_mistakes_are_named():
    model = hooked("llava")
    with pytest.raises(CorelensError, match=r"vision\.blocks\.0\.attn\.hook_z"):
        model.run_with_cache(alone("llava", 0), names_filter=["vision.blocks.0.attn.hook_zz"])
