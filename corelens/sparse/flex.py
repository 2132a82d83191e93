"""The `flex` engine: one compiled FlexAttention call for all heads (Dong et al. 2024, arXiv
2412.05496).

Which blocks are empty or whole is found once for a prompt's shape, for full attention and for the
pattern; a layer's block mask takes from these two head by head. A pattern that tells heads apart is
looked at anew in every layer. What FlexAttention would not know (masks that a model makes of its
pictures, soft caps, sinks, gradients) goes to `split`.
"""

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from corelens.hooks.rows import Call
from corelens.sparse.split import causal_spans, split
from corelens.sparse.visible import MaskMod, Visible

KEPT = 8  # tables of blocks that are kept
_kept: dict[tuple[Any, ...], BlockMask] = {}


def flex(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    call: Call,
    compiled: bool = True,
) -> Float[Tensor, "batch pos head d_value"]:
    """Attention under the call's mask and pattern; without `compiled` it is slow, and runs
    anywhere."""
    visible = call.allowed
    assert isinstance(visible, Visible)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    known = (
        call.softcap is None and call.sink_logits is None and call.bias is None and not needs_grad
    )
    spans = causal_spans(call, visible) if known and visible.sees is not None else None
    if spans is None:
        return split(query, key, value, call)
    visible.ran.add("flex")
    run = torch.compile if compiled else _as_it_is
    # a hooked run asks that compiled code run as it was written: not this
    with torch.compiler.set_stance("default"):
        mask = _block_mask(
            visible, tuple((here.start, here.stop) for here in spans), query.shape[1], run
        )
        z = _once(run, flex_attention)(
            query, key, value, block_mask=mask, scale=call.scaling, enable_gqa=True
        )
    return z.transpose(1, 2)


def _block_mask(
    visible: Visible, spans: tuple[tuple[int, int], ...], heads: int, run: Callable[..., Any]
) -> BlockMask:
    """The block mask of one layer, heads apart."""
    assert visible.sees is not None
    length, device, of_pattern = len(visible.rows), visible.rows.device, visible.sees

    def create(mask_mod: MaskMod, n_heads: int) -> BlockMask:
        create = _once(run, create_block_mask)
        return create(mask_mod, len(spans), n_heads, length, length, device=device)

    def remembered(pattern: Any, mask_mod: MaskMod) -> BlockMask:
        name = (pattern, spans, length, device)
        if name not in _kept:
            if len(_kept) >= KEPT:
                del _kept[next(iter(_kept))]
            _kept[name] = create(mask_mod, 1)
        return _kept[name]

    first, end, full = visible.prompt.first, visible.prompt.end, visible.full

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k >= first[b]) & (k < end[b])

    def whole(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return causal(b, h, q, k) & (full[h] | of_pattern(b, h, q, k))

    # (lambdas: what FlexAttention is given must show its four arguments, which a decorated function
    # does not)
    if _tells_heads_apart(of_pattern, device) or not isinstance(visible.pattern, Hashable):
        return create(lambda b, h, q, k: whole(b, h, q, k), heads)
    every = remembered(None, lambda b, h, q, k: causal(b, h, q, k))
    part = remembered(
        visible.pattern, lambda b, h, q, k: causal(b, h, q, k) & of_pattern(b, h, q, k)
    )
    number, indices, whole_number, whole_indices = (
        torch.where(full.reshape(1, -1, *[1] * (of_full.ndim - 2)), of_full, of_part)
        for of_full, of_part in zip(_tables(every), _tables(part), strict=True)
    )
    return BlockMask.from_kv_blocks(
        number,
        indices,
        whole_number,
        whole_indices,
        BLOCK_SIZE=every.BLOCK_SIZE,
        mask_mod=lambda b, h, q, k: whole(b, h, q, k),
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


def _tables(mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    return mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices


def _tells_heads_apart(sees: MaskMod, device: torch.device) -> bool:
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    seen: Bool[Tensor, "b h q k"] = sees(zero, zero.expand(1, 2, 1, 1), zero, zero)
    return seen.shape[1] > 1


@cache
def _once(run: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return run(function)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
