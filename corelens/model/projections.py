"""The matrix that a projection computes, whatever module computes it: plain, with an adapter,
quantised, on disk.

A module's `weight` is not always what it multiplies by: adapters (PEFT's LoRA and its kin) add to
it or scale it, quantised modules pack it. Here a projection is a linear map x → x · Wᵀ + b, and W
and b are those of the map:

- of a plain `nn.Linear`, its own weight and bias (views: writing into them writes into the model);
- of LoRA, W = base + scale · B · A, summed over the active adapters that are not merged (a copy);
- of any other module, W is measured: what the module makes of the unit vectors (a copy), refused
  where the module turns out not to be linear.

Never the base weight where something is added to it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import execution_device, offloaded, tied_parameters

# how far, of its norm, what is computed in parts may lie from what a module computes (8-bit: 0.01)
MOST_OFF = 0.05


def loaded_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A module's parameter of this name, loaded by accelerate if it is offloaded; None if there is
    none."""
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        return None
    if parameter.device.type == "meta":
        loaded = offloaded(module, name)
        return parameter if loaded is None else loaded
    return parameter


def loaded_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under its own name, a tied one once; offloaded ones are loaded one after the
    other."""
    tied = tied_parameters(model)
    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        holder, _, last = name.rpartition(".")
        loaded = loaded_tensor(model.get_submodule(holder), last)
        yield name, parameter if loaded is None else loaded


def home(module: nn.Module) -> torch.device:
    """The device on which a module computes: of an offloaded one, where accelerate loads it to."""
    device = execution_device(module)
    if device is not None:
        return device
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes x · Wᵀ + b with its own `weight` and `bias`, and these are
    floating-point numbers."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    # replaced, and not by accelerate
    if "forward" in vars(module) and execution_device(module) is None:
        return False
    return module.weight.is_floating_point() and module.weight.dtype.itemsize > 1


def projection(module: nn.Module) -> Float[Tensor, "out in"]:
    """The matrix of a projection; an error where it has none, or its numbers cannot be read."""
    weight = _exact(module)
    if weight is None:
        return _measured(module)
    base = module.weight if is_plain(module) else module.base_layer.weight  # type: ignore[union-attr]
    return weight.to(base.dtype)  # type: ignore[arg-type]


def projection_bias(
    module: nn.Module, x: Float[Tensor, "*batch in"] | None = None
) -> Float[Tensor, " out"] | None:
    """What a projection adds; None where it adds nothing.

    Args:
        x: an input of the module, whose width, dtype and device are those of any other.
    """
    if is_plain(module):
        return loaded_tensor(module, "bias")
    if _lora(module) is not None:
        return loaded_tensor(module.base_layer, "bias")  # type: ignore[arg-type]
    if x is None:
        width, like = _probe(module)
        x = like.new_zeros(1, width)
    bias = module.forward(x.new_zeros(1, x.shape[-1]))[0]
    return bias if bool(bias.any()) else None


def head_results(
    o_proj: nn.Module,
    z: Float[Tensor, "*batch pos head d_head"],
    output: Float[Tensor, "*batch pos d_model"] | None = None,
) -> Float[Tensor, "*batch pos head d_model"]:
    """What each head adds through the output projection: result_h = z_h · W_O[h], without the bias.

    Args:
        output: what the projection gave for this z; where the projection is no plain linear module,
            the sum over heads is checked against it (an adapter that differs from sample to sample,
            for instance, has no W_O).
    """
    heads = z.shape[-2]
    weight = _exact(o_proj)
    if weight is not None:
        w_o = rearrange(weight, "model (head d) -> head d model", head=heads)
        results = torch.einsum("...hd,hdm->...hm", z.to(w_o.dtype), w_o).to(z.dtype)
    else:  # head by head through the module itself
        none = o_proj.forward(torch.zeros_like(z).flatten(-2))
        parts = []
        for head in range(heads):
            alone = torch.zeros_like(z)
            alone[..., head, :] = z[..., head, :]
            parts.append(o_proj.forward(alone.flatten(-2)) - none)
        results = torch.stack(parts, dim=-2)
    if output is not None and not is_plain(o_proj):
        bias = projection_bias(o_proj, z.flatten(-2))
        _check(o_proj, results.sum(-2), output if bias is None else output - bias)
    return results


def embedding(module: nn.Module) -> Float[Tensor, "d_vocab d_model"]:
    """The token embeddings; those of an adapter (LoRA, trained tokens) are what it makes of every
    token (a copy)."""
    base = getattr(module, "base_layer", None)
    weight = loaded_tensor(module if base is None else base, "weight")
    if base is None and weight is not None:
        return weight
    if base is None or weight is None or type(base).forward is not nn.Embedding.forward:
        raise CorelensError(
            f"the embeddings of a {type(module).__name__} around a {type(base).__name__}",
            "a table of embeddings, or an adapter around one",
            "merge the adapter (merge_and_unload) to look at the embeddings",
        )
    return module(torch.arange(weight.shape[0], device=home(base)))


# --- inside


def _exact(module: nn.Module) -> Tensor | None:
    """The matrix where it can be written down (in the widest dtype among its parts); None where it
    must be measured."""
    if is_plain(module):
        return loaded_tensor(module, "weight")
    parts = _lora(module)
    if parts is None:
        return None
    weight = loaded_tensor(module.base_layer, "weight")  # type: ignore[arg-type]
    for scale, first, second in parts:
        weight = weight + scale * (second @ first).to(weight.device)  # type: ignore[union-attr, operator]
    return weight


def _lora(module: Any) -> list[tuple[float, Tensor, Tensor]] | None:
    """(scale, A, B) of each LoRA adapter that takes part; None for any other module, and for
    variants of LoRA."""
    base, adapters = getattr(module, "base_layer", None), getattr(module, "lora_A", None)
    if base is None or not isinstance(adapters, nn.ModuleDict) or not is_plain(base):
        return None
    if not {"merged", "disable_adapters", "active_adapters", "scaling", "lora_B"} <= set(
        dir(module)
    ):
        return None
    if module.disable_adapters:
        return None if module.merged else []
    if module.merged:  # the base weight holds the adapter
        return []
    parts = []
    for name in module.active_adapters:
        if name not in adapters:
            continue
        first, second = adapters[name], module.lora_B[name]
        other = name in getattr(module, "lora_variant", {}) or getattr(
            module, "fan_in_fan_out", False
        )
        if other or not is_plain(first) or not is_plain(second) or second.bias is not None:
            return None
        parts.append(
            (
                float(module.scaling[name]),
                loaded_tensor(first, "weight"),
                loaded_tensor(second, "weight"),
            )
        )
    return parts  # type: ignore[return-value]


def _probe(module: Any) -> tuple[int, Tensor]:
    """How wide a projection's input is, and an empty tensor of the dtype and device that it
    takes."""
    inner = module
    while not isinstance(getattr(inner, "in_features", None), int) and hasattr(inner, "base_layer"):
        inner = inner.base_layer
    width = getattr(inner, "in_features", None)
    wide = (
        p
        for p in module.parameters()
        if p.is_floating_point() and p.dtype.itemsize > 1 and p.ndim > 1
    )
    like = next(wide, None)
    if not isinstance(width, int) or like is None:
        weight = getattr(module, "weight", None)
        kind = (
            f"{weight.dtype} of shape {list(weight.shape)}"
            if isinstance(weight, Tensor)
            else "no tensor"
        )
        raise CorelensError(
            f"the weight of a {type(module).__name__}, which is {kind}",
            "a matrix of floating-point numbers",
            "load the model without quantisation to look at its weights; hooks work with it as "
            "it is",
        )
    return width, torch.empty(0, dtype=like.dtype, device=home(inner))


def _measured(module: nn.Module) -> Float[Tensor, "out in"]:
    """What a module makes of the unit vectors, after a check on other vectors that it is linear."""
    for variant in getattr(module, "lora_variant", {}).values():
        if type(variant).__name__.startswith("ALora"):  # switched on by a token of the prompt
            raise _not_linear(module)
    width, like = _probe(module)
    none = module.forward(like.new_zeros(1, width))
    unit = torch.eye(width, dtype=like.dtype, device=like.device)
    weight = (module.forward(unit) - none).T
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(like)
    _check(module, x.to(weight.dtype) @ weight.T, module.forward(x) - none)
    return weight


def _check(module: nn.Module, parts: Tensor, whole: Tensor) -> None:
    off, size = (parts - whole).float().norm(), whole.float().norm()
    if not off <= MOST_OFF * size:
        raise _not_linear(module)


def _not_linear(module: nn.Module) -> CorelensError:
    return CorelensError(
        f"the weight of a {type(module).__name__}, which multiplies by no one matrix",
        "a linear map: the same for every token, without dropout",
        "set the model to eval mode, run one adapter for all samples, or merge the adapter "
        "(merge_and_unload)",
    )
