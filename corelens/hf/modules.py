"""Modules: offloaded weights, devices, a forward that is replaced, gradient checkpointing."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module that accelerate has offloaded, loaded to where the module runs; None
    if it holds none."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "weights_map", None) is not None:
            return part.weights_map[name].to(part.execution_device)
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate moves this module's inputs before it runs; None for a module that it has not
    dispatched."""
    hook: Any = getattr(module, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), None)


def tied_parameters(model: nn.Module) -> set[str]:
    """The names of parameters that are others' (an unembedding that is the embedding's table): once
    offloaded, both names hold a tensor of their own, and `named_parameters` lists both.
    """
    return set(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context the module computes `forward`; accelerate's own replacement is put back
    afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def checkpointing_off(model: Any) -> Iterator[bool]:
    """Within this context no layer of the model is checkpointed; yields whether any was.

    `gradient_checkpointing` is the attribute by which each layer of transformers decides it, at
    every call; the documented switch would forget which layers had it, and its options.
    """
    layers = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    try:
        for module in layers:
            module.gradient_checkpointing = False
        yield any(module.training for module in layers)
    finally:
        for module in layers:
            module.gradient_checkpointing = True


def takes_argument(model: Any, name: str) -> bool:
    """Whether a model's forward has an argument of this name: others are swallowed by its
    `**kwargs`."""
    return name in inspect.signature(inspect.unwrap(type(model).forward)).parameters
