"""The vision side of the hook tree: where its points fire.

Towers differ in how they call attention: some once for a batch of images or tiles, some once an
image or window of all patches joined in one row, without a batch axis. Points show the same form
for all: a first axis (images or tiles; of size 1 where all patches are joined), then positions.
Residual, q, k, v and z are module inputs and outputs. For the pattern the layer's attention runs
twice: once to collect its calls, of which the pattern is made, and once in which each call is
handed its z.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from corelens.hf import ENCODED, set_visual_features, visual_features
from corelens.hooks.points import HookPoint, VisionAttentionPoints, VisionBlockPoints, VisionPoints
from corelens.hooks.rows import Call, row_scores, softmax
from corelens.hooks.running import Running
from corelens.layouts.base import Layout
from corelens.model.module_hooks import Fires, on_input, on_output


def vision_points(hf: nn.Module, layout: Layout) -> tuple[VisionPoints, dict[str, str]]:
    """The vision side's points, and the names among them that this tower cannot have, with the
    reason."""
    layers = list(layout.vision_layers(hf))
    heads = _n_heads(layers[0], layout) if layers else 0
    points, missing = VisionPoints(len(layers) if heads else 0, heads), {}
    needs = {"q": layout.vision_qkv or layout.vision_q, "k": layout.vision_qkv or layout.vision_k}
    needs |= {
        "v": layout.vision_qkv or layout.vision_v,
        "z": layout.vision_out,
        "pattern": layout.vision_attention,
    }
    for number, layer in enumerate(layers[: len(points.blocks)]):
        for name, path in needs.items():
            if not any(path == found for found, _ in layer.named_modules()):
                missing[f"vision.blocks.{number}.attn.hook_{name}"] = (
                    f"its tower has no module {path!r}"
                )
    if not hasattr(layout.visual_features(hf), "get_image_features"):
        missing["vision.hook_out"] = "it has no get_image_features()"
    return points, missing


def _n_heads(layer: nn.Module, layout: Layout) -> int:
    """How many heads a tower's layer has; 0 if that cannot be told."""
    module = dict(layer.named_modules()).get(layout.vision_attention)
    config = getattr(module, "config", None)
    for holder, name in (
        (module, "num_heads"),
        (config, "num_attention_heads"),
        (config, "num_heads"),
    ):
        if isinstance(getattr(holder, name, None), int):
            return getattr(holder, name)
    return 0


@contextmanager
def wired_vision(
    hf: nn.Module, layout: Layout, points: VisionPoints, run: Running
) -> Iterator[None]:
    """Within this context a forward of `hf` fires every active vision point; afterwards `hf` is as
    it was."""
    with ExitStack() as stack:
        for block, layer in zip(points.blocks, layout.vision_layers(hf), strict=False):
            for handle in _place_block(run, layout, block, layer):  # type: ignore[arg-type]
                stack.callback(handle.remove)
            if block.attn.hook_pattern.active:  # type: ignore[union-attr]
                module = layer.get_submodule(layout.vision_attention)
                twice = _Twice(run, block.attn.hook_pattern)  # type: ignore[union-attr, arg-type]
                run.vision[module] = twice.call
                stack.callback(
                    module.register_forward_pre_hook(twice.begin, with_kwargs=True).remove
                )
        if points.hook_out.active:
            stack.enter_context(_features(hf, layout, points.hook_out, run))
        yield


def _place_block(
    run: Running, layout: Layout, points: VisionBlockPoints, layer: nn.Module
) -> Iterator[Any]:
    attn: VisionAttentionPoints = points.attn
    batched = _Batched(run)
    # With a hooked pattern the layer runs ahead, and it is of those q, k and v that the pattern is
    # made.
    ahead = _Batched(run, ahead=attn.hook_pattern.active)
    if points.hook_resid_pre.active:
        yield layer.register_forward_pre_hook(
            on_input(batched, points.hook_resid_pre), with_kwargs=True
        )
    if points.hook_resid_post.active:
        yield layer.register_forward_hook(
            on_output(batched, points.hook_resid_post), prepend=True
        )  # before the tower records it
    three = [
        (attn.hook_q, layout.vision_q),
        (attn.hook_k, layout.vision_k),
        (attn.hook_v, layout.vision_v),
    ]
    if layout.vision_qkv is None:
        for point, path in three:
            if point.active:
                yield layer.get_submodule(path).register_forward_hook(on_output(ahead, point))
    elif any(point.active for point, _ in three):
        fused = _on_fused(ahead, [point for point, _ in three])
        yield layer.get_submodule(layout.vision_qkv).register_forward_hook(fused)
    if attn.hook_z.active:
        yield layer.get_submodule(layout.vision_out).register_forward_pre_hook(
            on_input(batched, attn.hook_z), with_kwargs=True
        )


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
        seen = x if x.ndim == (3 if point.head_axis is None else 4) else x[None]
        edited = self.run.fire(point, seen)
        return x if edited is seen else edited.reshape(x.shape)


def _on_fused(run: Fires, points: list[HookPoint]) -> Callable[..., Any]:
    """One projection gives q, k and v of all heads: q first, then k, then v."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        parts = rearrange(
            output, "... (three head d) -> three ... head d", three=3, head=points[0].n_heads
        )
        edited = [
            run.fire(point, part) if point.active else part
            for point, part in zip(points, parts, strict=True)
        ]
        return rearrange(torch.stack(edited), "three ... head d -> ... (three head d)")

    return hook


class _Twice:
    """A vision layer's pattern: one firing for all calls that its attention makes of the attention
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
            softmax(row_scores(q, k, None, None, call), call.sinks) for q, k, _, call in self.calls
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
def _features(hf: nn.Module, layout: Layout, point: HookPoint, run: Running) -> Iterator[None]:
    """Fire `vision.hook_out` on all that gives the decoder visual features: images, videos, outputs
    made beforehand."""
    inner: Any = layout.visual_features(hf)
    names = {"get_image_features": "image", "get_video_features": "video"}
    names = {name: kind for name, kind in names.items() if hasattr(inner, name)}
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

    def given(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if not run.live:
            return args, kwargs
        outputs = dict(kwargs.get(ENCODED) or {})
        for kind in outputs.keys() - fired:
            if outputs[kind] is not None:
                if id(outputs[kind]) not in copies:
                    copies[id(outputs[kind])] = _fire_output(copy.copy(outputs[kind]), point, run)
                outputs[kind] = copies[id(outputs[kind])]
        return args, kwargs | {ENCODED: outputs} if outputs else kwargs

    # a run around this one has its own
    before = {name: vars(inner)[name] for name in names if name in vars(inner)}
    handle = inner.register_forward_pre_hook(given, with_kwargs=True)
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
