"""The attention function on calls made by hand: soft caps, sinks, biases, every kind of mask,
against the book."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as eager_with_softcap
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as eager_with_sinks

from corelens.hooks.attention_function import attention
from corelens.hooks.points import AttentionPoints
from corelens.hooks.running import Running, Step, running

BATCH, HEADS, KV, POS, D = 2, 4, 2, 7, 8


class Site(nn.Module):
    """What an attention module tells the attention function."""

    layer_idx, is_causal, num_key_value_groups = 0, True, HEADS // KV

    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))


def qkv(seed: int = 0, keys: int = POS):
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, POS, D), (BATCH, KV, keys, D), (BATCH, KV, keys, D)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def masks():
    causal = torch.ones(POS, POS, dtype=torch.bool).tril()
    padded = causal.expand(BATCH, 1, POS, POS).clone()
    padded[1, ..., :2] = False  # left padding: the first two rows of the second sample see nothing
    both_ways = padded.clone()
    both_ways[:, :, :4, :4] = True
    window = padded & ~torch.ones(POS, POS, dtype=torch.bool).tril(-3)
    return {"causal": None, "padded": padded, "prefix": both_ways, "window": window}


def additive(mask, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def run(site, q, k, v, mask, names, functions=None, **kwargs):
    """z, and what the named points saw."""
    points, seen = AttentionPoints(HEADS, KV), {}
    for name, point in points.named_children():
        point.name = name
    for name in names:

        def keep(x, hook):
            seen[hook.name] = x.clone()

        getattr(points, name).add_hook(keep)
    for name, function in (functions or {}).items():
        getattr(points, name).add_hook(function)
    positions = torch.arange(k.shape[2] - q.shape[2], k.shape[2])
    rows = torch.tensor([[1, 4, 6], [5, 6, -1]])
    step = Step(None, positions, rows, cached=False)
    with running(Running(sites={site: points}, step=step)):
        return attention(site, q, k, v, mask, scaling=0.3, **kwargs)[0], seen


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "sinks": {"s_aux": None},
    "bias": {"position_bias": None},
}


@torch.no_grad()
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_every_way_through_the_function_is_the_definition(mask, option, form):
    site, (q, k, v) = Site(), qkv()
    allowed = masks()[mask]
    mask = allowed if form == "boolean" or allowed is None else additive(allowed)
    allowed = (
        torch.ones(POS, POS, dtype=torch.bool).tril().expand(BATCH, 1, POS, POS)
        if allowed is None
        else allowed
    )
    kwargs = dict(OPTIONS[option])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    if option == "bias":
        kwargs["position_bias"] = torch.randn(1, HEADS, POS, POS)
        scores = scores + kwargs["position_bias"]
    if option == "softcap":
        scores = torch.tanh(scores / 1.5) * 1.5
    scores = scores.masked_fill(~allowed, -torch.inf)
    extra = torch.zeros_like(scores[..., :1])
    if option == "sinks":
        kwargs["s_aux"] = site.sinks
        extra = extra + site.sinks.reshape(1, -1, 1, 1).exp()
    weights = scores.exp()
    pattern = torch.nan_to_num(weights / (weights.sum(-1, keepdim=True) + extra))
    wanted = (pattern @ v.repeat_interleave(2, 1)).transpose(1, 2)
    close = {"atol": 1e-5, "rtol": 1e-5}
    sees = allowed.any(-1)[:, 0]
    for names in ([], ["hook_z"], ["hook_pattern", "hook_attn_scores"], ["hook_pattern_rows"],
                  ["hook_pattern", "hook_pattern_rows"]):  # fmt: skip
        z, seen = run(site, q, k, v, mask, names, **kwargs)
        # (what SDPA gives a padding row that sees nothing depends on the form of the mask)
        torch.testing.assert_close(z[sees], wanted[sees], **close)
        if "hook_pattern" in seen:
            torch.testing.assert_close(seen["hook_pattern"], pattern, **close)
            real = allowed.any(-1, keepdim=True) & (scores > -torch.inf)
            if names[-1] == "hook_attn_scores":
                torch.testing.assert_close(seen["hook_attn_scores"][real], scores[real], **close)
                assert (seen["hook_attn_scores"][~real] == -torch.inf).all()
        if "hook_pattern_rows" in seen:
            torch.testing.assert_close(
                seen["hook_pattern_rows"][0], pattern[0][:, [1, 4, 6]], **close
            )
            torch.testing.assert_close(
                seen["hook_pattern_rows"][1][:, :2], pattern[1][:, [5, 6]], **close
            )
            assert (seen["hook_pattern_rows"][1][:, 2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("option", ["softcap", "sinks"])
def test_soft_caps_and_sinks_are_those_of_transformers(option):
    site, (q, k, v) = Site(), qkv()
    mask = additive(torch.ones(POS, POS, dtype=torch.bool).tril().expand(BATCH, 1, POS, POS))
    if option == "softcap":
        wanted, pattern = eager_with_softcap(site, q, k, v, mask, scaling=0.3, softcap=1.5)
        kwargs = {"softcap": 1.5}
    else:
        wanted, pattern = eager_with_sinks(site, q, k, v, mask, scaling=0.3)
        kwargs = {"s_aux": site.sinks}
    for names in (["hook_z"], ["hook_pattern"], ["hook_pattern_rows"]):
        z, seen = run(site, q, k, v, mask, names, **kwargs)
        torch.testing.assert_close(z, wanted, atol=1e-5, rtol=1e-5)
    _, seen = run(site, q, k, v, mask, ["hook_pattern"], **kwargs)
    torch.testing.assert_close(seen["hook_pattern"], pattern, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("option", ["plain", "softcap", "sinks"])
def test_an_edge_edit_is_the_same_edit_of_dense_scores(option):
    site, (q, k, v) = Site(), qkv()
    kwargs = {"softcap": {"softcap": 1.5}, "sinks": {"s_aux": site.sinks}, "plain": {}}[option]

    def cut(edges, hook):
        edges.cut([1, 2], [3, 5], [0, 2])
        edges.add([0], [6], [1], 2.0)

    def dense(x, hook):
        for head in (1, 2):
            for row in (3, 5):
                x[:, head, row, [0, 2]] = -torch.inf
        x[:, 0, 6, 1] += 2.0

    fast, _ = run(site, q, k, v, None, [], {"hook_edges": cut}, **kwargs)
    slow, _ = run(site, q, k, v, None, [], {"hook_attn_scores": dense}, **kwargs)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    plain, _ = run(site, q, k, v, None, ["hook_z"], **kwargs)
    changed = (fast - plain).abs().amax((0, 3)) > 1e-6
    assert changed.nonzero().tolist() == [[3, 1], [3, 2], [5, 1], [5, 2], [6, 0]]
