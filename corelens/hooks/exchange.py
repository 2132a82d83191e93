"""Replaces the attention function registered under the name "sdpa" while hooked runs last.

At every call transformers looks up the attention function by the name in the model's config. A new
name for our function would not work, because model code branches on the name (`if
config._attn_implementation in ("eager", "sdpa")`) and builds no mask for a name that it does not
know. So the name stays "sdpa", and another function is registered under it for a while. A config
with another name returns "sdpa" inside hooked runs, and its own name elsewhere. Runs of several
threads may overlap, so both replacements are counted, and the last run that ends undoes them.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from corelens.hf import attention_name, attention_named
from corelens.hooks.running import current

NAME = "sdpa"

AttentionFunction = Callable[..., Any]


@dataclass
class _Renamed:
    """A config whose name reads "sdpa" inside runs: what undoes that, and how many runs need it."""

    undo: ExitStack
    runs: int = 0


_lock = threading.Lock()
_renamed: dict[int, _Renamed] = {}  # by the config's id, while a run holds the config
_runs = 0
_original: AttentionFunction | None = None


@cache
def _interface() -> Any:
    # Imported here because it loads transformers' model code, which takes seconds. Whoever wraps a
    # model has loaded that already.
    from transformers import AttentionInterface

    return AttentionInterface


def original() -> AttentionFunction:
    """The function that is registered under the name outside hooked runs."""
    return _original or _interface()()[NAME]


@contextmanager
def exchanged(function: AttentionFunction, configs: list[Any]) -> Iterator[None]:
    """Within this context `function` is registered under the name "sdpa", and these configs have
    that name inside runs.

    Args:
        function: called for every attention of every model with that name, in all threads. It must
            pass calls that are not of its run to `original()`.
        configs: those by which masks are made, and those of the attention modules.
    """
    with _lock:
        _begin(function, configs)
    try:
        yield
    finally:
        with _lock:
            _end(function, configs)


def _in_run() -> bool:
    return current.get() is not None


def _begin(function: AttentionFunction, configs: list[Any]) -> None:
    global _original, _runs
    if _runs == 0:
        _original = _interface()()[NAME]
        _interface().register(NAME, function)
    _runs += 1
    for config in configs:
        if id(config) not in _renamed:
            if attention_name(config) == NAME:
                continue
            _renamed[id(config)] = _Renamed(ExitStack())
            _renamed[id(config)].undo.enter_context(attention_named(config, _in_run, NAME))
        _renamed[id(config)].runs += 1


def _end(function: AttentionFunction, configs: list[Any]) -> None:
    global _original, _runs
    for config in configs:
        if (entry := _renamed.get(id(config))) is None:
            continue
        entry.runs -= 1
        if entry.runs == 0:
            entry.undo.close()
            del _renamed[id(config)]
    _runs -= 1
    if _runs == 0:
        # If somebody registered another function meanwhile, that one stays.
        if _interface()()[NAME] is function:
            _interface().register(NAME, _original)
        _original = None
