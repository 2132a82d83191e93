"""Patterns that follow pictures, columns and diagonals, and token pruning: each engine against dense
attention under a mask that is made here, one pair after the other."""

import numpy as np
import pytest
import torch

import corelens as cl
from helpers.families import tiny
from helpers.samples import sample, video

FULL = cl.HeadSet([(0, 1), (1, 2)])


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def inputs(model):
    """Two prompts of different lengths, one of two images: padded, and with text between."""
    both = sample(1, (96, 64), "Which is larger?", images=2)
    return model.prepare([both, sample(3, (64, 64))])


def masked(model, inputs, full, seen):
    """Logits of dense attention in which `seen(layer, which sample, row, key)` says what heads see that
    are not full."""
    n, length = len(inputs), inputs.length
    places = [(s, row, key) for s in range(n) for row in range(length) for key in range(row + 1)]

    def hide(scores, hook):
        layer = hook.layer()
        allowed = torch.zeros(n, length, length, dtype=torch.bool)
        for place in places:
            allowed[place] = seen(layer, *place)
        every = allowed[:, None].repeat(1, scores.shape[1], 1, 1)
        every[:, [head for head in range(scores.shape[1]) if (layer, head) in full]] = True
        return scores.masked_fill(~every, -torch.inf)

    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hide) for layer in range(model.cfg.n_layers)]
    return model.run_with_hooks(inputs, fwd_hooks=hooks)


def real(inputs):
    return torch.stack([token_map.real for token_map in inputs.token_maps])


def under(model, inputs, pattern, heads, engine):
    with model.sparse(cl.SparseInference(heads, pattern, engine=engine)):
        return model(inputs)


def check(model, inputs, pattern, heads, seen):
    wanted = masked(model, inputs, cl.HeadSet(heads), seen)[real(inputs)]
    for engine in ("split", "reference"):
        logits = under(model, inputs, pattern, heads, engine)[real(inputs)]
        torch.testing.assert_close(logits, wanted, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(
        model(inputs)[real(inputs)], wanted, atol=1e-3
    )  # it leaves something out


def test_intra_image_sees_its_own_picture_sinks_and_a_window(model, inputs):
    picture = {}
    for which, token_map in enumerate(inputs.token_maps):
        for number, tokens in enumerate(token_map.images):
            picture |= {(which, position): number for position in tokens.tolist()}
    starts = [int(token_map.real.nonzero()[0]) for token_map in inputs.token_maps]
    assert len(inputs.token_maps[0].images) == 2

    def seen(layer, which, row, key):
        own = picture.get((which, row))
        same = own is not None and own == picture.get((which, key))
        return same or key - starts[which] < 2 or abs(row - key) < 3

    check(model, inputs, cl.sparse.IntraImage(sink=2, window=3), FULL, seen)


def test_intra_image_keeps_frames_apart(model):
    inputs = model.prepare(video(0))
    token_map = inputs.token_maps[0]
    frame = {position: token_map.frames(position) for position in token_map.visual.tolist()}
    assert len(set(frame.values())) > 1
    start = int(token_map.real.nonzero()[0])
    with model.sparse(
        cl.SparseInference((), cl.sparse.IntraImage(sink=1, window=1), engine="reference")
    ):
        _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_pattern"])
    pattern = cache["blocks.0.attn.hook_pattern"][0]
    for row in range(0, pattern.shape[1], 7):
        for key in range(row + 1):
            same = row in frame and frame[row] == frame.get(key)
            assert (pattern[:, row, key] > 0).all() == (same or key in (start, row))


def test_intra_image_needs_to_know_the_pictures(model, inputs):
    bare = dict(inputs.tensors)
    with (
        model.sparse(cl.SparseInference((), cl.sparse.IntraImage())),
        pytest.raises(cl.CorelensError, match="bare tensors"),
    ):
        model(**bare)


def test_vertical_slash_takes_the_columns_and_diagonals_of_most_attention(model, inputs):
    pattern = cl.sparse.VerticalSlash(vertical=4, slash=3, rows=5, sink=1, window=2)
    # the first layer sees the same whatever the pattern, so its choice is known from a dense run
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_pattern"])
    dense = cache["blocks.0.attn.hook_pattern"]
    wanted = torch.zeros_like(dense, dtype=torch.bool)
    for which, token_map in enumerate(inputs.token_maps):
        start, end = int(token_map.real.nonzero()[0]), int(token_map.real.nonzero()[-1]) + 1
        for head in range(dense.shape[1]):
            columns, diagonals = np.zeros(dense.shape[-1]), np.zeros(dense.shape[-1])
            for row in range(end - 5, end):
                for key in range(row + 1):
                    columns[key] += float(dense[which, head, row, key])
                    diagonals[row - key] += float(dense[which, head, row, key])
            columns[:start] = -np.inf  # padding takes no place
            columns[start] = np.inf
            diagonals[:2] = np.inf
            keys = {*np.argsort(-columns, kind="stable")[:4]}
            away = {*np.argsort(-diagonals, kind="stable")[:3]}
            for row in range(start, end):
                for key in range(start, row + 1):
                    wanted[which, head, row, key] = key in keys or row - key in away
    with model.sparse(cl.SparseInference((), pattern, engine="reference")):
        _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_pattern"])
    both = real(inputs)[:, None, :, None] & real(inputs)[:, None, None, :]
    left = cache["blocks.0.attn.hook_pattern"] > 0
    assert torch.equal(left & both, wanted)
    logits = [
        under(model, inputs, pattern, FULL, engine)[real(inputs)]
        for engine in ("split", "reference")
    ]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)


def test_prune_visual_hides_the_tokens_that_weighted_heads_do_not_look_at(model, inputs):
    rng = np.random.default_rng(0)
    scores = rng.random((model.cfg.n_layers, model.cfg.n_heads)).astype(np.float32)
    pattern = cl.sparse.PruneVisual(cl.HeadScores(scores), keep=0.25, after=1, rows=3)
    _, cache = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_pattern"])
    hidden = set()
    for which, token_map in enumerate(inputs.token_maps):
        end = int(token_map.real.nonzero()[-1]) + 1
        weight = {
            key: sum(
                float(scores[0, head])
                * float(cache["blocks.0.attn.hook_pattern"][which, head, row, key])
                for head in range(model.cfg.n_heads)
                for row in range(end - 3, end)
            )
            for key in token_map.visual.tolist()
        }
        count = len(weight) - round(0.25 * len(weight))
        hidden |= {(which, key) for key in sorted(weight, key=weight.get)[:count]}

    def seen(layer, which, row, key):
        return layer < 1 or row == key or (which, key) not in hidden

    check(model, inputs, pattern, (), seen)
    # a second run judges its own prompt
    other = model.prepare(sample(5, (96, 96)))
    torch.testing.assert_close(
        under(model, other, pattern, (), "split"), under(model, other, pattern, (), "reference"),
        atol=2e-4, rtol=1e-4,
    )  # fmt: skip


def test_full_layers_are_those_of_the_best_mean():
    scores = cl.HeadScores(np.array([[0.0, 1.0], [0.4, 0.4], [0.7, 0.6], [0.1, np.nan]]))
    assert cl.sparse.full_layers(scores, 0.25) == cl.HeadSet([(2, 0), (2, 1)])
    assert cl.sparse.full_layers(scores, 2) == cl.HeadSet([(0, 0), (0, 1), (2, 0), (2, 1)])
    with pytest.raises(cl.CorelensError, match="5 of 4 layers"):
        cl.sparse.full_layers(scores, 5)
