"""The function behind the name "sdpa", exchanged while hooked runs last.

transformers looks the attention function up by the name in a model's config at every call. A
function registered under a name of its own would not do: model code asks for the name, too (`if
config._attn_implementation in ("eager", "sdpa")`), and builds no mask for a name that it does not
know. So the name stays "sdpa", and what is behind it is another function meanwhile. A config that
has another name answers "sdpa" inside hooked runs, and its own elsewhere. Runs of several threads
overlap: both exchanges are counted, and undone by the last run that leaves.
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
    """A config that answers "sdpa" inside runs: what puts it back, and how many runs need it."""

    undo: ExitStack
    runs: int = 0


_lock = threading.Lock()
_renamed: dict[int, _Renamed] = {}  # by the config's id, while a run holds the config
_runs = 0
_original: AttentionFunction | None = None


@cache
def _interface() -> Any:
    # (importing it takes as long as importing transformers' model code: whoever wraps a model has
    # done that already)
    from transformers import AttentionInterface

    return AttentionInterface


def original() -> AttentionFunction:
    """The function that is behind the name when no run is under way."""
    return _original or _interface()()[NAME]


@contextmanager
def exchanged(function: AttentionFunction, configs: list[Any]) -> Iterator[None]:
    """Within this context `function` is behind the name "sdpa", and these configs have that name in
    runs.

    Args:
        function: called for every attention of every model with that name, in all threads: it hands
            on what is not its own to `original()`.
        configs: those that masks are made by, and those of the attention modules.
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
        # otherwise another one was registered meanwhile, which stays
        if _interface()()[NAME] is function:
            _interface().register(NAME, _original)
        _original = None
