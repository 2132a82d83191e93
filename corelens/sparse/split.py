"""The `split` engine of sparse prefill: full heads by SDPA, sparse heads over the keys that they
see. No mask of T² entries is made.

**Tiles** are for causal layers under a Streaming pattern, on a CPU. The first sink + window rows
see all earlier keys: plain causal attention. Every later row sees the sink and its window, which do
not overlap there. These rows are cut into tiles of C consecutive rows, with two calls for a tile:

- without a mask: its interior, the keys that all its rows see;
- with a mask: the sink, the C keys that leave the window within the tile, the tile's own C keys.

The two results are joined by their log-sum-exp. Query heads that share a KV head are rows of one
tile, so keys are never repeated.

**Chunks** are for all else (other masks, patterns and devices, gradients): some queries at a time,
over the keys that any of them sees.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from corelens.hooks.joined import flash, join, joinable
from corelens.hooks.rows import Call
from corelens.sparse.patterns import Streaming
from corelens.sparse.reference import reference
from corelens.sparse.visible import Visible

CHUNK = 256  # queries of a chunk
AT_ONCE = 8192  # rows whose tiles are computed in one call: bounds the memory
# rows of a tile, over all query heads of its KV head: the fastest of those measured
TILE = {torch.float32: 256}
TILE_OF_OTHER_DTYPES = 768


def split(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    call: Call,
) -> Float[Tensor, "batch pos head d_value"]:
    """Attention under the call's mask and pattern."""
    visible = call.allowed
    assert isinstance(visible, Visible)
    if call.softcap is not None or call.sink_logits is not None:
        return reference(query, key, value, call)  # SDPA supports neither
    if call.bias is not None or _additive(call.mask):
        return reference(query, key, value, call)
    visible.ran.add("split")
    # A static cache passes its whole room, with empty slots after the last row.
    if int(visible.keys[-1]) > int(visible.rows[-1]):
        held = int(visible.rows[-1] - visible.keys[0]) + 1
        key, value = key[:, :, :held], value[:, :, :held]
        visible = replace(visible, keys=visible.keys[:held])
        call = replace(call, mask=None if call.mask is None else call.mask[..., :held])
    group, full, sparse = query.shape[1] // key.shape[1], visible.full_heads, visible.sparse_heads
    # In memory [batch, pos, head, d], the layout of the result, so that its transpose is no copy.
    z = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    z = z.transpose(1, 2)
    spans = causal_spans(call, visible)
    if len(full) and spans is None:
        q, k, v = query[:, full], key[:, full // group], value[:, full // group]
        causal = call.mask is None and call.is_causal
        z[:, full] = sdpa(q, k, v, attn_mask=call.mask, is_causal=causal, scale=call.scaling)
    elif len(full):
        # One sample at a time, without its padding: then SDPA needs no mask and is faster.
        for sample, span in enumerate(spans or []):
            q, k, v = (x[sample : sample + 1, :, span] for x in (query, key, value))
            k, v = k[:, full // group], v[:, full // group]
            z_full = sdpa(q[:, full], k, v, is_causal=True, scale=call.scaling)
            z[sample, full, span] = z_full[0]
    if spans and isinstance(visible.pattern, Streaming) and joinable(query, key, value):
        for sample, span in enumerate(spans):
            for kv in range(key.shape[1]):
                heads = sparse[sparse // group == kv].tolist()
                if heads:
                    q = torch.stack([query[sample, head, span] for head in heads])
                    # In a model's memory the heads of a token lie side by side. Tiles read the same
                    # keys many times, which is faster from a contiguous copy.
                    k, v = key[sample, kv, span].contiguous(), value[sample, kv, span].contiguous()
                    z_heads = tiles(q, k, v, visible.pattern, call.scaling)
                    for head, z_head in zip(heads, z_heads, strict=True):
                        z[sample, head, span] = z_head
    elif len(sparse) and visible.sees is not None:
        z[:, sparse] = _chunked(query, key, value, sparse, call, visible)
    return z.transpose(1, 2)


def _additive(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def causal_spans(call: Call, visible: Visible) -> list[slice] | None:
    """The span of each sample's real tokens, if the layer's mask is causal attention within these
    spans; None if it is any other mask."""
    prompt = visible.prompt
    if len(visible.rows) != prompt.length or len(visible.keys) != prompt.length:
        return None
    ends = zip(prompt.first.tolist(), prompt.end.tolist(), strict=True)
    spans = [slice(first, end) for first, end in ends]
    if call.mask is None:
        return spans if call.is_causal and not prompt.padded else None
    for sample, span in enumerate(spans):
        mask = call.mask[
            sample % len(call.mask), 0
        ]  # one mask for all heads; perhaps for all samples
        for rows in visible.rows[span].split(CHUNK):
            causal = (visible.keys >= span.start) & (visible.keys <= rows[:, None])
            if not torch.equal(mask[rows], causal):
                return None
    return spans


# --- tiles


def tiles(
    query: Float[Tensor, "head pos d"],
    key: Float[Tensor, "pos d"],
    value: Float[Tensor, "pos d"],
    pattern: Streaming,
    scaling: float,
) -> Float[Tensor, "head pos d"]:
    """Causal attention under a Streaming pattern, for query heads that share one KV head, without
    padding."""
    heads, length, _ = query.shape
    z = torch.empty_like(query, memory_format=torch.contiguous_format)
    # The first rows, whose sink and window hold all earlier keys: plain causal attention.
    dense = min(length, pattern.sink + pattern.window)
    keys, values = _for_all_heads(key[:dense], heads), _for_all_heads(value[:dense], heads)
    z[:, :dense] = flash(query[None, :, :dense], keys, values, scaling, is_causal=True)[0][0]
    # The rows of a tile over all heads should be about TILE, in multiples of 32. A tile is no wider
    # than the window, so that its last row still sees its first key.
    rows_of_a_head = TILE.get(query.dtype, TILE_OF_OTHER_DTYPES) // heads // 32 * 32
    width = min(pattern.window, max(64, rows_of_a_head))
    start = dense
    while start < length:
        tile = min(width, length - start)  # the last tile may be narrower
        number = max(1, min(length - start, AT_ONCE) // tile)
        rows = slice(start, start + number * tile)
        z[:, rows] = _tiled(query[:, rows], key, value, start, tile, pattern, scaling)
        start = rows.stop
    if pattern.last and dense < length:
        z[:, -pattern.last :] = _last_rows(query[:, -pattern.last :], key, value, scaling)
    return z


def _tiled(
    query: Float[Tensor, "head pos d"],
    key: Float[Tensor, "key d"],
    value: Float[Tensor, "key d"],
    start: int,
    tile: int,
    pattern: Streaming,
    scaling: float,
) -> Float[Tensor, "head pos d"]:
    """Attention of several tiles of rows past sink + window.

    Args:
        query: the rows of all tiles.
        key, value: all of the prompt's.
        start: the position of the first row.
        tile: rows of a tile (in each head).
    """
    heads, rows, d = query.shape
    number, sink, window = rows // tile, pattern.sink, pattern.window
    q = query.reshape(heads, number, tile, d).transpose(0, 1).reshape(number, 1, heads * tile, d)

    def masked_part(x: Tensor) -> Tensor:
        """For each tile: the sink, the keys that leave the window within the tile, its own keys."""
        leaving = _windows(x, start - window, number, tile, tile)
        own = _windows(x, start, number, tile, tile)
        return torch.cat([x[:sink].expand(number, 1, sink, d), leaving, own], dim=2)

    # Row r is at position p + r, where p is the tile's first, and sees keys j with
    # p + r − window < j ≤ p + r. Column c of `leaving` is key p − window + c: visible if c > r.
    # Column c of `own` is key p + c: visible if c ≤ r.
    row, column = torch.arange(tile)[:, None], torch.arange(tile)[None]
    sees_sink = torch.ones(tile, sink, dtype=torch.bool)
    sees = torch.cat([sees_sink, column > row, column <= row], dim=1)
    mask = torch.zeros(sees.shape, dtype=q.dtype).masked_fill_(~sees, -torch.inf).repeat(heads, 1)
    z, log_sum = flash(q, masked_part(key), masked_part(value), scaling, mask=mask)
    # The interior: the keys between `leaving` and `own`, which every row of the tile sees.
    if inner := window - tile:
        keys, values = (_windows(x, start - inner, number, tile, inner) for x in (key, value))
        z = join(z, log_sum, *flash(q, keys, values, scaling))
    return z.reshape(number, heads, tile, d).transpose(0, 1).reshape(heads, rows, d)


def _last_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Float[Tensor, "head row d"]:
    """Attention of a prompt's last rows, which see all earlier keys: among themselves causal, and
    before them without a mask."""
    heads, rows, _ = query.shape
    before = len(key) - rows
    q, keys, values = query[None], _for_all_heads(key, heads), _for_all_heads(value, heads)
    z, log_sum = flash(q, keys[:, :, before:], values[:, :, before:], scaling, is_causal=True)
    if before:
        z = join(z, log_sum, *flash(q, keys[:, :, :before], values[:, :, :before], scaling))
    return z[0]


def _windows(
    x: Tensor, first: int, number: int, step: int, length: int
) -> Float[Tensor, "number 1 length d"]:
    """`number` slices of `length` keys of x [key, d], the first from `first` on, each next one
    `step` keys later: a view, although slices overlap."""
    of_key, of_feature = x.stride()
    shape, strides = (number, 1, length, x.shape[1]), (step * of_key, 0, of_key, of_feature)
    return x.as_strided(shape, strides, x.storage_offset() + first * of_key)


def _for_all_heads(x: Tensor, heads: int) -> Float[Tensor, "1 head key d"]:
    return x.expand(1, heads, *x.shape)


# --- chunks


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Int[Tensor, " some"],
    call: Call,
    visible: Visible,
) -> Float[Tensor, "batch some pos d"]:
    """Attention of chunks of queries over the keys that any query of the chunk sees."""
    query, group = query[:, heads], query.shape[1] // key.shape[1]
    chunks = []
    for rows in torch.arange(query.shape[2], device=query.device).split(CHUNK):
        if call.mask is None:
            hidden_by_model = visible.keys > visible.rows[rows][:, None]
        else:
            hidden_by_model = ~call.mask[:, :, rows]
        in_pattern = visible.pattern_of(heads, visible.rows[rows][None])
        assert in_pattern is not None
        # Heads that see the same keys share a call; under a pattern by head each has its own.
        same_for_all = in_pattern.shape[1] == 1
        slices = [slice(None)] if same_for_all else [slice(i, i + 1) for i in range(len(heads))]
        z = []
        for head_slice in slices:
            sees = (in_pattern if same_for_all else in_pattern[:, head_slice]) & ~hidden_by_model
            columns = sees.flatten(0, -2).any(0).nonzero()[:, 0]
            kv_heads = heads[head_slice] // group
            q = query[:, head_slice, rows]
            k, v = key[:, kv_heads][:, :, columns], value[:, kv_heads][:, :, columns]
            z.append(sdpa(q, k, v, attn_mask=sees[..., columns], scale=call.scaling))
        chunks.append(torch.cat(z, dim=1))
    return torch.cat(chunks, dim=2)
