"""Runners on families without a layout of their own give what plain transformers gives, with
PyTorch's own hooks or masks in it. (Scores, ablation and path patching: test_recent_families.)"""

import numpy as np
import pytest
import torch

import corelens as cl
from helpers.recent_runs import (
    FAMILIES,
    HEADS,
    layers_of,
    o_proj,
    plain,
    pytorch,
    recent,
    sample,
    seen_by_heads,
)

every_family = pytest.mark.parametrize("family", FAMILIES)
SINK, WINDOW = 4, 8


def part_of(x, head):
    """The slice of an output projection's input that is one head's."""
    width = x.shape[-1] // 4
    return slice(head * width, (head + 1) * width)


def gate_of(layer, x):
    """What a head's z is multiplied by before the output projection; 1 where a family has no
    gate."""
    projection = layer.self_attn.q_proj
    if projection.out_features == 4 * layer.self_attn.head_dim:
        return 1.0
    both = projection(x).unflatten(-1, (4, -1))  # a head's query, then its gate
    return both.chunk(2, -1)[1].flatten(-2).sigmoid()


def z_of(model, inputs, number):
    """z of a layer's heads, side by side [batch, pos, head * d_head], and what it is multiplied
    by."""
    layer, seen = layers_of(model)[number], {}

    def attention(module, args, kwargs):
        seen["gate"] = gate_of(layer, args[0] if args else kwargs["hidden_states"])

    handles = [
        layer.self_attn.register_forward_pre_hook(attention, with_kwargs=True),
        o_proj(layer).register_forward_pre_hook(lambda module, args: seen.update(z=args[0])),
    ]
    with pytorch(handles), torch.no_grad():
        plain(model, inputs)
    return seen["z"] / seen["gate"], seen["gate"]


def difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 9]


@every_family
def test_a_patched_head_is_its_part_of_the_output_projections_input(family):
    model = recent(family)
    clean, corrupted = (model.prepare(sample(seed)) for seed in (0, 1))
    result = cl.activation_patch(model, sample(), sample(1), site="z", metric=difference)
    base = float(difference(plain(model, corrupted).logits))
    for layer, head in HEADS:
        z, _ = z_of(model, clean, layer)
        _, gate = z_of(model, corrupted, layer)

        def patched(module, args, z=z * gate, head=head):
            x = args[0].clone()
            x[..., part_of(x, head)] = z[..., part_of(z, head)]
            return (x,)

        handle = o_proj(layers_of(model)[layer]).register_forward_pre_hook(patched)
        with pytorch([handle]):
            wanted = float(difference(plain(model, corrupted).logits))
        assert abs(result.values[0, layer, head] - wanted) < 2e-4
        assert abs(wanted - base) > 1e-4


@every_family
@torch.no_grad()
def test_text_written_under_hooks_is_that_of_the_model_without_these_heads(family):
    model, layers = recent(family), layers_of(recent(family))
    inputs = model.prepare(sample())
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}

    def without(head):
        def hook(module, args):
            x = args[0].clone()
            x[..., part_of(x, head)] = 0
            return (x,)

        return hook

    heads = cl.HeadSet([(layer, head) for layer in (1, 3) for head in (0, 2, 3)])
    handles = [o_proj(layers[h.layer]).register_forward_pre_hook(without(h.head)) for h in heads]
    with pytorch(handles):
        wanted = model.hf.generate(**inputs.tensors, **options)[:, inputs.length :]
    with model.hooks(fwd_hooks=cl.ablate(heads, "zero")):
        tokens = model.generate(inputs, **options)
    assert torch.equal(tokens, wanted)
    untouched = model.hf.generate(**inputs.tensors, **options)[:, inputs.length :]
    assert torch.equal(model.generate(inputs, **options), untouched)


@every_family
@torch.no_grad()
def test_an_answer_under_sparse_inference_is_that_under_a_mask_a_head(family):
    model = recent(family)
    inputs = model.prepare(sample())
    whole = model.prepare(sample(), answer=True)
    (answer,) = whole.tensors["input_ids"][0, whole.token_maps[0].answer].tolist()

    def seen(layer, rows, keys):
        row, key = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)[None]
        near = (key < SINK) | (row - key < WINDOW)
        full = [(layer, head) in set(map(tuple, HEADS)) for head in range(4)]
        return near[None] | torch.tensor(full)[:, None, None]

    with seen_by_heads(model, seen):
        masked = plain(model, inputs).logits[0, -1].log_softmax(-1)[answer]
    sparse = cl.SparseInference(HEADS, pattern=cl.Streaming(sink=SINK, window=WINDOW))
    evaluation = cl.evaluate(model, [sample()], sparse=sparse, rounds=0)
    np.testing.assert_allclose(evaluation.answer_logprob, float(masked), atol=1e-4)
    dense = plain(model, inputs).logits[0, -1].log_softmax(-1)[answer]
    np.testing.assert_allclose(cl.evaluate(model, [sample()]).answer_logprob, dense, atol=1e-4)
    assert abs(float(masked - dense)) > 1e-4
