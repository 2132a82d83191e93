"""Runs of one batch that share the tokens before them: keys and values of this prefix are stored
once, not once a run.

The cache that such runs are called with holds the prefix of each sample, and its layers pass on the
keys of the new tokens alone. CoreLens's attention function (every layer has to run through it) adds
the prefix: as a second set of keys, or, where the kernel for that does not fit, by repeating it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from corelens.hooks.joined import flash, join, joinable
from corelens.hooks.rows import Call


class SharedPrefix(DynamicCache):
    """A KV cache whose tokens all runs of a sample share. It counts as long as the prefix, and
    stores nothing more."""

    def hold(
        self,
        layer: int,
        key: Float[Tensor, "sample kv_head key d"],
        value: Float[Tensor, "sample kv_head key d_value"],
    ) -> None:
        """Store a layer's prefix; the layers in order."""
        super().update(key, value, layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of the new tokens as they are, without the prefix."""
        return key_states, value_states

    def of(self, layer: int) -> "Prefix":
        """A layer's prefix."""
        held = self.layers[layer]
        return Prefix(held.keys, held.values)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of one layer before the first row that runs, for each sample once.

    Args:
        key, value: after rotary, as attention uses them.
    """

    key: Float[Tensor, "sample kv_head key d"]
    value: Float[Tensor, "sample kv_head key d_value"]

    def before(
        self, key: Float[Tensor, "batch kv_head pos d"], value: Float[Tensor, "batch kv_head pos e"]
    ) -> tuple[Float[Tensor, "batch kv_head key d"], Float[Tensor, "batch kv_head key e"]]:
        """Keys and values of the prefix and of these tokens, repeated for each run."""
        runs = len(key) // len(self.key)
        return (
            torch.cat([self.key.repeat_interleave(runs, dim=0), key], dim=2),
            torch.cat([self.value.repeat_interleave(runs, dim=0), value], dim=2),
        )

    def z(
        self,
        query: Float[Tensor, "batch head pos d"],
        key: Float[Tensor, "batch kv_head pos d"],
        value: Float[Tensor, "batch kv_head pos d_value"],
        call: Call,
    ) -> Float[Tensor, "batch pos head d_value"] | None:
        """z of rows that see the whole prefix, and among themselves the earlier ones; None if that
        is not this call's attention, or the kernel does not support it.

        Element i·runs + j of the batch is run j of sample i. All runs of a sample, and all query
        heads that share a KV head, are rows of one call over the sample's prefix.
        """
        extras = (call.softcap, call.sink_logits, call.bias)
        if any(x is not None for x in extras) or call.arguments.get("dropout"):
            return None
        if not joinable(query, key, value, self.key, self.value):
            return None
        if not _sees_all_before(call.mask, self.key.shape[2], query.shape[2]):
            return None
        sizes = {"n": len(self.key), "kv": key.shape[1], "row": query.shape[2]}
        group = query.shape[1] // key.shape[1]
        own_keys, own_values = (x.repeat_interleave(group, dim=1) for x in (key, value))
        own, own_sum = flash(query, own_keys, own_values, call.scaling, is_causal=True)
        folded = rearrange(query, "(n run) (kv g) row d -> n kv (run g row) d", g=group, **sizes)
        z, log_sum = flash(folded, self.key, self.value, call.scaling)
        z = rearrange(z, "n kv (run g row) d -> (n run) (kv g) row d", g=group, **sizes)
        log_sum = rearrange(log_sum, "n kv (run g row) -> (n run) (kv g) row", g=group, **sizes)
        return join(own, own_sum, z, log_sum).transpose(1, 2)


def _sees_all_before(mask: Tensor | None, prefix: int, rows: int) -> bool:
    """Whether under this mask [batch, head, row, key] every row sees the prefix, and of the rows
    those up to itself. (Without a mask it does if it is a single one.)"""
    if mask is None:
        return rows == 1
    allowed = mask if mask.dtype == torch.bool else mask == 0
    own = torch.ones(rows, rows, dtype=torch.bool, device=mask.device).tril()
    earlier, later = allowed[..., :prefix], allowed[..., prefix : prefix + rows]
    return bool(earlier.all()) and bool((later == own).all())
