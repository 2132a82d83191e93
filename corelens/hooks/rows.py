"""Scores, pattern and z of some rows of attention, computed from q and k in O(rows × T) memory.

Scores and softmax are in float32, whatever the model's dtype. Grouped KV heads are never repeated
in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the attention function that decide which query may attend to
    which key, and how strongly.

    Args:
        module: the attention module that calls.
        mask: None, boolean or additive, [1|batch, 1|head, pos, key].
        scaling: factor of the scores.
        is_causal: whether a missing mask means a causal one.
        softcap: c of c · tanh(scores / c), or None.
        sink_logits: of models with attention sinks, each head's extra score in the softmax, which
            belongs to no key; else None.
        bias: added to the scores, [1, head, pos, key], or None.
        allowed: (rows, heads) → the keys that a sparse plan lets them see; None without a plan.
        edit: (scores, positions, heads) → the scores after the edge edits; None without edits.
        arguments: all keyword arguments of the call, to pass them on to transformers' function.
    """

    module: nn.Module
    mask: Tensor | None
    scaling: float
    is_causal: bool
    softcap: float | None
    sink_logits: Float[Tensor, " head"] | None
    bias: Tensor | None
    allowed: Callable[[Tensor | None, Tensor | None], Tensor] | None = None
    edit: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> "Call":
        """The Call of a module, from the keyword arguments that transformers gives attention
        functions."""
        scaling, is_causal = arguments.get("scaling"), arguments.get("is_causal")
        return cls(
            module=module,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
            softcap=arguments.get("softcap"),
            sink_logits=arguments.get("s_aux"),
            bias=arguments.get("position_bias"),
            arguments=arguments,
        )


def row_scores(
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    rows: Int[Tensor, "batch row"] | None,
    heads: Int[Tensor, " some"] | None,
    call: Call,
) -> Float[Tensor, "batch some row key"]:
    """Masked scores of some rows (counted within this step; None: all) and heads (None: all), −inf
    where hidden."""
    if rows is None:
        q = query.float() * call.scaling
    else:
        batch = torch.arange(query.shape[0], device=query.device)[:, None]
        selected = query[batch, :, rows]  # type: ignore[arg-type]
        q = rearrange(selected, "batch row head d -> batch head row d").float() * call.scaling
    group = query.shape[1] // key.shape[1]
    if heads is None:
        q = rearrange(q, "batch (kv g) row d -> batch kv (g row) d", g=group)
        scores = rearrange(
            q @ key.float().transpose(-1, -2),
            "batch kv (g row) key -> batch (kv g) row key",
            g=group,
        )
    else:
        scores = q[:, heads] @ key[:, heads // group].float().transpose(-1, -2)
    if call.bias is not None:
        scores = scores + _select(call.bias, rows, heads, scores.shape)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    # The masks are filled in place: scores are the largest tensor here, and no backward pass needs
    # their old values.
    if call.mask is None:
        # Causal: key j is hidden from row i where j > i. That also hides the empty slots at the end
        # of a static cache.
        if call.is_causal and query.shape[2] > 1:
            every_row = torch.arange(query.shape[2], device=query.device)[None]
            row_numbers = every_row if rows is None else rows
            hidden = torch.arange(scores.shape[-1], device=query.device) > row_numbers[..., None]
            scores = scores.masked_fill_(hidden[:, None], -torch.inf)
    else:
        mask = _select(call.mask, rows, heads, scores.shape)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill_(~mask, -torch.inf)
        else:  # an additive mask hides by the lowest number of its dtype
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            scores = (scores + mask).masked_fill_(hidden, -torch.inf)
    if call.allowed is not None:
        scores = scores.masked_fill_(~call.allowed(rows, heads), -torch.inf)
    return scores


def _select(
    mask: Tensor,
    rows: Int[Tensor, "batch row"] | None,
    heads: Int[Tensor, " some"] | None,
    shape: torch.Size,
) -> Tensor:
    """The part of a mask [1|batch, 1|head, pos, key] for these rows and heads (all if None)."""
    if heads is not None and mask.shape[1] > 1:
        mask = mask[:, heads]
    mask = mask[..., : shape[-1]]
    if rows is None:
        return mask
    mask = mask.expand(rows.shape[0], -1, -1, -1)
    batch = torch.arange(rows.shape[0], device=mask.device)[:, None]
    return rearrange(
        mask[batch, :, rows.to(mask.device)], "batch row head key -> batch head row key"
    )


def softmax(
    scores: Float[Tensor, "batch some row key"], sink_logits: Float[Tensor, " some"] | None
) -> Float[Tensor, "batch some row key"]:
    """Softmax over keys; a row that may see no key gets zeros, as in SDPA.

    A sink logit is one more score in the softmax whose probability is then dropped: the pattern of
    such a row sums to less than 1.
    """
    if sink_logits is not None:
        sink = sink_logits.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    sees_nothing = scores.amax(dim=-1, keepdim=True) == -torch.inf
    if not sees_nothing.any():
        return scores.softmax(dim=-1)
    return scores.masked_fill(sees_nothing, 0.0).softmax(dim=-1).masked_fill(sees_nothing, 0.0)


def mix(
    pattern: Float[Tensor, "batch some row key"],
    value: Float[Tensor, "batch kv_head key d"],
    heads: Int[Tensor, " some"] | None,
    n_heads: int,
) -> Float[Tensor, "batch row some d"]:
    """pattern · v, head by head."""
    pattern = pattern.to(value.dtype)
    group = n_heads // value.shape[1]
    if heads is not None:
        return (pattern @ value[:, heads // group]).transpose(1, 2)
    z = rearrange(pattern, "batch (kv g) row key -> batch kv (g row) key", g=group) @ value
    return rearrange(z, "batch kv (g row) d -> batch row (kv g) d", g=group)


def rows_z(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None, heads: Tensor | None,
    call: Call,
    edit: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> tuple[Float[Tensor, "batch row some d"], Float[Tensor, "batch some row key"]]:  # fmt: skip
    """(z, pattern) of some rows and heads; `edit` changes their scores before the softmax."""
    sink_logits = call.sink_logits
    if sink_logits is not None and heads is not None:
        sink_logits = sink_logits[heads]
    pattern = softmax(edit(row_scores(query, key, rows, heads, call)), sink_logits)
    return mix(pattern, value, heads, query.shape[1]), pattern


class KeyAxis:
    """The key axis that hooks see has one entry for each position so far; that of a KV cache may
    be shorter or longer. This class converts between the two.

    Args:
        held: how many keys the cache holds.
        total: how many positions there are so far.
    """

    def __init__(self, held: int, total: int):
        self.held, self.total = held, total
        self.first = max(total - held, 0)  # a sliding window's cache dropped the keys before this

    def show(self, x: Tensor, fill: float) -> Tensor:
        """x [..., held] as hooks see it: [..., total], with `fill` for keys that were dropped."""
        x = x[..., : self.total]  # without the empty slots of a static cache
        return nn.functional.pad(x, (self.first, 0), value=fill) if self.first else x

    def take(self, x: Tensor, fill: float) -> Tensor:
        """The inverse of `show`: x [..., total] as the cache has it, [..., held]."""
        x = x[..., self.first :]
        empty = self.held - x.shape[-1]
        return nn.functional.pad(x, (0, empty), value=fill) if empty > 0 else x
