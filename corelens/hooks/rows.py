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
    """The arguments of one call of the attention function that decide who may see whom, and how
    strongly.

    Args:
        module: the attention module that calls.
        mask: None, boolean or additive, [1|batch, 1|head, pos, key].
        scaling: factor of the scores.
        is_causal: whether a missing mask means a causal one.
        softcap: c of c · tanh(scores / c), or None.
        sinks: a score a head that takes its share of the softmax, or None.
        bias: added to the scores, [1, head, pos, key], or None.
        allowed: (rows, heads) → which keys a sparse plan leaves them.
        edit: (scores, positions, heads) → the scores with edge edits made.
        arguments: all keyword arguments as they came, for the function that is called in our place.
    """

    module: nn.Module
    mask: Tensor | None
    scaling: float
    is_causal: bool
    softcap: float | None
    sinks: Float[Tensor, " head"] | None
    bias: Tensor | None
    allowed: Callable[[Tensor | None, Tensor | None], Tensor] | None = None
    edit: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, module: nn.Module, query: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> "Call":
        """What a module asks for with the keyword arguments of transformers' attention
        functions."""
        scaling, is_causal = arguments.get("scaling"), arguments.get("is_causal")
        return cls(
            module=module,
            mask=mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
            softcap=arguments.get("softcap"),
            sinks=arguments.get("s_aux"),
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
        q = (
            rearrange(query[batch, :, rows], "batch row head d -> batch head row d").float()
            * call.scaling
        )  # type: ignore[arg-type]
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
    # (in place: nothing keeps these numbers for a backward pass, and they are the largest there
    # are)
    if call.mask is None:
        # a static cache's empty tail lies beyond every row
        if call.is_causal and query.shape[2] > 1:
            places = (
                torch.arange(query.shape[2], device=query.device)[None] if rows is None else rows
            )
            hidden = torch.arange(scores.shape[-1], device=query.device) > places[..., None]
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
    """The lines of a mask [1|batch, 1|head, pos, key] that belong to these rows and heads."""
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
    scores: Float[Tensor, "batch some row key"], sinks: Float[Tensor, " some"] | None
) -> Float[Tensor, "batch some row key"]:
    """Softmax over keys; a row that sees nothing is 0, as in SDPA. A sink takes its share and
    leaves the rest."""
    if sinks is not None:
        sink = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    blind = scores.amax(dim=-1, keepdim=True) == -torch.inf
    if not blind.any():
        return scores.softmax(dim=-1)
    return scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0)


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
    sinks = call.sinks if call.sinks is None or heads is None else call.sinks[heads]
    pattern = softmax(edit(row_scores(query, key, rows, heads, call)), sinks)
    return mix(pattern, value, heads, query.shape[1]), pattern


class KeyAxis:
    """The key axis that hooks see is the position in the padded row: what a cache holds is cut or
    padded to that."""

    def __init__(self, held: int, total: int):
        self.held, self.total = held, total
        self.first = max(total - held, 0)  # a sliding cache has let go of the first ones

    def show(self, x: Tensor, fill: float) -> Tensor:
        x = x[..., : self.total]  # a static cache holds more than was seen
        return nn.functional.pad(x, (self.first, 0), value=fill) if self.first else x

    def take(self, x: Tensor, fill: float) -> Tensor:
        x = x[..., self.first :]
        return (
            nn.functional.pad(x, (0, self.held - x.shape[-1]), value=fill)
            if x.shape[-1] < self.held
            else x
        )
