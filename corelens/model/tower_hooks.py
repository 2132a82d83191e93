"""The towers' side of the hook tree: where the points of vision and audio towers fire.

Towers differ in how they call attention: some once for a batch of images or tiles, some once an
image or window of all patches joined in one row, without a batch axis. Points show the same form
for all: a first axis (images or tiles; of size 1 where all patches are joined), then positions.
Residual, q, k, v and z are module inputs and outputs. For the pattern the layer's attention runs
twice: once to collect its calls, of which the pattern is made, and once in which each call is
handed its z.

Nobody wrote down which module of a tower's layer gives what: the names of its projections say it,
and the first hooked run compares what passes there with what the attention function was given.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import ENCODED, set_visual_features, visual_features
from corelens.hooks.attention_function import plain_z
from corelens.hooks.points import HookPoint, TowerAttentionPoints, TowerBlockPoints, TowerPoints
from corelens.hooks.rows import Call, row_scores, softmax
from corelens.hooks.running import Running
from corelens.layouts.base import Layout
from corelens.model.module_hooks import Fires, on_input, on_output
from corelens.model.towers import Kind, TowerLayer, tower_layers

# by kind of tower: the methods that give the decoder its features, and transformers' word for them
FEATURES: dict[Kind, dict[str, str]] = {
    "vision": {"get_image_features": "image", "get_video_features": "video"},
    "audio": {"get_audio_features": "audio"},
}


@dataclass
class Tower:
    """One side of the hook tree.

    Args:
        kind: "vision" or "audio".
        layers: the tower's layers.
        points: the points of each, and `hook_out`.
        features: the object whose methods give the decoder what the tower saw or heard; None
            without one.
        checked: the layers whose projections were compared with the attention function's calls.
    """

    kind: Kind
    layers: list[TowerLayer]
    points: TowerPoints
    features: nn.Module | None
    checked: set[nn.Module] = field(default_factory=set)

    @classmethod
    def of(cls, hf: nn.Module, layout: Layout, kind: Kind) -> "Tower":
        """The vision or audio side of a model."""
        layers = tower_layers(hf, layout, kind)
        points = TowerPoints([(layer.n_heads, layer.n_kv_heads) for layer in layers])
        method = next(iter(FEATURES[kind]))
        holders = [layout.visual_features(hf), getattr(hf, "model", None), hf]
        features = next((holder for holder in holders if hasattr(holder, method)), None)
        if getattr(hf.config, f"{kind}_config", True) is None:  # the method without its tower
            features = None
        return cls(kind, layers, points, features)

    def absent(self) -> dict[str, str]:
        """The names of points that this tower cannot have, each with the reason."""
        missing = {
            f"{self.kind}.blocks.{number}.attn.hook_{name}": reason
            for number, layer in enumerate(self.layers)
            for name, reason in layer.absent().items()
        }
        if self.features is None:
            missing[f"{self.kind}.hook_out"] = f"it has no {next(iter(FEATURES[self.kind]))}()"
        return missing


@contextmanager
def wired_tower(tower: Tower, run: Running) -> Iterator[None]:
    """Within this context a forward fires every active point of a tower; afterwards the model is as
    it was."""
    with ExitStack() as stack:
        for block, layer in zip(tower.points.blocks, tower.layers, strict=True):
            attn: Any = block.attn
            seen = [attn.hook_q, attn.hook_k, attn.hook_v, attn.hook_z]
            if attn.hook_pattern.active:
                module = layer.module.get_submodule(layer.attention or "")
                twice = _Twice(run, attn.hook_pattern)
                run.vision[module] = twice.call
                stack.callback(
                    module.register_forward_pre_hook(twice.begin, with_kwargs=True).remove
                )
            elif any(point.active for point in seen) and layer.module not in tower.checked:
                for handle in _Witness(run, tower, layer, str(attn.hook_z.name)).place():
                    stack.callback(handle.remove)
            for handle in _place_block(run, block, layer):  # type: ignore[arg-type]
                stack.callback(handle.remove)
        if tower.points.hook_out.active:
            stack.enter_context(_features(tower, run))
        yield


def _place_block(run: Running, points: TowerBlockPoints, layer: TowerLayer) -> Iterator[Any]:
    attn: TowerAttentionPoints = points.attn
    module = layer.module
    batched = _Batched(run)
    # With a hooked pattern the layer runs ahead, and it is of those q, k and v that the pattern is
    # made.
    ahead = _Batched(run, ahead=attn.hook_pattern.active)
    if points.hook_resid_pre.active:
        yield module.register_forward_pre_hook(
            on_input(batched, points.hook_resid_pre), with_kwargs=True
        )
    if points.hook_resid_post.active:
        yield module.register_forward_hook(
            on_output(batched, points.hook_resid_post), prepend=True
        )  # before the tower records it
    three = [(attn.hook_q, layer.q), (attn.hook_k, layer.k), (attn.hook_v, layer.v)]
    if layer.qkv is None:
        for point, path in three:
            if point.active and path is not None:
                yield module.get_submodule(path).register_forward_hook(on_output(ahead, point))
    elif any(point.active for point, _ in three):
        fused = _on_fused(ahead, [point for point, _ in three])
        yield module.get_submodule(layer.qkv).register_forward_hook(fused)
    if attn.hook_z.active and layer.out is not None:
        yield module.get_submodule(layer.out).register_forward_pre_hook(
            on_input(batched, attn.hook_z), with_kwargs=True
        )


class _Witness:
    """Watches one call of a tower's layer, and raises unless its projections are what their names
    say.

    z must be what the output projection gets, with as many heads as were counted; of a fused
    projection, the last third must be the values that the attention function gets.
    """

    def __init__(self, run: Running, tower: Tower, layer: TowerLayer, name: str):
        self.run, self.tower, self.layer, self.name = run, tower, layer, name
        self.values: list[Tensor] = []
        self.zs: list[Tensor] = []
        self.fused: Tensor | None = None

    def place(self) -> Iterator[Any]:
        """Its hooks, one after the other; they come before those of the points."""
        layer, module = self.layer, self.layer.module
        attends = module.get_submodule(layer.attention or "")
        self.run.vision[attends] = self.call
        yield attends.register_forward_pre_hook(self.begin)
        if layer.qkv is not None:
            yield module.get_submodule(layer.qkv).register_forward_hook(self.project)
        if layer.out is not None:
            yield module.get_submodule(layer.out).register_forward_pre_hook(self.compare)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Before the attention module runs."""
        self.values, self.zs, self.fused = [], [], None

    def project(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """What the fused projection gives, before anybody edits it."""
        self.fused = output.detach()

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> Float[Tensor, "image pos head d"]:
        """In place of the attention function."""
        z = plain_z(query, key, value, call)
        self.values.append(value.transpose(1, 2).flatten())
        self.zs.append(z)
        if self.layer.module not in self.tower.checked and z.shape[2] != self.layer.n_heads:
            self._refuse(f"{z.shape[2]} heads in the call, {self.layer.n_heads} counted")
        return z

    def compare(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """At the output projection."""
        if not self.run.live or self.layer.module in self.tower.checked:
            return
        z = torch.cat([z.flatten() for z in self.zs]) if self.zs else torch.zeros(0)
        if not args or not _same(z, args[0]):
            self._refuse("what its output projection gets is not z: something stands between")
        if self.fused is not None and not self._edited() and not self._in_order(self.fused):
            self._refuse("its fused projection does not give q, then k, then v")
        self.tower.checked.add(self.layer.module)

    def _edited(self) -> bool:
        block = self.tower.points.blocks[self.tower.layers.index(self.layer)]
        attn: Any = block.attn
        return any(point.active for point in (attn.hook_q, attn.hook_k, attn.hook_v))

    def _in_order(self, fused: Tensor) -> bool:
        values = torch.cat(self.values)
        width = values.numel() * fused.shape[-1] // fused.numel()
        return _same(values, fused[..., fused.shape[-1] - width :])

    def _refuse(self, reason: str) -> None:
        raise CorelensError(
            f"the points of {self.name.removesuffix('.hook_z')!r}: {reason}",
            "a tower whose attention projects q, k and v, attends, and projects z",
            "hook its residual stream or its pattern; other points of this tower cannot be served",
        )


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, up to a change of type."""
    if x.numel() != y.numel():
        return False
    return torch.allclose(x.flatten().float(), y.flatten().float(), atol=1e-6, rtol=1e-3)


class _Batched:
    """A run that shows hooks a first axis where the tower has none.

    Args:
        ahead: fire only while a layer runs ahead to collect its calls (False: only while it does
            not).
    """

    def __init__(self, run: Running, ahead: bool = False):
        self.run, self.ahead = run, ahead

    def fire(self, point: HookPoint, x: Tensor) -> Tensor:
        """As Running.fire."""
        if self.run.collecting != self.ahead:
            return x
        axes = 3 if point.head_axis is None else 4
        seen = x[None] if x.ndim < axes else x.flatten(1, x.ndim - axes + 1)
        edited = self.run.fire(point, seen)
        return x if edited is seen else edited.reshape(x.shape)


def _on_fused(run: Fires, points: list[HookPoint]) -> Callable[..., Any]:
    """One projection gives q, k and v of all heads: q first, then k, then v."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        heads = [point.n_heads for point in points]
        width = output.shape[-1] // sum(heads)
        projections = output.split([count * width for count in heads], -1)
        parts = [
            rearrange(projection, "... (head d) -> ... head d", head=count)
            for projection, count in zip(projections, heads, strict=True)
        ]
        edited = [
            run.fire(point, part) if point.active else part
            for point, part in zip(points, parts, strict=True)
        ]
        if all(x is y for x, y in zip(edited, parts, strict=True)):
            return None
        return torch.cat([part.flatten(-2) for part in edited], dim=-1)

    return hook


class _Twice:
    """A tower layer's pattern: one firing for all calls that its attention makes of the attention
    function.

    Their patterns are joined along pos [image, head, query, key]; the key axis counts within a
    call, and is padded with 0 to the longest. `hook.ctx["lengths"]` says how many positions each
    call has.
    """

    def __init__(self, run: Running, point: HookPoint):
        self.run, self.point = run, point
        self.calls: list[tuple[Tensor, Tensor, Tensor, Call]] = []
        self.results: list[Tensor] = []

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention module runs: run it once to collect its calls, and make all of their
        z."""
        if not self.run.live:
            return
        self.calls, self.results, self.run.collecting = [], [], True
        try:
            module.forward(*args, **kwargs)
        finally:
            self.run.collecting = False
        patterns = [
            softmax(row_scores(q, k, None, None, call), call.sink_logits)
            for q, k, _, call in self.calls
        ]
        lengths, longest = [p.shape[2] for p in patterns], max(p.shape[3] for p in patterns)
        joined = torch.cat(
            [nn.functional.pad(p, (0, longest - p.shape[3])) for p in patterns], dim=2
        )
        joined = self.run.fire(self.point, joined, lengths=lengths)
        for part, (_, _, value, _) in zip(joined.split(lengths, dim=2), self.calls, strict=True):
            self.results.append(
                (part[..., : value.shape[2]].to(value.dtype) @ value).transpose(1, 2)
            )

    def call(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> Float[Tensor, "image pos head d"]:
        """In place of the attention function."""
        if self.run.collecting:
            self.calls.append((query, key, value, call))
            return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        return self.results.pop(0)


# --- what the decoder gets


@contextmanager
def _features(tower: Tower, run: Running) -> Iterator[None]:
    """Fire `hook_out` on all that gives the decoder features: images, videos, sounds, outputs made
    beforehand."""
    inner: Any = tower.features
    point = tower.points.hook_out
    names = {name: kind for name, kind in FEATURES[tower.kind].items() if hasattr(inner, name)}
    # generate() computes features before the forward that is handed them: they fire once
    fired: set[str] = set()
    # outputs made beforehand serve other runs too: edits are made on a copy
    copies: dict[int, Any] = {}

    def wrap(original: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(original)  # transformers asks for its signature
        def features(*args: Any, **kwargs: Any) -> Any:
            if not run.live:
                return original(*args, **kwargs)
            fired.add(kind)
            return _fire_output(original(*args, **kwargs | {"return_dict": True}), point, run)

        return features

    def record_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not run.live:
            return args, kwargs
        outputs = dict(kwargs.get(ENCODED) or {})
        for kind in outputs.keys() & set(names.values()) - fired:
            if outputs[kind] is not None:
                if id(outputs[kind]) not in copies:
                    copies[id(outputs[kind])] = _fire_output(copy.copy(outputs[kind]), point, run)
                outputs[kind] = copies[id(outputs[kind])]
        return args, kwargs | {ENCODED: outputs} if outputs else kwargs

    # a run around this one has its own
    before = {name: vars(inner)[name] for name in names if name in vars(inner)}
    handle = inner.register_forward_pre_hook(record_call, with_kwargs=True)
    try:
        # on this instance only: it hides the class's method until it is deleted
        for name, kind in names.items():
            object.__setattr__(inner, name, wrap(getattr(inner, name), kind))
        yield
    finally:
        handle.remove()
        for name in names:
            inner.__dict__.pop(name, None)
            inner.__dict__.update({name: before[name]} if name in before else {})


def _fire_output(output: Any, point: HookPoint, run: Running) -> Any:
    features = visual_features(output)
    flat = [torch.cat([part.flatten(0, -2) for part in _parts(feature)]) for feature in features]
    lengths = [part.flatten(0, -2).shape[0] for part in _parts(features[0])]
    seen = flat[0] if len(flat) == 1 else torch.stack(flat, dim=1)
    edited = run.fire(point, seen, lengths=lengths)
    columns = [edited] if len(flat) == 1 else list(edited.unbind(1))
    set_visual_features(
        output, [_like(feature, column) for feature, column in zip(features, columns, strict=True)]
    )
    return output


def _parts(feature: Any) -> list[Tensor]:
    return [feature] if isinstance(feature, Tensor) else list(feature)


def _like(feature: Any, flat: Tensor) -> Any:
    """`flat` in the form of `feature`: a tensor, or a list or tuple of tensors a picture."""
    parts = _parts(feature)
    columns = flat.split([part.flatten(0, -2).shape[0] for part in parts])
    pieces = [x.reshape(part.shape) for x, part in zip(columns, parts, strict=True)]
    return pieces[0] if isinstance(feature, Tensor) else type(feature)(pieces)
