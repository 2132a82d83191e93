"""Module hooks that fire a hook point: its tensor is the input, or the output, of a module of the
Hugging Face model."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from einops import rearrange
from torch import Tensor, nn

from corelens.hf import execution_device
from corelens.hooks.points import HookPoint


@runtime_checkable
class Fires(Protocol):
    """What fires points: a run, or something that stands before one."""

    def fire(self, point: HookPoint, x: Tensor) -> Tensor:
        """The tensor as the point's functions leave it; `x` itself if they gave no other."""
        ...


def on_output(run: Fires, point: HookPoint) -> Callable[..., Any]:
    """A module hook: the module's output is the point's tensor, split into heads if the point has a
    head axis."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        edited = _fire(run, point, x)
        if edited is x:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def on_input(run: Fires, point: HookPoint) -> Callable[..., Any]:
    """The module's first input is the point's tensor (split into heads where the point counts
    heads)."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_fire(run, point, _at_home(module, args[0])), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: _fire(run, point, _at_home(module, kwargs[name]))}

    return hook


def _fire(run: Fires, point: HookPoint, x: Tensor) -> Tensor:
    if point.head_axis is None:
        return run.fire(point, x)
    seen = rearrange(x, "... (head d) -> ... head d", head=point.n_heads)
    edited = run.fire(point, seen)
    return x if edited is seen else rearrange(edited, "... head d -> ... (head d)")


def _at_home(module: nn.Module, x: Tensor) -> Tensor:
    """On a model that is split over devices: the input as the module will get it, on the module's
    device."""
    device = execution_device(module)
    return x if device is None else x.to(device)
