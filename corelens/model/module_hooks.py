"""Module hooks that fire a hook point: its tensor is the input or the output of a module of the
Hugging Face model, or is computed from these. `corelens.model.wiring` places them."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor, nn

from corelens.hf import execution_device
from corelens.hooks.points import HookPoint
from corelens.hooks.running import Running
from corelens.model.projections import head_results, loaded_tensor, projection_bias
from corelens.model.weights import Norm, norm_eps, norm_weight


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


def on_shared_input(run: Running, point: HookPoint) -> Callable[..., Any]:
    """The module's input is the point's tensor, and the layer goes on using it (residual stream):
    written in place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not run.live:
            return
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        # With gradients the hooks get a copy: what they save for backward must not be overwritten.
        seen = x.clone() if torch.is_grad_enabled() and x.requires_grad else x
        edited = run.fire(point, seen)
        if edited is not x:
            x.copy_(edited)

    return hook


def on_added(scale: float) -> Callable[..., Callable[..., Any]]:
    """The module's output, times this, is added to the residual stream: that product is the point's
    tensor. Experts may give it without a batch axis."""

    def make(run: Running, point: HookPoint) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            if not run.live or run.step is None:
                return None
            seen = x if x.ndim > 2 else x.reshape(-1, len(run.step.positions), x.shape[-1])
            if scale == 1.0:  # the tensor itself, bit for bit
                edited = run.fire(point, seen)
                changed = edited is not seen
            else:
                edited, changed = run.fire_watched(point, seen * scale)
                # a gradient reaches the point only if the model goes on from what it saw
                changed = changed or edited.requires_grad
                edited = edited / scale if changed else edited
            if not changed:
                return None
            edited = edited.reshape(x.shape)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    return make


def on_half(number: int) -> Callable[..., Callable[..., Any]]:
    """The query (0) or the gate (1) of a projection that gives each head both, side by side."""

    def make(run: Running, point: HookPoint) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            halves = rearrange(
                output, "... (head two d) -> ... head two d", head=point.n_heads, two=2
            )
            edited, changed = run.fire_watched(point, halves[..., number, :].clone())
            if not changed:
                return None
            both = [halves[..., 0, :], halves[..., 1, :]]
            both[number] = edited
            return rearrange(torch.stack(both, dim=-2), "... head two d -> ... (head two d)")

        return hook

    return make


def on_norm(run: Running, points: Norm) -> Callable[..., Any]:
    """What a norm does, taken apart: x / scale = normalized, normalized · weight (+ bias) =
    output."""

    def hook(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0].float()
        if points.centres:
            x = x - x.mean(-1, keepdim=True)
        scale, scaled = run.fire_watched(
            points.hook_scale, (x.pow(2).mean(-1, keepdim=True) + norm_eps(norm)).sqrt()
        )
        normalized, edited = run.fire_watched(points.hook_normalized, (x / scale).to(output.dtype))
        if not (scaled or edited):
            return None
        edited_output = normalized * norm_weight(norm, points.offset)
        bias = loaded_tensor(norm, "bias")
        return (edited_output if bias is None else edited_output + bias).to(output.dtype)

    return hook


def on_result(run: Running, point: HookPoint) -> Callable[..., Any]:
    """What each head adds: result_h = z_h · W_O[h]; Σ_h result + bias is the projection's
    output."""

    def hook(o_proj: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        z = rearrange(args[0], "... (head d) -> ... head d", head=point.n_heads)
        edited, changed = run.fire_watched(point, head_results(o_proj, z, output))
        if not changed:
            return None
        bias = projection_bias(o_proj, args[0])
        return edited.sum(-2) if bias is None else edited.sum(-2) + bias

    return hook


def on_logits(run: Running, point: HookPoint) -> Callable[..., Any]:
    """A module hook on the whole model: the logits of its output are the point's tensor."""

    def hook(hf: nn.Module, args: Any, output: Any) -> Any:
        output.logits = run.fire(point, output.logits)
        return output

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
