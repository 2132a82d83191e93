"""Which keys of the prompt a KV head keeps: those to which the last rows attend most (SnapKV), or
sink and window."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hooks.rows import Call, row_scores, softmax
from corelens.sparse.prompt import Prompt

POOL = 5  # neighbouring keys that share their attention, as in SnapKV
# attention of the last rows is built in chunks of at most this many numbers (128 MB)
CHUNK_ELEMENTS = 1 << 25


def real_keys(prompt: Prompt, total: int) -> Bool[Tensor, "batch key"]:
    """Which of the first `total` positions are not padding."""
    positions = torch.arange(total, device=prompt.first.device)
    return (positions >= prompt.first[:, None]) & (positions < prompt.end[:, None])


def last_keys(prompt: Prompt, total: int, window: int) -> Bool[Tensor, "batch key"]:
    """The last `window` real positions of the prompt."""
    positions = torch.arange(total, device=prompt.first.device)
    return real_keys(prompt, total) & (positions >= prompt.end[:, None] - window)


def observed(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    call: Call,
    prompt: Prompt,
    window: int,
) -> Float[Tensor, "batch kv_head key"]:
    """The attention of the prompt's last `window` rows on each earlier key (SnapKV, arXiv
    2404.14469).

    It is averaged over these rows and over the query heads of a group, then average-pooled by 5
    along the keys before the window. Edge edits are in it. −∞ for padding and for the window.

    Raises:
        CorelensError: a prompt in parts, the last of which is shorter than the window.
    """
    total, kv_heads = key.shape[2], key.shape[1]
    group, before = query.shape[1] // kv_heads, total - query.shape[2]
    rows = prompt.end[:, None] - window + torch.arange(window, device=query.device)  # [batch, row]
    valid = rows >= prompt.first[:, None]
    if (valid & (rows < before)).any():
        raise CorelensError(
            f"the last {query.shape[2]} tokens of a prompt in parts",
            f"the {window} whose attention a KV budget reads",
            "take another prefill_chunk_size, or none",
        )
    chunk = max(1, CHUNK_ELEMENTS // (query.shape[0] * group * window * total))
    earlier = real_keys(prompt, total) & ~last_keys(prompt, total, window)
    by_kv_head = []
    for first_kv in range(0, kv_heads, chunk):
        heads = slice(first_kv * group, (first_kv + chunk) * group)
        numbers = torch.arange(query.shape[1], device=query.device)[heads]
        part = _of_heads(call, numbers)
        scores = row_scores(
            query[:, heads],
            key[:, first_kv : first_kv + chunk],
            (rows - before).clamp(min=0),
            None,
            part,
        )
        if call.edit is not None:
            scores = call.edit(scores, torch.where(valid, rows, -1), numbers)
        pattern = softmax(scores, part.sink_logits).masked_fill(~valid[:, None, :, None], 0.0)
        attention = pattern.sum(dim=2)
        by_kv_head.append(reduce(attention, "batch (kv g) key -> batch kv key", "mean", g=group))
    mean = torch.cat(by_kv_head, dim=1) / valid.sum(dim=1)[:, None, None]
    pooled = nn.functional.avg_pool1d(
        mean.masked_fill(~earlier[:, None], 0.0), POOL, stride=1, padding=POOL // 2
    )
    return pooled.masked_fill(~earlier[:, None], -torch.inf)


def highest(
    attention: Float[Tensor, "batch kv_head key"],
    prompt: Prompt,
    capacity: Int[Tensor, "batch kv_head"],
    window: int,
) -> Bool[Tensor, "batch kv_head key"]:
    """A mask of `capacity` keys for each KV head: the prompt's last `window`, and of the others
    those with most attention."""
    # Heads have different capacities: the largest number is sorted out for all, then cut by head.
    earlier = (capacity - window).clamp(min=0)
    order = attention.topk(min(int(earlier.max()), attention.shape[2]), dim=2).indices
    is_kept = torch.arange(order.shape[2], device=order.device) < earlier[..., None]
    keep = torch.zeros_like(attention, dtype=torch.bool).scatter_(2, order, is_kept)
    keep &= attention > -torch.inf
    return keep | last_keys(prompt, attention.shape[2], window)[:, None]


def among_heads(
    attention: Float[Tensor, "batch kv_head key"],
    capacity: Int[Tensor, "batch kv_head"],
    window: int,
    alpha: float,
) -> Int[Tensor, "batch kv_head"]:
    """AdaKV (arXiv 2407.11550): one layer's capacities, moved to the heads whose keys get most
    attention.

    With B = capacity − window, and n_h the number of keys of head h among the layer's Σ_h B keys
    with most attention: (1 − α) · n_h + α · B + window.
    """
    budget, keys = (capacity - window).clamp(min=0), attention.shape[2]
    of_layer = budget.sum(dim=1, keepdim=True)
    all_heads = attention.flatten(1)
    order = all_heads.topk(min(int(of_layer.max()), all_heads.shape[1]), dim=1).indices
    is_top = torch.arange(order.shape[1], device=order.device) < of_layer
    is_top &= all_heads.gather(1, order) > -torch.inf
    n_top = torch.zeros_like(capacity).scatter_add_(1, order // keys, is_top.to(capacity.dtype))
    return torch.round(n_top * (1 - alpha) + alpha * budget).long() + window


def sink_and_window(
    prompt: Prompt, total: int, kinds: Sequence[str], sink: int, window: int
) -> Bool[Tensor, "batch kv_head key"]:
    """Full KV heads keep every real key, sparse ones the first `sink` and the last `window`, pruned
    ones none."""
    real = real_keys(prompt, total)
    positions = torch.arange(total, device=real.device)
    sparse = (real & (positions < prompt.first[:, None] + sink)) | last_keys(prompt, total, window)
    return torch.stack(
        [{"full": real, "sparse": sparse, "pruned": torch.zeros_like(real)}[k] for k in kinds],
        dim=1,
    )


def _of_heads(call: Call, heads: Int[Tensor, " some"]) -> Call:
    """The call, cut to these query heads."""

    def of(x: Tensor | None) -> Tensor | None:
        return x[:, heads] if x is not None and x.shape[1] > 1 else x

    allowed = None if call.allowed is None else lambda rows, _: call.allowed(rows, heads)  # type: ignore[misc]
    sink_logits = None if call.sink_logits is None else call.sink_logits[heads]
    return replace(
        call, mask=of(call.mask), bias=of(call.bias), sink_logits=sink_logits, allowed=allowed
    )
