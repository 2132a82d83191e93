"""Ablations and edge edits: each equals its definition, over families that differ in what surrounds
attention."""

from functools import cache

import pytest
import torch
from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions import ablate, edge_bias, knockout, mean_z
from corelens.model.hooked import HookedMLLM
from corelens.tokens.regions import Box
from helpers.families import rounding, tiny

# m-RoPE + QK-norm + DeepStack; plain Llama with newline tokens; sliding layers, two-way images,
# norms after attention; a prompt that attends both ways
FAMILIES = ["qwen3_vl", "llava_next", "gemma3", "paligemma"]
CAUSAL = ["qwen3_vl", "llava_next"]


def picture(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def sample(seed: int, question: str = "What digit is on the red circle?") -> Sample:
    return Sample(
        images=[picture(seed)],
        question=question,
        answer="7",
        regions=[Box(10, 10, 60, 40)],
        id=str(seed),
    )


SAMPLES = [sample(0), sample(1, "Which colour?")]


@cache
def hooked(family: str) -> HookedMLLM:
    return HookedMLLM(*tiny(family))


@cache
def batch_of(family: str) -> Inputs:
    return hooked(family).prepare(SAMPLES)


def z_under(model: HookedMLLM, inputs: Inputs, hooks: list, layer: int) -> torch.Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.run_with_cache(inputs, names_filter=f"blocks.{layer}.attn.hook_z")[1][
            f"blocks.{layer}.attn.hook_z"
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_a_projection_without_those_columns(family):
    model, batch = hooked(family), batch_of(family)
    with torch.no_grad():
        actual = model.run_with_hooks(batch, fwd_hooks=ablate([(1, 0), (1, 3), (2, 2)]))
        d, handles = model.cfg.d_head, []
        for layer, heads in {1: [0, 3], 2: [2]}.items():
            projection = (
                model.layout.decoder(model.hf).layers[layer].get_submodule(model.layout.o_proj)
            )
            weight = projection.weight.clone()
            for head in heads:
                weight[:, head * d : (head + 1) * d] = 0

            def forward(module, args, output, weight=weight):
                return torch.nn.functional.linear(args[0], weight, module.bias)

            handles.append(projection.register_forward_hook(forward))
        wanted = model(batch)
        for handle in handles:
            handle.remove()
        assert (wanted - model(batch)).abs().max() > 1e-3
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_uniform_is_the_running_mean_of_v(family):
    model, batch = hooked(family), batch_of(family)
    layer, head = 1, 3
    z = z_under(model, batch, ablate([(layer, head)], "uniform"), layer)
    with torch.no_grad():
        v = model.run_with_cache(batch, names_filter=f"blocks.{layer}.attn.hook_v")[1]["v", layer]
        plain = model.run_with_cache(batch, names_filter=f"blocks.{layer}.attn.hook_z")[1][
            "z", layer
        ]
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for i, token_map in enumerate(batch.token_maps):
        own = v[i, token_map.real, head // group]
        mean = own.cumsum(0) / torch.arange(1, len(own) + 1)[:, None]
        torch.testing.assert_close(z[i, token_map.real, head], mean, atol=1e-6, rtol=0)
        others = [h for h in range(model.cfg.n_heads) if h != head]
        assert torch.equal(z[i, token_map.real][:, others], plain[i, token_map.real][:, others])


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_is_the_mean_over_every_key_that_may_be_seen(family):
    model, batch = hooked(family), batch_of(family)
    name = "blocks.0.attn.hook_pattern"
    with torch.no_grad(), model.hooks(fwd_hooks=ablate([(0, 2)], "uniform")):
        pattern = model.run_with_cache(batch, names_filter=name)[1][name]
    real = torch.stack([token_map.real for token_map in batch.token_maps])
    rows = pattern[:, 2][real]
    seen = rows > 0
    torch.testing.assert_close(
        rows[seen], (1 / seen.sum(-1, keepdim=True)).expand_as(rows)[seen], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_over_one_sample_and_one_position_is_itself(family):
    model = hooked(family)
    inputs = model.prepare(SAMPLES[0])
    mean = mean_z(model, SAMPLES[:1], positions="last")
    with torch.no_grad():
        plain, cache_ = model.run_with_cache(inputs)
        assert all(
            mean[layer].shape == (1, model.cfg.n_heads, model.cfg.d_head)
            for layer in range(model.cfg.n_layers)
        )
        last = inputs.token_maps[0].last
        for layer in range(model.cfg.n_layers):
            torch.testing.assert_close(mean[layer], cache_["z", layer][0, last], atol=1e-6, rtol=0)
        everywhere = [
            (layer, head)
            for layer in range(model.cfg.n_layers)
            for head in range(model.cfg.n_heads)
        ]
        same = model.run_with_hooks(
            inputs, fwd_hooks=ablate(everywhere, "mean", reference=mean, positions="last")
        )
        other = model.run_with_hooks(inputs, fwd_hooks=ablate(everywhere, "mean", reference=mean))
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=0)
    assert (other - plain).abs().max() > 1e-3


def test_mean_counts_real_positions_once_whatever_the_batch():
    model = hooked("qwen3_vl")
    together, apart = mean_z(model, SAMPLES, batch_size=2), mean_z(model, SAMPLES, batch_size=1)
    by_role = mean_z(model, SAMPLES, by_role=True)
    with torch.no_grad():
        seen = [model.run_with_cache(model.prepare(sample_))[1] for sample_ in SAMPLES]
        maps = [model.prepare(sample_).token_maps[0] for sample_ in SAMPLES]
    for layer in range(model.cfg.n_layers):
        torch.testing.assert_close(together[layer], apart[layer], atol=1e-6, rtol=0)
        z = torch.cat([c["z", layer][0] for c in seen])
        torch.testing.assert_close(together[layer][0], z.mean(0), atol=1e-6, rtol=0)
        visual = torch.cat(
            [c["z", layer][0, tm.visual] for c, tm in zip(seen, maps, strict=True)]
        ).mean(0)
        question = torch.cat(
            [c["z", layer][0, tm.question] for c, tm in zip(seen, maps, strict=True)]
        ).mean(0)
        torch.testing.assert_close(
            by_role[layer][:2], torch.stack([visual, question]), atol=1e-6, rtol=0
        )
    z = z_under(model, batch_of("qwen3_vl"), ablate([(2, 1)], "mean", reference=by_role), 2)
    token_map = batch_of("qwen3_vl").token_maps[1]
    torch.testing.assert_close(z[1, token_map.visual[5], 1], by_role[2][0, 1])
    torch.testing.assert_close(z[1, token_map.question[0], 1], by_role[2][1, 1])
    torch.testing.assert_close(z[1, token_map.last[0], 1], by_role[2][2, 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_resample_puts_another_run_in_the_place(family):
    model, batch = hooked(family), batch_of(family)
    swapped = model.prepare([sample(7), sample(8, "Which colour?")])
    with torch.no_grad():
        _, other = model.run_with_cache(swapped)
    z = z_under(model, batch, ablate([(1, 2)], "resample", reference=other), 1)
    plain = z_under(model, batch, [], 1)
    assert torch.equal(z[:, :, 2], other["z", 1][:, :, 2])
    assert torch.equal(z[:, :, [0, 1, 3]], plain[:, :, [0, 1, 3]])
    single = other.cache_dict["blocks.1.attn.hook_z"][:1]
    z = z_under(
        model, batch, ablate([(1, 2)], "resample", reference={"blocks.1.attn.hook_z": single}), 1
    )
    assert torch.equal(z[1, :, 2], single[0, :, 2])


def test_resample_of_another_length_is_drawn_by_role_or_refused():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    for question in (
        "What digit is on the red circle, and what letter is on the blue one?",
        "Which?",
    ):
        longer = model.prepare(sample(5, question))
        with torch.no_grad():
            _, other = model.run_with_cache(longer)
        with pytest.raises(CorelensError, match="drawn by role"):
            model.run_with_hooks(batch, fwd_hooks=ablate([(1, 2)], "resample", reference=other))
    z = z_under(model, batch, ablate([(1, 2)], "resample", reference=(other, longer)), 1)
    again = z_under(model, batch, ablate([(1, 2)], "resample", reference=(other, longer)), 1)
    assert torch.equal(z, again)
    source = other["z", 1][0, :, 2]
    visual = source[longer.token_maps[0].visual]
    for i, token_map in enumerate(batch.token_maps):
        for position in token_map.visual:
            assert (z[i, position, 2] == visual).all(-1).any()
        assert not (z[i, token_map.last, 2][:, None] == visual).all(-1).any()


def test_ablations_hold_while_generating():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    with torch.no_grad():
        _, other = model.run_with_cache(model.prepare([sample(7), sample(8, "Which colour?")]))
    heads = [(0, 1), (2, 3)]
    reference = {"mean": mean_z(model, SAMPLES), "resample": other}
    for kind in ("zero", "mean", "resample", "uniform"):
        seen = []
        hooks = ablate(heads, kind, reference=reference.get(kind))
        hooks.append(
            ("blocks.2.attn.head.3.hook_z", lambda z, hook, seen=seen: seen.append(z.clone()))
        )
        with model.hooks(fwd_hooks=hooks):
            model.generate(batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert [z.shape[1] for z in seen] == [batch.length, 1, 1]
        if kind == "zero":
            assert all((z == 0).all() for z in seen)
        if kind == "mean":
            assert torch.equal(seen[2][1, 0], reference["mean"][2][0, 3])
        if kind == "resample":
            assert torch.equal(seen[2][:, 0], other["z", 2][:, -1, 3])


# --- edges


@pytest.mark.parametrize("family", FAMILIES)
def test_knockout_of_all_edges_but_one_is_that_value(family):
    model, batch = hooked(family), batch_of(family)
    token_maps = batch.token_maps
    left = torch.stack([token_map.visual[3] for token_map in token_maps])[:, None]
    rest = [[p for p in range(batch.length) if p != int(keep)] for keep in left]
    hooks = knockout([(0, 3)], rows="last", columns=torch.tensor(rest))
    z = z_under(model, batch, hooks, 0)
    with torch.no_grad():
        v = model.run_with_cache(batch, names_filter="blocks.0.attn.hook_v")[1]["v", 0]
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for i, token_map in enumerate(token_maps):
        torch.testing.assert_close(
            z[i, token_map.last[0], 3], v[i, left[i, 0], 3 // group], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["knockout", "edge_bias"])
def test_edge_edits_are_the_same_mask_in_dense_scores(family, kind):
    """The edited pattern equals eager attention's softmax of the edited scores, and so do the
    logits."""
    model, batch = hooked(family), batch_of(family)
    heads = [(0, 1), (2, 0), (2, 3)]
    make = knockout if kind == "knockout" else edge_bias
    value = {} if kind == "knockout" else {"value": 2.5}
    hooks = make(heads, "question+last", "region", **value)

    def dense(scores, hook):
        for i, token_map in enumerate(hook.ctx["inputs"].token_maps):
            rows = torch.cat([token_map.question, token_map.last])
            for head in {0: [1], 2: [0, 3]}[hook.layer()]:
                for row in rows:
                    scores[i, head, row, token_map.region] += (
                        -torch.inf if kind == "knockout" else 2.5
                    )

    slow_hooks = [(f"blocks.{layer}.attn.hook_attn_scores", dense) for layer in (0, 2)]
    with torch.no_grad():
        fast = model.run_with_hooks(batch, fwd_hooks=hooks)
        slow = model.run_with_hooks(batch, fwd_hooks=slow_hooks)
        assert (fast - model(batch)).abs().max() > 1e-4
    torch.testing.assert_close(fast, slow, atol=rounding(slow), rtol=0)


def test_knockout_of_all_heads_is_one_mask_for_the_hugging_face_model():
    """An independent check: the wrapped model, eager, with a 4-D additive mask."""
    model = hooked("llava_next")
    inputs = model.prepare(SAMPLES[0])
    token_map, length = inputs.token_maps[0], inputs.length
    with torch.no_grad():
        actual = model.run_with_hooks(inputs, fwd_hooks=knockout(None, "question+last", "region"))
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        rows = torch.cat([token_map.question, token_map.last])
        mask[rows[:, None], token_map.region[None]] = torch.finfo(torch.float32).min
        tensors = dict(inputs.tensors) | {"attention_mask": mask[None, None]}
        before = model.hf.config._attn_implementation
        model.hf.set_attn_implementation("eager")
        try:
            wanted = model.hf(**tensors, use_cache=False).logits
        finally:
            model.hf.set_attn_implementation(before)
    torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=0)


def test_edge_bias_moves_mass_and_nothing_else():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    name = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        plain = model.run_with_cache(batch, names_filter=name)[1][name]
        with model.hooks(fwd_hooks=edge_bias([(1, 2)], "last", "region", value=4.0)):
            biased = model.run_with_cache(batch, names_filter=name)[1][name]
    for i, token_map in enumerate(batch.token_maps):
        row = plain[i, 2, token_map.last[0]].clone()
        row[token_map.region] *= torch.tensor(4.0).exp()
        torch.testing.assert_close(
            biased[i, 2, token_map.last[0]], row / row.sum(), atol=1e-6, rtol=1e-5
        )
    rest = torch.ones_like(plain, dtype=torch.bool)
    rest[:, 2] = False
    assert torch.equal(biased[rest], plain[rest])


def test_mistakes_are_named():
    model, batch = hooked("qwen3_vl"), batch_of("qwen3_vl")
    for call, message in (
        (lambda: ablate([(0, 0)], "delete"), "zero, mean, resample, uniform"),
        (lambda: ablate([(0, 0)], "mean"), "mean_z"),
        (lambda: ablate([(0, 0)], "zero", reference={}), "without|with"),
        (lambda: mean_z(model, []), "no samples"),
        (lambda: model.run_with_hooks(batch, fwd_hooks=ablate([(0, 4)])), "L0H4"),
        (lambda: model.run_with_hooks(batch, fwd_hooks=ablate([(9, 0)])), "blocks.9"),
        (lambda: model.run_with_hooks(batch, fwd_hooks=knockout([(0, 4)])), "heads of this model"),
        (
            lambda: model.run_with_hooks(
                batch, fwd_hooks=ablate([(0, 0)], "mean", reference={5: torch.zeros(1, 4, 8)})
            ),
            "layer 0",
        ),
    ):
        with pytest.raises(CorelensError, match=message):
            call()
    assert not any(point.active for point in model.hook_points())
