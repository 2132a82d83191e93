"""A device that is not there: tensors that say they lie on it and hold their numbers on the CPU.

What mixes devices fails on it as on a GPU, and what does not computes the CPU's numbers; no GPU is
needed. (Its type is "meta", the one type besides the CPU's whose kernels torch never has to start.)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
# as on a GPU: copies, and a CPU's index
_MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index")


class Elsewhere(Tensor):
    """A tensor [any shape] on `DEVICE`; `held` holds its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        like = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **like)  # type: ignore[attr-defined]
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _Kernels():
            return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """Runs on the CPU what is asked of `DEVICE`, and refuses what mixes the two."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        elsewhere = [isinstance(x, Elsewhere) for x in tensors]
        name = func._schema.name
        if any(elsewhere) and name not in _MAY_MIX:
            assert all(lies or x.ndim == 0 for x, lies in zip(tensors, elsewhere, strict=True)), (
                f"{name} mixes devices"
            )
        place = kwargs.get("device")
        if place is None:
            leaves = bool(elsewhere) and elsewhere[0]
        else:
            leaves, kwargs["device"] = place == DEVICE, "cpu"
        out = func(*_held(args), **_held(kwargs))
        # an operation in place gives what it got
        same = {id(x.held): x for x in tensors if isinstance(x, Elsewhere)}
        return tree_map(
            lambda x: same.get(id(x), Elsewhere(x)) if leaves and isinstance(x, Tensor) else x, out
        )


class _Calls(TorchFunctionMode):
    """What torch computes before it asks a kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            return _held(args[0]).tolist()
        if func is torch.tensor and (kwargs or {}).get("device") == DEVICE:
            return Elsewhere(torch.tensor(*_held(args), **{**kwargs, "device": "cpu"}))
        return func(*args, **(kwargs or {}))


@contextmanager
def elsewhere(module: nn.Module) -> Iterator[None]:
    """Moves a module to `DEVICE`, for good; within, torch computes there. Nothing there can be
    trained."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            part.register_parameter(
                name, nn.Parameter(Elsewhere(weight.detach()), requires_grad=False)
            )
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, Elsewhere(buffer))
    with torch.no_grad(), _Kernels(), _Calls():
        yield


def _held(value: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, value)
