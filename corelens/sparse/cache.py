"""The KV cache of a sparse plan: after the prompt each KV head keeps its own keys, and the others
are really gone.

It is a transformers `Cache`, so that `generate` works with it as with any: it counts all tokens
that were seen, and so positions (m-RoPE's too) and masks go on as if nothing had been evicted. What
the attention function asks of it beside that interface stands at the top of
`corelens.sparse.inference`.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from corelens.errors import CorelensError
from corelens.hf import cache_windows
from corelens.hooks.rows import Call
from corelens.sparse.budget import KVBudget
from corelens.sparse.patterns import Streaming
from corelens.sparse.prompt import Prompt
from corelens.sparse.ragged import Ragged
from corelens.sparse.selection import among_heads, highest, observed, sink_and_window


class RaggedLayer(CacheLayerMixin):
    """One layer's keys and values: the whole prompt, then what eviction left of it and the new
    tokens."""

    is_sliding = False
    is_croppable = False
    supports_early_init = False
    keys: Any  # [batch, kv_head, pos, d] until the eviction, then None
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.store: Ragged | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; nothing is allocated."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take new tokens. Before eviction everything is returned; after it, where `attend` reads,
        the new ones."""
        if self.store is not None:
            if key_states.shape[2] != 1:
                raise CorelensError(
                    f"{key_states.shape[2]} tokens at once after the eviction",
                    "one token a step",
                    "a fresh cache for each prompt, and no assistant model",
                )
            self.store.append(key_states, value_states)
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = not self.keys.shape[2]
        self.keys = key_states if first else torch.cat([self.keys, key_states], dim=2)
        self.values = value_states if first else torch.cat([self.values, value_states], dim=2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many tokens were seen, those that were evicted included."""
        if self.store is not None:
            return self.store.seen
        return self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys, offset) of the mask, which is made as if nothing had been evicted."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """−1: the cache has no limit."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        if self.store is not None:
            return self.store.nbytes
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise CorelensError(
            "a cache of evicted keys that is to be reordered, cropped, copied or used again",
            "greedy decoding or sampling, and a fresh cache for each prompt",
            "set num_beams=1, and decode without an assistant model",
        )

    reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = offload = (
        prefetch
    ) = _refuse


class RaggedCache(Cache):
    """The KV cache of `generate` under a plan that evicts keys after the prompt.

    A sliding-window layer keeps the keys that its window can still see, in every head. Its size is
    limited already, so neither the pattern's window nor the budget applies to it: L in the budget's
    formula counts the other layers.

    Args:
        plan: a `corelens.sparse.inference.Plan`, or what has its sparse, cfg, prompt,
            pattern(layer) and roles(layer).
    """

    def __init__(self, plan: Any):
        self.ragged = [RaggedLayer() for _ in range(plan.cfg.n_layers)]
        super().__init__(layers=[*self.ragged])
        self.plan = plan
        self._capacities: list[Int[np.ndarray, "layer kv_head"]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.nbytes for layer in self.ragged)

    def evict(self, layer_idx: int, query: Float[Tensor, "batch head pos d"], call: Call) -> None:
        """Drop the keys and values of a layer that the plan does not keep. Called after the layer's
        attention over the prompt, with its query."""
        layer, sparse, device = self.ragged[layer_idx], self.plan.sparse, query.device
        prompt = replace(
            self.plan.prompt,
            first=self.plan.prompt.first.to(device),
            end=self.plan.prompt.end.to(device),
        )
        total = layer.get_seq_length()
        if bool((prompt.end < total).any()):
            raise CorelensError(
                "padding on the right", "padding on the left", "model.prepare pads on the left"
            )
        windows, pattern = sliding_windows(call.module.config), self.plan.pattern(layer_idx)
        # How many tokens a KV head may hold, by its role; None: it grows with every token.
        most: dict[str, int | None] = {"full": None, "sparse": None, "pruned": 0}
        roles, sink = self.plan.roles(layer_idx), 0
        if (window := windows[layer_idx]) is not None:
            roles = ["pruned" if role == "pruned" else "sparse" for role in roles]
            most["sparse"] = window
            keep = sink_and_window(prompt, total, roles, 0, window)
        elif sparse.kv_budget is not None:
            in_budget = self._within(
                sparse.kv_budget, prompt, layer_idx, query, layer.keys, call, windows
            )
            is_kept = torch.tensor([role != "pruned" for role in roles], device=device)
            keep = in_budget & is_kept[:, None]
        elif sparse.decode == "streaming" and isinstance(pattern, Streaming):
            sink, most["sparse"] = pattern.sink, pattern.sink + pattern.window
            keep = sink_and_window(prompt, total, roles, pattern.sink, pattern.window)
        else:
            roles = ["pruned" if role == "pruned" else "full" for role in roles]
            keep = sink_and_window(prompt, total, roles, 0, 1)
        layer.store = Ragged(layer.keys, layer.values, keep, [most[role] for role in roles], sink)
        layer.keys = layer.values = None

    def _within(
        self,
        budget: KVBudget,
        prompt: Prompt,
        layer: int,
        query: Tensor,
        key: Tensor,
        call: Call,
        windows: list[int | None],
    ) -> Bool[Tensor, "batch kv_head key"]:
        """Which keys each KV head of a layer keeps under a budget."""
        cfg = self.plan.cfg
        if self._capacities is None:
            layers = [number for number, window in enumerate(windows) if window is None]
            self._capacities = [
                budget.capacities(cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, length, layers)
                for length in (prompt.end - prompt.first).tolist()
            ]
        capacity = torch.from_numpy(np.stack([sample[layer] for sample in self._capacities]))
        capacity = capacity.to(key.device)
        attention = observed(query, key, call, prompt, budget.window)
        if budget.allocation == "adakv":
            capacity = among_heads(attention, capacity, budget.window, budget.alpha)
        return highest(attention, prompt, capacity, budget.window)

    def _store(self, layer_idx: int) -> Ragged:
        store = self.ragged[layer_idx].store
        if store is None:
            raise CorelensError(
                f"layer {layer_idx} of a cache that was not evicted",
                "a prompt that was run under its plan",
                "generate within model.sparse(…)",
            )
        return store

    def attend(
        self, layer_idx: int, query: Float[Tensor, "batch head 1 d"], call: Call
    ) -> Float[Tensor, "batch 1 head d"]:
        """A decode step's attention over all stored tokens, the new one included."""
        return self._store(layer_idx).attend(query, call)

    def dense(
        self, layer_idx: int
    ) -> tuple[Float[Tensor, "b kv key d"], Float[Tensor, "b kv key e"], Bool[Tensor, "b kv key"]]:
        """(keys, values, mask of those that are stored) by position; 0 where none is stored."""
        return self._store(layer_idx).dense()

    def positions(self, layer_idx: int) -> list[list[Int[Tensor, " held"]]]:
        """The positions of the tokens that this layer stores, for each sample and KV head."""
        return self._store(layer_idx).positions()


def sliding_windows(config: Any) -> list[int | None]:
    """The sliding window of each layer of a text model, as transformers' own cache has it; None for
    a layer of full attention."""
    windows = cache_windows(config)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds or windows is None:
        raise CorelensError(
            f"a model whose layers are {', '.join(sorted(kinds)) or 'of a kind of their own'}",
            "layers of full or sliding-window attention, each with a cache of its own",
            'decode with a full cache: decode="full", no kv_budget',
        )
    return windows
