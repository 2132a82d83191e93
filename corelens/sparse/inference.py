"""SparseInference: which keys heads leave out. Plan: one run under a SparseInference.

The contract between the parts of sparse inference:

- Within `model.sparse(sparse)` each run makes a Plan by `sparse.plan(model.cfg)`. The attention
  function asks it at every call of the decoder's attention. Vision attention is never changed.
- `plan.begin(…)` is called when a forward of the decoder begins. Then `plan.prompt` says where the
  prompt's real tokens are, `plan.decoding` whether this step generates, and `plan.total` how many
  positions there are so far.
- `plan.new_cache()` makes a `corelens.sparse.cache.RaggedCache` where decoding is not "full" or a
  KV budget is given. Beside the interface of a transformers `Cache` it has:

  .update(key, value, layer_idx)
      at prefill: stores and returns all keys and values; at a decode step: appends the new token
      (its return value is not used)
  .evict(layer_idx, query, call)
      called once for each layer, after its attention over the prompt; query [batch, head, pos, d]
      as attention used it (SnapKV reads its last real rows)
  .attend(layer_idx, query, call)
      a decode step's attention over the stored tokens: z [batch, 1, head, d]
  .dense(layer_idx)
      the stored tokens by position: key and value [batch, kv_head, total, d], 0 where evicted, and
      their mask [batch, kv_head, total], bool. Hooks on pattern, rows and edges of a decode step
      see and edit these
  .positions(layer_idx)
      the positions of the stored tokens: for each sample a list of a tensor for each KV head
  .get_seq_length()
      how many tokens were seen so far, those that were evicted included

At a decode step a query head sees what its KV head stores. So a sparse query head that shares a KV
head with a full one sees all. Under decode="full" every head sees all keys at decode steps.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.hooks.points import AttentionPoints
from corelens.hooks.rows import Call
from corelens.sparse.block_sparse import BlockSparse
from corelens.sparse.budget import KVBudget
from corelens.sparse.intra_image import IntraImage
from corelens.sparse.patterns import Pruned, Streaming
from corelens.sparse.prefill import ENGINES, engine_for
from corelens.sparse.prompt import Prompt, prompt_of
from corelens.sparse.reference import reference
from corelens.sparse.vertical_slash import VerticalSlash
from corelens.sparse.visible import MaskMod, Visible
from corelens.sparse.visual_tokens import PruneVisual

Pattern = Streaming | BlockSparse | IntraImage | VerticalSlash | PruneVisual | Pruned | MaskMod


@dataclass
class SparseInference:
    """Sparse attention: which heads attend fully, and which keys the other heads leave out.

    Args:
        heads: the full heads, a HeadSet or what makes one; none and all are allowed.
        pattern: what the others see at prefill: Streaming, BlockSparse, Pruned, or a function (b,
            h, q_idx, kv_idx) → bool of broadcasting index tensors (FlexAttention's `mask_mod`);
            None: all heads attend fully.
        kv_budget: how many keys each KV head keeps after the prefill: a KVBudget.
        decode: "full": generated tokens see all that is cached; "streaming": KV heads without a
            full query head keep the pattern's sink and window only.
        engine: "auto" or an engine by name, see `corelens.sparse.prefill`.
        layers: another pattern for some layers, {layer: pattern}; None as a pattern leaves that
            layer dense.

    `ran` holds the names of the engines that have computed something under it.
    """

    heads: HeadSet | Iterable[Any] | None = None
    pattern: Any = None
    kv_budget: Any = None
    decode: str = "full"
    engine: str = "auto"
    layers: Mapping[int, Pattern | None] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        full_heads, self.heads = self.heads, HeadSet(() if self.heads is None else self.heads)
        self.layers = dict(self.layers or {})
        patterns = [
            pattern for pattern in (self.pattern, *self.layers.values()) if pattern is not None
        ]
        for pattern in patterns:
            if not (hasattr(pattern, "sees") or isinstance(pattern, Pruned) or callable(pattern)):
                raise CorelensError(
                    f"the pattern {pattern!r}",
                    "Streaming, BlockSparse, Pruned, or a function (b, h, q_idx, kv_idx)",
                    "for example cl.Streaming(sink=128, window=1024)",
                )
        if full_heads is not None and not patterns:
            raise CorelensError(
                "full heads without a pattern for the others",
                "what the other heads see",
                "add pattern=cl.Streaming(sink=128, window=1024); a KVBudget is made of scores, "
                "without heads",
            )
        if not patterns and self.kv_budget is None:
            raise CorelensError(
                "a SparseInference that leaves nothing out", "a pattern or a kv_budget", "give one"
            )
        if not isinstance(self.kv_budget, KVBudget | None):
            raise CorelensError(
                f"kv_budget={self.kv_budget!r}",
                "a cl.KVBudget",
                "for example cl.KVBudget(scores, budget=256)",
            )
        if self.decode not in ("full", "streaming"):
            raise CorelensError(
                f"decode={self.decode!r}",
                "'full' or 'streaming'",
                "for budgets by head see kv_budget=",
            )
        if self.decode == "streaming" and not any(
            isinstance(pattern, Streaming) for pattern in patterns
        ):
            raise CorelensError(
                "decode='streaming' without a Streaming pattern",
                "its sink and window",
                "add pattern=",
            )
        if self.decode == "streaming" and self.kv_budget is not None:
            raise CorelensError(
                "decode='streaming' and a kv_budget",
                "one of them",
                "each says what the cache keeps",
            )
        if self.engine not in ("auto", *ENGINES):
            raise CorelensError(
                f"the engine {self.engine!r}", f"'auto' or one of {', '.join(ENGINES)}", "take one"
            )

    def plan(self, cfg: Any) -> "Plan":
        """The Plan of one run of a model of this shape."""
        return Plan(self, cfg)


class Plan:
    """One run under a SparseInference, asked by the attention function. See the top of this file.

    Args:
        sparse: what is to be left out.
        cfg: the model's shape: n_layers, n_heads, n_kv_heads.
    """

    def __init__(self, sparse: SparseInference, cfg: Any):
        self.sparse, self.cfg = sparse, cfg
        assert isinstance(sparse.heads, HeadSet)
        self.full: np.ndarray = sparse.heads.mask(cfg.n_layers, cfg.n_heads)  # bool [layer, head]
        if gone := [head for head in sparse.heads if head.head >= cfg.heads[head.layer]]:
            raise CorelensError(
                f"heads that are to stay full, {', '.join(map(str, gone[:5]))}, which do not exist",
                f"heads of the layers with attention; each layer has {list(cfg.heads)}",
                "take heads from scores of this model: top() names those that exist",
            )
        for layer in sparse.layers:
            if not (isinstance(layer, int) and 0 <= layer < cfg.n_layers):
                raise CorelensError(
                    f"a pattern for layer {layer!r}", f"layers 0 to {cfg.n_layers - 1}", "take one"
                )
        self.cache: Any = None
        self.warned = False
        self.prompt: Prompt | None = None
        self.first_new, self.total = 0, 0

    def pattern(self, layer: int) -> Pattern | None:
        """The pattern of the heads of this layer that are not full."""
        return self.sparse.layers.get(layer, self.sparse.pattern)

    def roles(self, layer: int) -> list[str]:
        """The role of each KV head: "full" if one of its query heads is, else "pruned" or
        "sparse"."""
        pattern, group = self.pattern(layer), self.cfg.n_heads // self.cfg.n_kv_heads
        if pattern is None:
            return ["full"] * self.cfg.n_kv_heads
        any_full = self.full[layer].reshape(-1, group).any(axis=1)
        return [
            "full" if full else "pruned" if isinstance(pattern, Pruned) else "sparse"
            for full in any_full
        ]

    @property
    def decoding(self) -> bool:
        """Whether this step's tokens were generated."""
        assert self.prompt is not None
        return self.first_new >= self.prompt.length

    def new_cache(self) -> Any:
        """The cache that generation is to use; None: transformers' own."""
        prunes = any("pruned" in self.roles(layer) for layer in range(self.cfg.n_layers))
        if self.sparse.decode == "full" and self.sparse.kv_budget is None and not prunes:
            return None
        if without := [layer for layer, heads in enumerate(self.cfg.heads) if not heads]:
            raise CorelensError(
                f"a cache that lets go of tokens, in a model whose layers {without} keep a state "
                "and no keys",
                "layers with attention heads, all of them",
                'decode with a full cache: decode="full", no kv_budget, nothing pruned',
            )
        from corelens.sparse.cache import RaggedCache

        return RaggedCache(self)

    # --- what a run calls

    def begin(
        self, inputs: Any, first_new: int, new: int, batch: int, device: torch.device, cache: Any
    ) -> None:
        """Note that a forward of the decoder begins, whose `new` tokens come after `first_new`
        others."""
        if self.prompt is None or first_new == 0:
            self.prompt = prompt_of(inputs, new, batch, device)
            if first_new == 0 and new > self.prompt.length:
                raise CorelensError(
                    f"{new - self.prompt.length} generated tokens in one step with the prompt",
                    "a cache: what was generated decodes, it is not part of the sparse prefill",
                    "leave use_cache on",
                )
        self.first_new, self.total = first_new, first_new + new
        engine_for(self.sparse.engine, device)  # refused here, not in the middle of a run
        self.cache = cache if hasattr(cache, "evict") else None

    def restrict(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call, points: AttentionPoints
    ) -> tuple[Tensor, Tensor, Call]:
        """The keys, values and call for this layer's attention under the plan. Its hooks on rows,
        edges and pattern read these too."""
        layer = _layer_of(call)
        whole = points.hook_attn_scores.active or points.hook_pattern.active
        if self.decoding:
            hooked = whole or points.hook_edges.active or points.hook_pattern_rows.active
            if self.cache is None or not hooked:
                return key, value, call
            # Hooks need keys by position, which the packed cache does not have.
            key, value, stored = self.cache.dense(layer)
            stored = stored.repeat_interleave(query.shape[1] // stored.shape[1], dim=1)[:, :, None]

            def not_evicted(rows: Tensor | None, heads: Tensor | None) -> Tensor:
                return stored if heads is None else stored[:, heads]

            return key, value, replace(call, mask=None, allowed=not_evicted)
        pattern = self.pattern(layer)
        if pattern is None or self.full[layer].all():
            return key, value, call
        if whole and not self.warned:
            self.warned = True
            warnings.warn(
                "a hook on the scores or the pattern: such a layer is built densely under its "
                "sparse mask, and not by "
                "the engine (hook_pattern_rows makes only the rows asked for)",
                stacklevel=2,
            )
        return key, value, replace(call, allowed=self._visible(pattern, layer, query, key, call))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> Float[Tensor, "batch pos head d"] | None:
        """z of this layer; None if nothing is left out and ordinary attention is to run."""
        if call.allowed is None:
            if self.decoding and self.cache is not None:
                return self.cache.attend(_layer_of(call), query, call)
            return None
        if self.decoding:  # under hooks, see `restrict`
            return reference(query, key, value, call)
        return ENGINES[engine_for(self.sparse.engine, query.device)](query, key, value, call)

    def finish(self, z: Float[Tensor, "batch pos head d"], query: Tensor, call: Call) -> Tensor:
        """z with pruned heads set to their constants; after the prompt, keys are evicted."""
        layer = _layer_of(call)
        pattern = self.pattern(layer)
        if isinstance(pattern, Pruned) and not self.full[layer].all():
            constant = pattern.constant(layer)
            pruned = torch.from_numpy(~self.full[layer]).to(z.device)
            z = z.clone()
            z[:, :, pruned] = 0.0 if constant is None else constant.to(z)[pruned]
        if self.cache is not None and not self.decoding and self.total == self.prompt.length:  # type: ignore[union-attr]
            self.cache.evict(layer, query, call)
        return z

    def _visible(
        self, pattern: Pattern, layer: int, query: Tensor, key: Tensor, call: Call
    ) -> Visible:
        assert self.prompt is not None
        full = torch.from_numpy(self.full[layer]).to(query.device)
        prompt = self.prompt.to(query.device)
        first = max(self.total - key.shape[2], 0)  # a sliding window's cache dropped those before
        keys = torch.arange(first, first + key.shape[2], device=query.device)
        rows = torch.arange(self.first_new, self.total, device=query.device)
        sees: MaskMod | None = None
        if not isinstance(pattern, Pruned):
            sees = pattern.sees(prompt, query, key, call) if hasattr(pattern, "sees") else pattern
        return Visible(full, pattern, sees, prompt, rows, keys, query.shape[0], self.sparse.ran)


def _layer_of(call: Call) -> int:
    number: Any = call.module.layer_idx
    return int(number)
