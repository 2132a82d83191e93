"""The attention function that a model calls: its name in configs, and the table of functions."""

import inspect
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn


def attention_name(config: Any) -> str | None:
    """The name of the attention function that a config asks for."""
    return config._attn_implementation_internal


def set_attention_name(config: Any, name: str | None) -> None:
    """Let one config ask for another attention function.

    The documented setter, `set_attn_implementation`, would switch every sub-config too and refuse
    names by its own rules; each config of a run is switched, and switched back, on its own.
    """
    config._attn_implementation_internal = name


@contextmanager
def attention_set(configs: Iterable[Any], name: str) -> Iterator[None]:
    """Within this context these configs ask for another attention function, then again each for its
    own."""
    before = {id(config): (config, attention_name(config)) for config in configs}.values()
    try:
        for config, _ in before:
            set_attention_name(config, name)
        yield
    finally:
        for config, own in before:
            set_attention_name(config, own)


@cache
def _named_while(config_class: Any, condition: Callable[[], bool], name: str) -> type:
    stored = "_attn_implementation_internal"

    def get(config: Any) -> str | None:
        return name if condition() else vars(config)[stored]

    def set_(config: Any, value: str | None) -> None:
        vars(config)[stored] = value

    body = {
        stored: property(get, set_),
        "__module__": config_class.__module__,
        "__doc__": config_class.__doc__,
    }
    return type(config_class.__name__, (config_class,), body)


@contextmanager
def attention_named(config: Any, condition: Callable[[], bool], name: str) -> Iterator[None]:
    """Within this context a config asks for the attention function `name` where `condition()`
    holds, else for its own.

    The name is read several times in a forward, for masks and for attention: were it set on the
    config, another thread's forward of the same model would get a mask of one kind and a function
    of the other. So the config's class is exchanged for one that answers by thread.
    """
    before = type(config)
    named: Any = _named_while  # (mypy takes a class for no key of a cache)
    config.__class__ = named(before, condition, name)
    try:
        yield
    finally:
        config.__class__ = before


def attention_functions() -> MutableMapping[str, Callable[..., Any]]:
    """The table, name → function, in which transformers' model code looks its attention up at every
    call.

    `AttentionInterface.register` writes below it: an item set here hides the registered function of
    that name from all models of this process, and deleting the item shows it again.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@contextmanager
def every_attention(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within this context every attention call of every model goes through `around(function)`: for
    timing."""
    table: Any = attention_functions()
    hidden = dict(table._local_mapping)  # what was set here before, above what is registered

    def late(name: str) -> Callable[..., Any]:
        """Whatever is behind the name when it is called: a hooked run may have exchanged it
        meanwhile."""
        return lambda *args, **kwargs: around(hidden.get(name) or table._global_mapping[name])(
            *args, **kwargs
        )

    table._local_mapping.update({name: late(name) for name in table})
    try:
        yield
    finally:
        table._local_mapping.clear()
        table._local_mapping.update(hidden)


def looks_attention_up(module: nn.Module) -> bool:
    """Whether a module's forward looks the attention function up in transformers' table.

    (Read off the names in its code: there is no list of such modules, and a tower cannot be run
    before its pictures are there.)
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def forget_attention(name: str) -> None:
    """Undo `AttentionInterface.register(name, …)`, for which there is no call."""
    from transformers import AttentionInterface

    mapping: Any = AttentionInterface._global_mapping
    mapping.pop(name, None)
