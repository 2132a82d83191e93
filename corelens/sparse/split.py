"""The `split` engine: full heads through SDPA, sparse heads over the keys that they see; no T² mask
is ever made.

Where a layer attends causally and the pattern is Streaming, its first sink + window rows see
everything and are plain causal attention. Every other row sees the sink and its window, which do
not overlap there, and is computed in tiles of C rows: the keys that all rows of a tile see (its
interior) in one unmasked call, and the sink with the two edges of the window in a second, masked
one; the two are joined by their log-sum-exp. Query heads that share a KV head are rows of one tile,
so keys are never repeated. Elsewhere (masks of other forms, other patterns, gradients, other
devices than the CPU) queries go in chunks against the keys that any of them sees.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from corelens.hooks.rows import Call
from corelens.sparse.patterns import Streaming
from corelens.sparse.reference import reference
from corelens.sparse.visible import Visible

CHUNK = 256  # queries that go together where tiles do not apply
AT_ONCE = 8192  # rows whose tiles are copied at a time: bounds the memory
# rows of a tile, all heads of a KV head together (measured; other dtypes: 768)
TILE = {torch.float32: 256}


def split(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    call: Call,
) -> Float[Tensor, "batch pos head d_value"]:
    """Attention under the call's mask and pattern."""
    visible = call.allowed
    assert isinstance(visible, Visible)
    if (
        call.softcap is not None
        or call.sink_logits is not None
        or call.bias is not None
        or _additive(call.mask)
    ):
        return reference(query, key, value, call)  # SDPA knows none of these
    visible.ran.add("split")
    # A static cache hands over its whole room; what lies behind the last row is empty.
    if int(visible.keys[-1]) > int(visible.rows[-1]):
        held = int(visible.rows[-1] - visible.keys[0]) + 1
        visible, key, value = (
            replace(visible, keys=visible.keys[:held]),
            key[:, :, :held],
            value[:, :, :held],
        )
        call = replace(call, mask=None if call.mask is None else call.mask[..., :held])
    group, full, sparse = query.shape[1] // key.shape[1], visible.full_heads, visible.sparse_heads
    z = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]).transpose(
        1, 2
    )
    spans = causal_spans(call, visible)
    if len(full) and spans is None:
        q, k, v = query[:, full], key[:, full // group], value[:, full // group]
        causal = call.mask is None and call.is_causal
        z[:, full] = sdpa(q, k, v, attn_mask=call.mask, is_causal=causal, scale=call.scaling)
    elif len(full):
        for sample, here in enumerate(spans or []):
            q, k, v = (x[sample : sample + 1, :, here] for x in (query, key, value))
            of_full = sdpa(
                q[:, full],
                k[:, full // group],
                v[:, full // group],
                is_causal=True,
                scale=call.scaling,
            )
            z[sample, full, here] = of_full[0]
    if spans and isinstance(visible.pattern, Streaming) and _tiles_apply(query, key, value):
        for sample, here in enumerate(spans):
            for kv in range(key.shape[1]):
                heads = sparse[sparse // group == kv].tolist()
                if heads:
                    q = torch.stack([query[sample, head, here] for head in heads])
                    # A model lays heads side by side in memory. Tiles read the same keys again and
                    # again, which is faster from one piece.
                    k, v = key[sample, kv, here].contiguous(), value[sample, kv, here].contiguous()
                    for head, own in zip(
                        heads, tiles(q, k, v, visible.pattern, call.scaling), strict=True
                    ):
                        z[sample, head, here] = own
    elif len(sparse) and visible.sees is not None:
        z[:, sparse] = _chunked(query, key, value, sparse, call, visible)
    return z.transpose(1, 2)


def _additive(mask: Tensor | None) -> bool:
    return mask is not None and mask.dtype != torch.bool


def _tiles_apply(*tensors: Tensor) -> bool:
    """Whether the CPU kernel can run that gives log-sum-exp; no gradient goes through it."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    same_width = tensors[0].shape[-1] == tensors[2].shape[-1]
    return all(x.device.type == "cpu" for x in tensors) and not needs_grad and same_width


def causal_spans(call: Call, visible: Visible) -> list[slice] | None:
    """The span of each sample's real tokens, if the layer attends causally to just these; else
    None."""
    prompt, (first, end) = (
        visible.prompt,
        (visible.prompt.first.tolist(), visible.prompt.end.tolist()),
    )
    if len(visible.rows) != prompt.length or len(visible.keys) != prompt.length:
        return None
    spans = [slice(*span) for span in zip(first, end, strict=True)]
    if call.mask is None:
        return spans if call.is_causal and not prompt.padded else None
    for sample, here in enumerate(spans):
        mask = call.mask[sample % len(call.mask), 0]
        for rows in visible.rows[here].split(CHUNK):
            if not torch.equal(
                mask[rows], (visible.keys >= here.start) & (visible.keys <= rows[:, None])
            ):
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
    # rows whose sink and window leave nothing out
    dense = min(length, pattern.sink + pattern.window)
    z[:, :dense] = _flash(
        query[None, :, :dense],
        _spread(key[:dense], heads),
        _spread(value[:dense], heads),
        scaling,
        is_causal=True,
    )[0][0]
    # A tile of all heads together holds about TILE rows; it is no wider than the window, so that
    # its first row still sees the tile's first key.
    width = min(pattern.window, max(64, TILE.get(query.dtype, 768) // heads // 32 * 32))
    start = dense
    while start < length:
        tile = min(width, length - start)  # what is left at the end is one narrower tile
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
    """Attention of whole tiles of rows that lie past sink + window; `start` is the position of the
    first row."""
    heads, rows, d = query.shape
    number, sink, window = rows // tile, pattern.sink, pattern.window
    q = query.reshape(heads, number, tile, d).transpose(0, 1).reshape(number, 1, heads * tile, d)

    def edges(x: Tensor) -> Tensor:
        """The sink, and beside a tile's own keys those that leave the window while the tile goes
        on."""
        left, own = (
            _windows(x, start - window, number, tile, tile),
            _windows(x, start, number, tile, tile),
        )
        return torch.cat([x[:sink].expand(number, 1, sink, d), left, own], dim=2)

    # Row r of a tile sees, of the keys that leave the window while the tile goes on, those behind
    # its own place (column > row), and of the tile's own keys those up to itself (column <= row).
    row, column = torch.arange(tile)[:, None], torch.arange(tile)[None]
    seen = torch.cat([torch.ones(tile, sink, dtype=torch.bool), column > row, column <= row], dim=1)
    hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf).repeat(heads, 1)
    z, log_sum = _flash(q, edges(key), edges(value), scaling, mask=hidden)
    # The interior: the keys between these two edges, which every row of the tile sees, unmasked.
    if inner := window - tile:
        keys, values = (_windows(x, start - inner, number, tile, inner) for x in (key, value))
        z = _join(z, log_sum, *_flash(q, keys, values, scaling))
    return z.reshape(number, heads, tile, d).transpose(0, 1).reshape(heads, rows, d)


def _last_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float
) -> Float[Tensor, "head row d"]:
    """Attention of the last rows of a prompt, which see everything."""
    heads, rows, _ = query.shape
    before = len(key) - rows
    keys, values = _spread(key, heads), _spread(value, heads)
    z, log_sum = _flash(
        query[None], keys[:, :, before:], values[:, :, before:], scaling, is_causal=True
    )
    if before:
        z = _join(
            z, log_sum, *_flash(query[None], keys[:, :, :before], values[:, :, :before], scaling)
        )
    return z[0]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "n head row d"], Float[Tensor, "n head row"]]:
    """SDPA's own kernel, with the log-sum-exp of the scores beside z."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
    )


def _join(z: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> Tensor:
    """Attention over two sets of keys from attention over each: weights are the shares of
    exp-sums.

    With L = log Σ exp(scores) of each set, the second has the share exp(L₂) / (exp(L₁) + exp(L₂)) =
    sigmoid(L₂ − L₁) of the whole softmax.
    """
    return torch.lerp(z, other, torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1).to(z.dtype))


def _windows(
    x: Tensor, first: int, number: int, step: int, length: int
) -> Float[Tensor, "number 1 length d"]:
    """Overlapping stretches of x [key, d], each `step` further on; nothing is copied."""
    line = x.stride(0)
    shape, strides = (number, 1, length, x.shape[1]), (step * line, 0, line, x.stride(1))
    return x.as_strided(shape, strides, x.storage_offset() + first * line)


def _spread(x: Tensor, heads: int) -> Float[Tensor, "1 head key d"]:
    return x.expand(1, heads, *x.shape)


# --- everywhere else


def _chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Int[Tensor, " some"],
    call: Call,
    visible: Visible,
) -> Float[Tensor, "batch some pos d"]:
    """Attention of chunks of queries over the keys that any of them sees; heads go together if they
    see the same."""
    query, group = query[:, heads], query.shape[1] // key.shape[1]
    chunks = []
    for rows in torch.arange(query.shape[2], device=query.device).split(CHUNK):
        model_hides = (
            visible.keys > visible.rows[rows][:, None]
            if call.mask is None
            else ~call.mask[:, :, rows]
        )
        left = visible.pattern_of(heads, visible.rows[rows][None])
        assert left is not None
        together = (
            [slice(None)] if left.shape[1] == 1 else [slice(i, i + 1) for i in range(len(heads))]
        )
        z = []
        for head_slice in together:
            seen = (left if left.shape[1] == 1 else left[:, head_slice]) & ~model_hides
            columns = seen.flatten(0, -2).any(0).nonzero()[:, 0]
            of = heads[head_slice] // group
            k, v = key[:, of][:, :, columns], value[:, of][:, :, columns]
            z.append(
                sdpa(
                    query[:, head_slice, rows],
                    k,
                    v,
                    attn_mask=seen[..., columns],
                    scale=call.scaling,
                )
            )
        chunks.append(torch.cat(z, dim=1))
    return torch.cat(chunks, dim=2)
