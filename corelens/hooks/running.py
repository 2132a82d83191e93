"""A run under hooks: the step that is under way, which attention modules have points, and what their hooks may know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from corelens.hf import attention_name, set_attention_name
from corelens.hooks.points import AttentionPoints, HookPoint, fire_watched

NAME = "corelens"  # what the attention function is registered as


@dataclass
class Step:
    """One forward of the decoder: which tokens are new, and what its hooks may know.

    Args:
        inputs: the running batch, or None.
        positions: of this step's tokens in the padded row; they go on counting while tokens are generated.
        rows: what `hook_pattern_rows` reads of them, [batch, row], −1 pads.
        cached: whether keys and values live in a cache that later steps read.
    """

    inputs: Any
    positions: Int[Tensor, " pos"]
    rows: Int[Tensor, "batch row"] | None
    cached: bool

    @property
    def total(self) -> int:
        """How many positions there are so far."""
        return int(self.positions[-1]) + 1

    @property
    def ctx(self) -> dict[str, Any]:
        """What a hook function finds in `hook.ctx`."""
        return {"inputs": self.inputs, "positions": self.positions}


@dataclass
class Running:
    """A run under hooks.

    Args:
        inputs: the running batch, or None.
        sites: the decoder's attention modules on whose points something hangs.
        vision: what takes the calls of vision attention modules whose pattern is hooked.
        step: the step that is under way; None before the decoder has begun.
        plan: what sparse inference leaves out (`corelens.sparse`), asked at every call of the decoder's attention.
        collecting: a vision layer runs ahead only to collect its calls of attention; its points keep silent.
        stored: the layers whose new k and v have passed their hooks on the way into the cache, in this step.
    """

    inputs: Any = None
    sites: dict[nn.Module, AttentionPoints] = field(default_factory=dict)
    vision: dict[nn.Module, Callable[..., Tensor]] = field(default_factory=dict)
    step: Step | None = None
    plan: Any = None
    collecting: bool = False
    stored: set[int] = field(default_factory=set)

    @property
    def ctx(self) -> dict[str, Any]:
        """What a hook function finds in `hook.ctx`."""
        return self.step.ctx if self.step else {"inputs": self.inputs}

    def fire(self, point: HookPoint, x: Any, **ctx: Any) -> Any:
        """Fire a point with this step's context; `ctx` is more for the functions to find."""
        return point.fire(x, self.ctx | ctx)

    def fire_watched(self, point: HookPoint, x: Tensor, **ctx: Any) -> tuple[Tensor, bool]:
        """`fire`, and whether anything was edited."""
        return fire_watched(point, x, self.ctx | ctx)


current: ContextVar[Running | None] = ContextVar("corelens_running", default=None)


@contextmanager
def running(run: Running) -> Iterator[Running]:
    """Within this context the attention function fires the points of `run`."""
    token = current.set(run)
    try:
        yield run
    finally:
        current.reset(token)


@contextmanager
def implementation(configs: list[Any]) -> Iterator[None]:
    """Switch these configs to the attention function of CoreLens, and back to what each had."""
    # The setter would switch every sub-config too; each is switched, and switched back, on its own.
    before = [(config, attention_name(config)) for config in configs]
    try:
        for config in configs:
            set_attention_name(config, NAME)
        yield
    finally:
        for config, name in before:
            set_attention_name(config, name)


@contextmanager
def edits_before_caching(cache: Any, run: Running) -> Iterator[None]:
    """Within this context new k and v pass their hooks before this cache takes them, whatever kind of cache it is."""
    by_layer: dict[Any, AttentionPoints] = {module.layer_idx: points for module, points in run.sites.items()}
    update = cache.update

    def hooked_update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in by_layer:
            key = run.fire(by_layer[layer_idx].hook_rot_k, key.transpose(1, 2)).transpose(1, 2)
            value = run.fire(by_layer[layer_idx].hook_v, value.transpose(1, 2)).transpose(1, 2)
            run.stored.add(layer_idx)
        return update(key, value, layer_idx, *args, **kwargs)

    cache.update = hooked_update  # on this instance only: it hides the class's method until it is deleted
    try:
        yield
    finally:
        del cache.update
