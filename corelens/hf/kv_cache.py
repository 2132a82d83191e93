"""KV caches: the argument that takes one, what one holds, and which are unknown."""

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

# The argument by which a decoder takes its KV cache, and the field by which an output holds it:
# `cache` from transformers 5.24 on, `past_key_values` before. Hooks read it to tell where a step's
# tokens stand.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def cache_argument(module: Any) -> str:
    """The name of the argument by which a model or decoder takes its KV cache."""
    return _cache_argument(type(module).forward) or CACHE_ARGUMENTS[0]


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments, under whichever name it was given; None
    without one."""
    return next(
        (arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None
    )


def cache_of(output: Any) -> Any:
    """The KV cache that a model's output holds; None without one."""
    # (the first name alone is read where it is there: reading the old one is deprecated)
    return next((getattr(output, name) for name in CACHE_ARGUMENTS if hasattr(output, name)), None)


def cached_tensors(kv_cache: Any) -> list[Tensor]:
    """The keys and values of all layers of a KV cache, for counting their bytes; empty where it
    does not show them."""
    held = [
        getattr(layer, name, None)
        for layer in getattr(kv_cache, "layers", ())
        for name in ("keys", "values")
    ]
    return [x for x in held if isinstance(x, Tensor)]


def cache_windows(config: Any) -> list[int | None] | None:
    """The sliding window of each layer's KV cache, None where it holds everything; read off
    transformers' own cache.

    None where a layer's cache is of another kind (linear attention, a cache that layers share,
    chunks).
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [getattr(layer, "sliding_window", None) for layer in layers]


def unknown_caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among a decoder's arguments from which positions cannot be read: under a name that
    is not known, or without a length.

    A decoder's cache argument was renamed before (5.24), and continuous batching has a
    PagedAttentionCache, which is no Cache and counts several sequences at once. Reading None
    instead would start positions at 0 at every step.
    """
    from transformers import Cache

    def unknown(name: str, value: Any) -> bool:
        if name in CACHE_ARGUMENTS:
            return value is not None and not hasattr(value, "get_seq_length")
        return isinstance(value, Cache) or type(value).__name__.endswith("AttentionCache")

    return {name: value for name, value in arguments.items() if unknown(name, value)}
