"""What CoreLens touches of transformers, accelerate and TransformerLens beyond their documented calls.

These parts change without notice. Each has a sentence that says why it is needed, and `tests/test_hf.py` fails with its
name when it goes away. No other file touches them.
"""

import inspect
from collections.abc import Mapping
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
