"""Families without a layout of their own: their layers are measured, and every runner is exact on
them."""

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.errors import CorelensError
from helpers.recent_runs import FAMILIES, HEADS, layers_of, o_proj, plain, pytorch, recent, sample

MIXERS = {"qwen3_5": "linear_attn", "lfm2_vl": "conv"}
METRIC = cl.logit_diff("7", "3")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identities_hold(family):
    verified = str(recent(family).verify())
    assert not [line for line in verified.splitlines() if line.startswith("FAIL")], verified


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_eager_attention(family):
    model = recent(family)
    inputs = model.prepare(sample())
    scores = cl.score_heads(model, [sample()], metrics=("ram", "lift"))
    question, region = inputs.token_maps[0].question, inputs.token_maps[0].region
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        attentions = iter(plain(model, inputs, output_attentions=True).attentions)
    finally:
        model.hf.set_attn_implementation(before)
    for layer, heads in enumerate(model.cfg.heads):
        values = scores["ram"].values[layer]
        if not heads:
            assert np.isnan(values).all() and np.isnan(scores["lift"].values[layer]).all()
            continue
        wanted = next(attentions)[0][:, question][:, :, region].sum(-1).mean(-1)
        np.testing.assert_allclose(values, wanted.numpy(), atol=1e-5)
    assert next(attentions, None) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_heads_are_zeroed_inputs_of_the_output_projection(family):
    model = recent(family)
    inputs = model.prepare(sample())

    def without(head):
        def hook(module, args):
            x = args[0].clone()
            width = x.shape[-1] // 4
            x[..., head * width : (head + 1) * width] = 0
            return (x, *args[1:])

        return hook

    layers = layers_of(model)
    with pytorch(
        [o_proj(layers[h.layer]).register_forward_pre_hook(without(h.head)) for h in HEADS]
    ):
        wanted = plain(model, inputs).logits
    with torch.no_grad():
        logits = model.run_with_hooks(inputs, fwd_hooks=cl.ablate(HEADS, "zero"))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, plain(model, inputs).logits, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_begun_late_are_those_of_whole_forwards(family):
    model = recent(family)
    results = [
        cl.activation_patch(model, sample(), sample(1), site="z", metric=METRIC, fast=fast).values
        for fast in (True, False)
    ]
    np.testing.assert_allclose(*results, atol=2e-4)
    attends = np.array(model.cfg.heads) > 0
    assert np.isfinite(results[0][0, attends]).all() and np.isnan(results[0][0, ~attends]).all()
    outs = cl.activation_patch(
        model, sample(), sample(1), site="attn_out", per="layer", metric=METRIC
    )
    assert np.isfinite(outs.values).all()  # every layer's mixer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_path_to_the_logits_is_a_run_with_all_else_frozen(family):
    model, layers = recent(family), layers_of(recent(family))
    clean, other = (model.prepare(sample(seed)) for seed in (0, 1))
    (sender,) = senders = cl.HeadSet([(1, 3)])

    def seen_in(inputs):
        seen = {}

        def keep(layer, x):
            seen[layer] = (x[0] if isinstance(x, tuple) else x).clone()

        handles = []
        for number, layer in enumerate(layers):
            if model.cfg.heads[number]:
                hook = lambda module, args, n=number: keep(n, args)  # noqa: E731
                handles.append(o_proj(layer).register_forward_pre_hook(hook))
            else:
                mixer = getattr(layer, MIXERS[family])
                handles.append(
                    mixer.register_forward_hook(lambda module, args, out, n=number: keep(n, out))
                )
        with pytorch(handles):
            plain(model, inputs)
        return seen

    frozen, theirs = seen_in(clean), seen_in(other)
    width = frozen[sender.layer].shape[-1] // 4
    part = slice(sender.head * width, (sender.head + 1) * width)
    frozen[sender.layer][..., part] = theirs[sender.layer][..., part]
    handles = []
    for number, layer in enumerate(layers):
        if model.cfg.heads[number]:
            handles.append(
                o_proj(layer).register_forward_pre_hook(lambda module, args, n=number: (frozen[n],))
            )
        else:
            mixer = getattr(layer, MIXERS[family])
            handles.append(
                mixer.register_forward_hook(lambda module, args, out, n=number: frozen[n])
            )
    with pytorch(handles):
        wanted = plain(model, clean).logits[0, -1].double()
    result = cl.path_patch(
        model, clean, other, senders, ["hook_logits"], metric=lambda x: x[:, -1, 5] - x[:, -1, 9]
    )
    np.testing.assert_allclose(result.values, float(wanted[5] - wanted[9]), atol=2e-4)
    assert abs(result.effect[0]) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_heads_see_their_pattern_alone(family):
    model = recent(family)
    inputs = model.prepare(sample())
    sparse = cl.SparseInference(HEADS, pattern=cl.Streaming(sink=4, window=8))

    def masked(layer):
        def hook(scores, hook):
            row, key = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])[None]
            seen = (key < 4) | (row - key < 8)
            full = torch.tensor(
                [(layer, head) in set(map(tuple, HEADS)) for head in range(scores.shape[1])]
            )
            return scores.masked_fill(~(seen[None, None] | full[None, :, None, None]), -torch.inf)

        return hook

    hooks = [
        (f"blocks.{n}.attn.hook_attn_scores", masked(n))
        for n, heads in enumerate(model.cfg.heads)
        if heads
    ]
    with torch.no_grad():
        wanted = model.run_with_hooks(inputs, fwd_hooks=hooks)
        with model.sparse(sparse):
            torch.testing.assert_close(model(inputs), wanted, atol=1e-3, rtol=1e-3)
    everything = cl.SparseInference(HEADS, pattern=cl.Streaming(sink=4, window=4096))
    dense, all_seen = (cl.evaluate(model, [sample()], sparse=s, rounds=1) if s else cl.evaluate(model, [sample()])
                       for s in (None, everything))  # fmt: skip
    assert (
        abs(dense.answer_logprob - all_seen.answer_logprob) < 1e-4
        and all_seen.accuracy == dense.accuracy
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_is_the_sum_of_its_parts(family):
    model = recent(family)
    _, cached = model.run_with_cache(model.prepare(sample()))
    torch.testing.assert_close(
        cached.decompose_resid().sum(0), cached["resid_post", 3], atol=1e-4, rtol=1e-5
    )


# --- layers without attention


@pytest.mark.parametrize("family", MIXERS)
def test_layers_without_attention_say_so_and_have_their_mixers_output(family):
    model, name = recent(family), MIXERS[family]
    inputs = model.prepare(sample())
    assert model.cfg.heads == (0, 4, 0, 4)
    mixer = getattr(layers_of(model)[0], name)
    seen = []
    with pytorch([mixer.register_forward_hook(lambda module, args, out: seen.append(out))]):
        plain(model, inputs)
    _, cached = model.run_with_cache(inputs, names_filter="blocks.0.hook_attn_out")
    assert torch.equal(cached["blocks.0.hook_attn_out"], seen[0])
    halved = model.run_with_hooks(
        inputs, fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x / 2)]
    )
    with pytorch([mixer.register_forward_hook(lambda module, args, out: out / 2)]):
        torch.testing.assert_close(halved, plain(model, inputs).logits)
    for hooks in (cl.ablate([(0, 1)], "zero"), [("blocks.2.attn.hook_pattern", lambda x, hook: x)]):
        with pytest.raises(CorelensError, match=f"{type(mixer).__name__}.*no attention"):
            model.run_with_hooks(inputs, fwd_hooks=hooks)
    with pytest.raises(CorelensError, match=type(mixer).__name__):
        _ = model.blocks[0].attn.W_O
    with pytest.raises(CorelensError, match="L0H1"):
        cl.evaluate(
            model, [sample()], sparse=cl.SparseInference([(0, 1)], pattern=cl.Streaming(4, 8))
        )
    evicting = cl.SparseInference(HEADS, pattern=cl.Streaming(4, 8), decode="streaming")
    with pytest.raises(CorelensError, match=r"layers \[0, 2\] keep a state"):
        cl.evaluate(model, [sample()], sparse=evicting)


@pytest.mark.parametrize("family", MIXERS)
def test_what_is_drawn_and_averaged_is_of_heads_that_exist(family, tmp_path):
    model = recent(family)
    samples = [sample(seed, id=str(seed)) for seed in range(2)]
    scores = cl.score_heads(model, samples)["ram"]
    assert scores.values.shape == (4, 4) and int(scores.exists.sum()) == 8
    for heads in (
        scores.top(k=8),
        scores.bottom(k=8),
        scores.random(k=4),
        scores.random(k=2, match="layer"),
    ):
        assert {head.layer for head in heads} <= {1, 3}
    scores.save(tmp_path / "ram.safetensors")
    np.testing.assert_array_equal(
        cl.HeadScores.load(tmp_path / "ram.safetensors").values, scores.values
    )
    reference = cl.mean_z(model, samples)
    assert sorted(reference) == [1, 3]
    cl.evaluate(model, samples, hooks=cl.ablate(HEADS, "mean", reference=reference))
    cl.ablation_sweep(model, samples, scores, fractions=(0.25,), draws=1)
    attributed = cl.attribution_patch(model, samples[0], samples[1], site="z", metric=METRIC)
    assert (
        np.isnan(attributed.effect[0, [0, 2]]).all()
        and np.isfinite(attributed.effect[0, [1, 3]]).all()
    )
    record = cl.record_ram()
    model.run_with_hooks(model.prepare(samples), fwd_hooks=record.hooks, return_type=None)
    np.testing.assert_allclose(record.scores().values, scores.values, atol=1e-6)


# --- gated attention


@torch.no_grad()
def test_a_gate_beside_the_query_has_its_own_point():
    model = recent("qwen3_5")
    inputs = model.prepare(sample())
    attn = model.blocks[1].attn
    assert attn.W_Q.shape == attn.W_gate.shape == (4, 32, 16)
    points = ("q", "gate", "z", "result")
    names = [f"blocks.1.attn.hook_{point}" for point in points] + ["blocks.1.ln1.hook_normalized"]
    _, cached = model.run_with_cache(inputs, names_filter=names)
    q, gate, z, result = (cached[name] for name in names[:4])
    x = cached[names[4]] * model.blocks[1].ln1.w
    torch.testing.assert_close(q, torch.einsum("bpm,hmd->bphd", x, attn.W_Q), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        gate, torch.einsum("bpm,hmd->bphd", x, attn.W_gate), atol=1e-5, rtol=1e-4
    )
    written = torch.einsum("bphd,hdm->bphm", z * gate.sigmoid(), attn.W_O)
    torch.testing.assert_close(result, written, atol=1e-5, rtol=1e-4)
    shut = model.run_with_hooks(
        inputs, fwd_hooks=[("blocks.1.attn.hook_gate", lambda x, hook: x * 0 - 1e4)]
    )
    ablated = model.run_with_hooks(
        inputs, fwd_hooks=cl.ablate([(1, head) for head in range(4)], "zero")
    )
    torch.testing.assert_close(shut, ablated)
    uniform = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_gate")[1]
    with model.hooks([("blocks.1.attn.hook_q", lambda x, hook: x * 0)]):  # the gate stays as it is
        same = model.run_with_cache(inputs, names_filter="blocks.1.attn.hook_gate")[1]
    assert torch.equal(uniform["blocks.1.attn.hook_gate"], same["blocks.1.attn.hook_gate"])


def test_head_results_of_some_layers():
    model = recent("qwen3_5")
    inputs = model.prepare(sample())
    _, cached = model.run_with_cache(inputs)
    with pytest.raises(CorelensError, match="gated"):
        cached.stack_head_results()
    _, cached = model.run_with_cache(inputs, names_filter=lambda name: True)
    stack, labels = cached.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels == [f"L{layer}H{head}" for layer in (1, 3) for head in range(4)] + ["remainder"]
    torch.testing.assert_close(stack.sum(0), cached["resid_post", 3], atol=1e-4, rtol=1e-5)
    with pytest.raises(CorelensError, match="takes its mixer"):
        cached.get_full_resid_decomposition(expand_neurons=False)
