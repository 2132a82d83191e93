"""What CoreLens touches of transformers, accelerate and TransformerLens beyond their documented calls.

These parts change without notice. Each has a sentence that says why it is needed, and `tests/test_hf.py` fails with its
name when it goes away. No other file touches them.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

# The argument by which a decoder takes its KV cache: `cache` from transformers 5.24 on, `past_key_values` before.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def cache_argument(module: Any) -> str:
    """The name of the argument by which a model or decoder takes its KV cache."""
    return _cache_argument(type(module).forward) or CACHE_ARGUMENTS[0]


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments, under whichever name it was given; None without one."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)


def cache_of(output: Any) -> Any:
    """The KV cache that a model's output holds; None without one."""
    return next((held for name in CACHE_ARGUMENTS if (held := getattr(output, name, None)) is not None), None)


@contextmanager
def attention_off(modules: Iterable[Any]) -> Iterator[None]:
    """Within this context attention of these modules gives zeros, whatever function they use; their configs' own
    implementation is put back afterwards. (There is no documented way to change it for a part of a model.)
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("corelens_off", _zeros)
    AttentionMaskInterface.register("corelens_off", sdpa_mask)
    configs = {id(config): config for module in modules if hasattr(config := getattr(module, "config", None), _SETTING)}
    before = {key: getattr(config, _SETTING) for key, config in configs.items()}
    try:
        for config in configs.values():
            setattr(config, _SETTING, "corelens_off")
        yield
    finally:
        for key, config in configs.items():
            setattr(config, _SETTING, before[key])


_SETTING = "_attn_implementation_internal"  # the public setter would change every sub-config, too


def _zeros(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any) -> tuple[Any, None]:
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
