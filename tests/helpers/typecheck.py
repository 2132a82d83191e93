"""The run-time type checker of the tests: beartype, to which an int is a float too."""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
_checks: dict[tuple[Any, ...], Callable[..., Any]] = {}


def checker(fn: Any) -> Any:
    """A function with its arguments and its result checked.

    jaxtyping asks for the check of a bare signature, again each time that a factory makes its hook
    function. The same signature of the same function has the same check: it is made once.
    """
    if "<locals>" not in getattr(fn, "__qualname__", ""):
        return _beartyped(fn)
    key = (fn.__module__, fn.__qualname__, fn.__name__, str(inspect.signature(fn)))
    if key not in _checks:
        _checks[key] = _beartyped(fn)
    return _checks[key]
