"""Which modules' outputs one decoder layer adds to the residual stream, and times what.

Told from the numbers of one forward: a module's output is what is added where stream plus output is
the stream behind it. Families multiply: what is added by a number (Granite's residual multiplier),
or the whole stream at the layer's end (Gemma 4's layer scalar); both are fitted, and hold for every
token or not at all.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations

from torch import Tensor, nn

from corelens.model.first_forward import LayerCall
from corelens.model.parts import Parts

NEAR = 0.01  # of a fitted number: within it, what the layer holds is meant


def with_sums(layer: nn.Module, parts: Parts, call: LayerCall) -> Parts:
    """The parts with the norms that read the stream, and the modules whose outputs are added."""
    wide = call.wide()
    norms = [path for path in call.inputs if path and is_norm(layer.get_submodule(path))]
    reading = [path for path in norms if call.equal(call.inputs[path], call.stream)]
    parts = replace(
        parts, ln1=reading[0] if reading else None, attn_out=None, mlp_out=None, ln2=None
    )
    for ln2 in norms:  # one after the other: x + a goes into a norm, x + a + m comes out
        middle = call.inputs[ln2]
        if ln2 in reading:
            continue  # an output near 0 would pass for what was added before it
        if middle.numel() != call.stream.numel() or middle.shape[-1] != call.stream.shape[-1]:
            continue  # of queries or keys
        middle = middle.reshape(call.stream.shape)
        if (first := _added(layer, call, wide, call.stream, middle)) is not None:
            parts = replace(parts, ln2=ln2, attn_out=first[0], attn_scale=first[1])
            return _with_second(layer, parts, call, wide, middle)
    pairs = [
        (first, second)
        for first, second in combinations(wide, 2)
        if not second.startswith(f"{first}.")
        and call.equal(call.stream + wide[first] + wide[second], call.out)
    ]
    if pairs:  # side by side: both read the same norm
        attn_out, mlp_out = min(pairs, key=_depth)
        return replace(parts, attn_out=attn_out, mlp_out=mlp_out)
    return replace(
        parts, attn_out=parts.attention or parts.mixer, mlp_out=parts.mlp,
        unsummed="no module of this layer gives what is added to the residual stream",
    )  # fmt: skip


def _with_second(
    layer: nn.Module, parts: Parts, call: LayerCall, wide: dict[str, Tensor], middle: Tensor
) -> Parts:
    """The parts with what is added behind attention."""
    if (second := _added(layer, call, wide, middle, call.out)) is not None:
        return replace(parts, mlp_out=second[0], mlp_scale=second[1])
    # the stream is scaled at the layer's end, and a third output may be added before that
    sums: list[tuple[str, ...]] = [*((path,) for path in wide), *combinations(wide, 2)]
    for paths in sorted(sums, key=lambda paths: (len(paths), _depth(paths))):
        total = middle + sum(wide[path] for path in paths)
        scale = _exactly(layer, _factor(total, call.out))
        if scale and call.equal(scale * total, call.out):
            extra = paths[1] if len(paths) > 1 else None
            return replace(parts, mlp_out=paths[0], extra=extra, stream_scale=scale)
    assert parts.ln2 is not None
    return replace(
        parts, mlp_out=_fed_by(layer, call, wide, parts.ln2) or parts.mlp,
        unsummed="what its MLP gives is not all that is added after attention",
    )  # fmt: skip


def _added(
    layer: nn.Module, call: LayerCall, wide: dict[str, Tensor], before: Tensor, behind: Tensor
) -> tuple[str, float] | None:
    """The module whose output times a number (1 if that fits) is `behind` minus `before`."""
    plain = shallowest(path for path, x in wide.items() if call.equal(before + x, behind))
    if plain is not None:
        return plain, 1.0
    scales = {path: _exactly(layer, _factor(x, behind - before)) for path, x in wide.items()}
    scaled = shallowest(
        path
        for path, scale in scales.items()
        if scale and call.equal(before + scale * wide[path], behind)
    )
    return None if scaled is None else (scaled, scales[scaled])


def _factor(x: Tensor, total: Tensor) -> float:
    """The number by which x comes nearest to a total (least squares); 0 where it is nothing."""
    x, total = x.double().flatten(), total.to(x.device).double().flatten()
    factor = float(x @ total / (x @ x).clamp(min=1e-12))
    return factor if abs(factor) > 1e-6 else 0.0


def _exactly(layer: nn.Module, factor: float) -> float:
    """A fitted number as the layer itself holds it, if it does, or its tanh (a gate): a fit is as
    exact as the model's dtype, and no more."""
    held = [value for value in vars(layer).values() if isinstance(value, float)]
    tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    singles = [float(x) for x in tensors if x.numel() == 1 and x.device.type != "meta"]
    held += [1.0, *singles, *map(math.tanh, singles)]
    near = [value for value in held if abs(value - factor) <= NEAR * abs(factor)]
    return min(near, key=lambda value: abs(value - factor), default=factor)


def shallowest(paths: Iterable[str]) -> str | None:
    """The path with the fewest modules above it; None of none."""
    return min(paths, key=lambda path: path.count("."), default=None)


def _depth(paths: tuple[str, ...]) -> int:
    return sum(path.count(".") for path in paths)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: nothing in it but a vector of weights."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def _fed_by(layer: nn.Module, call: LayerCall, wide: dict[str, Tensor], ln2: str) -> str | None:
    """The module behind ln2, or the norm behind that module."""
    inner = shallowest(
        path for path in wide if path != ln2 and call.equal(call.inputs.get(path), wide[ln2])
    )
    if inner is None:
        return None
    behind = (
        path for path in wide if path != inner and call.equal(call.inputs.get(path), wide[inner])
    )
    return next((path for path in behind if is_norm(layer.get_submodule(path))), inner)
