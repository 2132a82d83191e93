"""The state of a run under hooks: its present step, the attention modules whose points fire, and
the context that hook functions get."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from jaxtyping import Int
from torch import Tensor, nn

from corelens.hooks.points import AttentionPoints, HookPoint, fire_watched, points_of_the_run
from corelens.hooks.prefix import SharedPrefix

PATIENCE = 30.0  # seconds that a thread waits for another one's turn before it says so


@dataclass
class Step:
    """One forward of the decoder: its new tokens, and the context of its hook functions.

    Args:
        inputs: the running batch, or None.
        positions: of this step's tokens in the padded row; generated tokens continue the count.
        rows: the rows that `hook_pattern_rows` reads, [batch, row], −1 pads.
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
    """A run under hooks. Its points fire in its own thread only, and not in models that a hook
    function runs itself.

    Args:
        inputs: the running batch, or None.
        sites: {attention module of the decoder: its points}, of those that have hook functions.
        vision: {attention module of the vision tower: the function that takes its call}, of those
            whose pattern is hooked.
        step: the present step; None before the decoder has begun.
        sparse_plan: the Plan of sparse inference (`corelens.sparse.inference`), asked at every call
            of the decoder's attention; None without one.
        collecting: a vision layer runs ahead only to collect its calls of attention; its points do
            not fire.
        stored: the layers whose new k and v have passed their hooks, in this step, before the cache
            stored them.
        generating: whether tokens are generated, so that the decoder is called once a token.
        points: the names of the points that were wired when the run began.
        heads: how many query heads each layer of the decoder has.
        prefix: in this step, the tokens before it that its runs share; None: the cache has them.
    """

    inputs: Any = None
    sites: dict[nn.Module, AttentionPoints] = field(default_factory=dict)
    vision: dict[nn.Module, Callable[..., Tensor]] = field(default_factory=dict)
    step: Step | None = None
    sparse_plan: Any = None
    collecting: bool = False
    stored: set[int] = field(default_factory=set)
    generating: bool = False
    points: frozenset[str] = frozenset()
    heads: tuple[int, ...] = ()
    prefix: SharedPrefix | None = None

    @property
    def ctx(self) -> dict[str, Any]:
        """What a hook function finds in `hook.ctx`."""
        return {"heads": self.heads, **(self.step.ctx if self.step else {"inputs": self.inputs})}

    @property
    def live(self) -> bool:
        """Whether what is computed now belongs to this run."""
        return current.get() is self

    def fire(self, point: HookPoint, x: Any, **ctx: Any) -> Any:
        """Fire a point with this step's context; `ctx` is more for the functions to find."""
        if not self.live:
            return x
        with self._in_function():
            return point.fire(x, self.ctx | ctx)

    def fire_watched(self, point: HookPoint, x: Tensor, **ctx: Any) -> tuple[Tensor, bool]:
        """`fire`, and whether anything was edited."""
        if not self.live:
            return x, False
        with self._in_function():
            return fire_watched(point, x, self.ctx | ctx)

    @contextmanager
    def _in_function(self) -> Iterator[None]:
        """While hook functions are under way, what they run themselves is no part of this run."""
        outside, names = current.set(None), points_of_the_run.set(self.points)
        try:
            yield
        finally:
            points_of_the_run.reset(names)
            current.reset(outside)


current: ContextVar[Running | None] = ContextVar("corelens_running", default=None)


@contextmanager
def running(run: Running) -> Iterator[Running]:
    """Within this context the attention function fires the points of `run`."""
    # (a run that a hook function starts is one of its own: hooks may be added for it)
    token, names = current.set(run), points_of_the_run.set(None)
    try:
        yield run
    finally:
        points_of_the_run.reset(names)
        current.reset(token)


_turns: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextmanager
def turn(hf: nn.Module) -> Iterator[None]:
    """Within this context no other thread runs this model under hooks, or attaches hooks to it by a
    context manager.

    Hook points belong to the model and not to a thread, so hooks attached by one thread would fire
    in another's run. A thread may enter again.
    """
    with _turns_lock:
        lock = _turns.setdefault(hf, threading.RLock())
    if not lock.acquire(timeout=PATIENCE):
        warnings.warn(
            f"this thread has waited for {PATIENCE:.0f} seconds: another one is inside a run of "
            "this model, or inside "
            "model.hooks(...), model.sparse(...) or model.pattern_rows(...). Runs of one model "
            "take turns; enter these "
            "contexts in the thread that runs the model",
            stacklevel=2,
        )
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def edits_before_caching(cache: Any, run: Running) -> Iterator[None]:
    """Within this context new k and v pass their hooks before this cache, of any kind, stores
    them."""
    by_layer: dict[Any, AttentionPoints] = {
        module.layer_idx: points for module, points in run.sites.items()
    }
    before, update = vars(cache).get("update"), cache.update

    def hooked_update(key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in by_layer and run.live:
            key = run.fire(by_layer[layer_idx].hook_rot_k, key.transpose(1, 2)).transpose(1, 2)
            value = run.fire(by_layer[layer_idx].hook_v, value.transpose(1, 2)).transpose(1, 2)
            run.stored.add(layer_idx)
        return update(key, value, layer_idx, *args, **kwargs)

    # on this instance only: it hides the class's method until it is deleted
    cache.update = hooked_update
    try:
        yield
    finally:
        if before is None:
            del cache.update
        else:  # a run inside a hook function, with the same cache
            cache.update = before
