"""The run-time type checker of the tests: beartype, to which an int is a float too; and shapes,
checked by jaxtyping in the functions that name some."""

import inspect
from collections.abc import Callable
from typing import Any, ForwardRef, get_args

import jaxtyping
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


def check_package(name: str) -> None:
    """Check every function of a package that is imported from now on.

    jaxtyping binds and checks a call three times over, which is needed for shapes alone: a function
    without shapes is checked by beartype directly.
    """
    with_shapes = jaxtyping.jaxtyped

    def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
        if fn is None:
            return lambda fn: jaxtyped(fn, typechecker=typechecker)
        if isinstance(fn, property):
            getter, setter = (
                f and jaxtyped(f, typechecker=typechecker) for f in (fn.fget, fn.fset)
            )
            return property(getter, setter, doc=fn.__doc__)
        if inspect.isfunction(fn) and "<locals>" not in fn.__qualname__ and not _shapes(fn):
            return _beartyped(fn)
        return with_shapes(fn, typechecker=typechecker)

    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(name, "helpers.typecheck.checker").__enter__()


def _shapes(fn: Callable[..., Any]) -> bool:
    """Whether an annotation of this function names a shape, or may name one: it is a string."""
    return any(map(_is_shape, fn.__annotations__.values()))


def _is_shape(hint: Any) -> bool:
    if isinstance(hint, str | ForwardRef):
        return True
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_is_shape, get_args(hint)))
