"""Hook points, their names, and the tree that they form in a model.

Hook points are TransformerLens's, with three additions: a hook function that returns another shape,
dtype or device is refused by its name; each head has a point of its own for its slice of the tensor
(`blocks.3.attn.head.5.hook_z`); and an unknown name is refused with the nearest names.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import LensHookPoint, attach_order, newest_handle

TOWERS = ("vision.", "audio.")  # how the names of points outside the decoder begin

HookFunction = Callable[..., Any]  # fn(tensor, hook) → the edited tensor, or None to leave it
Hook = tuple[str | Callable[[str], bool], HookFunction]

# While a hook function is under way: the names of the points that its run was wired for; None
# otherwise.
points_of_the_run: ContextVar[frozenset[str] | None] = ContextVar(
    "corelens_points_of_the_run", default=None
)

PER_HEAD = re.compile(
    r"(?P<attn>.+\.attn)\.(?P<kind>head|kv_head)\.(?P<index>\d+)\.(?P<point>hook_\w+)"
)


def hook_list(hooks: Any) -> list[Hook]:
    """Hooks as a list of (name, function); a single pair is accepted too.

    Raises:
        CorelensError: an entry that is no such pair.
    """
    pairs: list[Any] = list(hooks)
    if len(pairs) == 2 and not isinstance(pairs[0], tuple | list):
        pairs = [(pairs[0], pairs[1])]
    for hook in pairs:
        if not (isinstance(hook, tuple | list) and len(hook) == 2 and callable(hook[1])):
            raise CorelensError(
                f"the hook {hook!r}",
                "(name of a hook point, or a function of names; the function to run there)",
                "give a list of such pairs, for instance [('blocks.0.attn.hook_z', fn)]",
            )
    return pairs


def name_of(function: Any) -> str:
    """A readable name for a hook function, also when it is a partial or an object."""
    inner = getattr(function, "func", function)
    return str(getattr(function, "__name__", None) or getattr(inner, "__name__", repr(function)))


class HookPoint(LensHookPoint):
    """A TransformerLens HookPoint that checks what its functions return, and has a point for each
    head's slice.

    Args:
        head_axis: the head axis of its tensor; None if it has none.
        n_heads: the size of that axis.
        group: how many query heads share one entry of that axis (1 unless it counts KV heads).
    """

    def __init__(self, head_axis: int | None = None, n_heads: int = 0, group: int = 1):
        super().__init__()
        self.head_axis, self.n_heads, self.group = head_axis, n_heads, group
        self.heads: dict[tuple[str, int], HookPoint] = {}  # made when a name asks for them

    @property
    def active(self) -> bool:
        """Whether a hook function is attached here or to a head's point; else the tensor is not
        computed."""
        return bool(self.fwd_hooks or self.bwd_hooks) or any(
            head.active for head in self.heads.values()
        )

    def add_hook(self, hook: HookFunction, dir: Any = "fwd", *args: Any, **kwargs: Any):
        """As in TransformerLens; a forward function that returns another shape, dtype or device is
        refused by its name.

        Raises:
            CorelensError: called inside a hook function, for a point that the present run does not
                fire.
        """
        wired = points_of_the_run.get()
        # (a hook with a level belongs to a context manager: it is for runs that begin inside it)
        if (
            wired is not None
            and kwargs.get("level") is None
            and len(args) < 2
            and _layer_point(self.name) not in wired
        ):
            raise CorelensError(
                f"the hook {name_of(hook)!r} added at {self.name!r} inside a hook function",
                "hooks that are there when the run begins: it is wired for those points only",
                "add it before the run; if it has nothing to do until then, let it return None",
            )
        super().add_hook(_checked(hook) if dir == "fwd" else hook, dir, *args, **kwargs)
        handle = newest_handle(self.fwd_hooks if dir == "fwd" else self.bwd_hooks)
        handle.user_hook = hook
        return handle

    def layer(self) -> int:
        """The number of the point's layer, in the decoder or in a tower."""
        match = re.search(r"(?:^|\.)blocks\.(\d+)\.", str(self.name))
        if match is None:
            raise CorelensError(
                f"the layer of {self.name!r}",
                "a point of one layer",
                "ask hook.name, which stands for no layer",
            )
        return int(match[1])

    def per_head(self, kind: str, index: int, name: str) -> "HookPoint":
        """The point of one head's slice; `kind` is "head" (a query head) or "kv_head"."""
        limit = self.n_heads * self.group if kind == "head" else self.n_heads
        if self.head_axis is None or (
            kind == "kv_head" and not name.endswith(("hook_k", "hook_v", "hook_rot_k"))
        ):
            raise CorelensError(
                f"the hook name {name!r}",
                "head.{h} for q, rot_q, k, v, z, result, attn_scores, pattern, pattern_rows; "
                "kv_head.{g} for k, v",
                f"hook {self.name!r} and index it, or take a name of that form",
            )
        if index >= limit:
            raise CorelensError(
                f"{kind} {index} in {name!r}", f"0 to {limit - 1}", "take a head that the model has"
            )
        if (kind, index) not in self.heads:
            point = HookPoint()
            point.name = name
            self.heads[kind, index] = point
        return self.heads[kind, index]

    def fire(self, x: Any, ctx: Mapping[str, Any]) -> Any:
        """Run the functions attached to this point and to its heads' points. Returns `x` itself
        unless one of them returned another tensor."""
        points = [
            (key, point)
            for key, point in ((None, self), *self.heads.items())
            if point.fwd_hooks or point.bwd_hooks
        ]

        def attached(entry: tuple[tuple[str, int] | None, HookPoint]) -> int:
            return min(
                attach_order(handle) for handle in (*entry[1].fwd_hooks, *entry[1].bwd_hooks)
            )

        # In the order in which they were attached, so that later functions see the earlier edits.
        for key, point in sorted(points, key=attached):
            if key is None:
                self.ctx.update(ctx)
                x = self(x)
            else:
                x = self._fire_head(*key, point, x, ctx)
        return x

    def _fire_head(
        self, kind: str, index: int, head: "HookPoint", x: Tensor, ctx: Mapping[str, Any]
    ) -> Tensor:
        axis_index = index // self.group if kind == "head" else index
        part, edited = fire_watched(head, x.select(self.head_axis, axis_index).clone(), ctx)  # type: ignore[arg-type]
        if not edited:
            return x
        if kind == "head" and self.group > 1 and not head.bwd_hooks:
            raise CorelensError(
                f"an edit through {head.name!r}",
                f"an edit of a KV head, which {self.group} query heads share",
                "write through "
                f"{str(head.name).replace(f'head.{index}', f'kv_head.{axis_index}')!r}",
            )
        x = x.clone()
        x.select(self.head_axis, axis_index).copy_(part)  # type: ignore[arg-type]
        return x


def fire_watched(point: HookPoint, x: Tensor, ctx: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """(`point.fire(x)`, whether the values changed). An edit in place returns the same tensor, but
    raises its version counter; an inference tensor has no such counter and is compared."""
    before = x.clone() if x.is_inference() else x._version
    y = point.fire(x, ctx)
    if y is not x:
        return y, True
    return y, not torch.equal(x, before) if isinstance(before, Tensor) else x._version != before


def _checked(hook: HookFunction) -> HookFunction:
    def checked(x: Any, hook_point: Any) -> Any:
        shape = _form(x)
        y = hook(x, hook=hook_point)
        if y is not None and _form(y) != shape:
            raise CorelensError(
                f"the hook function {name_of(hook)!r} at {hook_point.name!r} returned {_form(y)}",
                f"None, or {shape}",
                "return a tensor of the same shape, dtype and device",
            )
        return y

    def with_tensor(x: Any, *, hook: Any) -> Any:
        return checked(x, hook)

    with_tensor.__name__ = name_of(hook)
    return with_tensor


def _layer_point(name: str | None) -> str | None:
    """The point that a per-head name is a slice of; other names as they are."""
    match = PER_HEAD.fullmatch(name or "")
    return f"{match['attn']}.{match['point']}" if match else name


def _form(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


class HookDict(dict[str, Any]):
    """{name: hook point}. Per-head points are made when they are asked for by name, and iteration
    leaves them out.

    (A model of 36 layers and 32 heads has some 10,000 of them: as modules they would cost 14 ms a
    run.)
    """

    def __init__(self, points: Mapping[str, Any], absent: Mapping[str, str] | None = None):
        super().__init__(points)
        self.absent = absent or {}  # names that this model cannot have → why

    def __missing__(self, name: str) -> Any:
        if (reason := self.absent.get(_layer_point(name) or name)) is not None:
            raise CorelensError(
                f"the hook name {name!r}", f"a name that this layer has: {reason}",
                "hook hook_mlp_out or hook_attn_out there, or another layer",
            )  # fmt: skip
        if match := PER_HEAD.fullmatch(name):
            parent = self.get(f"{match['attn']}.{match['point']}")
            if isinstance(parent, HookPoint):
                return parent.per_head(match["kind"], int(match["index"]), name)
        if head := re.fullmatch(r"L(\d+)H(\d+)", name):
            near = [f"blocks.{head[1]}.attn.head.{head[2]}.hook_{point}" for point in "zq"]
        else:
            near = difflib.get_close_matches(name, list(self), n=3, cutoff=0.5)
        raise CorelensError(
            f"the hook name {name!r}",
            f"a name that the model has; the nearest: {', '.join(near) or 'none'}",
            "model.hook_names() lists them, model.hook_names('hook_z') those that contain a word",
        )


def all_points(hook_dict: Mapping[str, HookPoint]) -> Iterator[HookPoint]:
    """Every hook point, per-head points that exist included."""
    for point in hook_dict.values():
        yield point
        yield from point.heads.values()


def rows_asked_for(points: Iterable[HookPoint]) -> str | None:
    """The rows that functions at `hook_pattern_rows` ask for by their attribute `rows` (without
    one: "question"); None if there is no such function."""
    rows: dict[str, None] = {}  # each once, in order
    for point in points:
        if "hook_pattern_rows" in str(point.name):
            for handle in (*point.fwd_hooks, *point.bwd_hooks):
                rows[getattr(handle.user_hook, "rows", "question")] = None
    return "+".join(rows) or None


class NormPoints(nn.Module):
    """`hook_scale` [batch, pos, 1] and `hook_normalized` [batch, pos, d_model] (before the norm's
    weight)."""

    def __init__(self):
        super().__init__()
        self.hook_scale, self.hook_normalized = HookPoint(), HookPoint()


class AttentionPoints(nn.Module):
    """The points of one layer's attention; shapes as in TransformerLens, k and v with KV heads.

    `hook_gate` [batch, pos, head, d_head] exists only where q_proj also computes a gate that
    multiplies z (after the family's activation function). A layer without attention heads has these
    names too, but they are refused with the reason. In a cross-attention layer (`cross`) keys and
    values come from the tower's tokens, and the key axis and the columns of edges count these.
    """

    def __init__(self, n_heads: int, n_kv_heads: int, gated: bool = False, cross: bool = False):
        super().__init__()
        self.cross = cross
        group = n_heads // max(n_kv_heads, 1)
        self.hook_q, self.hook_rot_q = HookPoint(2, n_heads), HookPoint(2, n_heads)
        self.hook_k, self.hook_rot_k, self.hook_v = (
            HookPoint(2, n_kv_heads, group) for _ in range(3)
        )
        self.hook_edges = HookPoint()
        self.hook_attn_scores, self.hook_pattern, self.hook_pattern_rows = (
            HookPoint(1, n_heads) for _ in range(3)
        )
        self.hook_z, self.hook_result = HookPoint(2, n_heads), HookPoint(2, n_heads)
        if gated:
            self.hook_gate = HookPoint(2, n_heads)

    @property
    def in_function(self) -> tuple[HookPoint, ...]:
        """The points that fire inside the attention function. (The others are module hooks.)"""
        return (
            self.hook_rot_q, self.hook_rot_k, self.hook_v, self.hook_edges,
            self.hook_attn_scores, self.hook_pattern, self.hook_pattern_rows, self.hook_z,
        )  # fmt: skip


class MLPPoints(nn.Module):
    """`hook_pre`: the gate before its activation; `hook_post`: what enters the down projection;
    [batch, pos, d_mlp]."""

    def __init__(self):
        super().__init__()
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()


class BlockPoints(nn.Module):
    """The points of one decoder layer, in the order in which they fire; residual points are [batch,
    pos, d_model].

    `hook_deepstack` is there only on layers after which visual features are added again.
    """

    def __init__(self, n_heads: int, n_kv_heads: int, deepstack: bool, gated: bool = False):
        super().__init__()
        self.hook_resid_pre = HookPoint()
        self.ln1 = NormPoints()
        self.attn = AttentionPoints(n_heads, n_kv_heads, gated)
        self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint()
        self.ln2 = NormPoints()
        self.mlp = MLPPoints()
        self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint()
        if deepstack:
            self.hook_deepstack = HookPoint()


class TowerAttentionPoints(nn.Module):
    """The points of one tower layer's attention.

    q, k, v [image, pos, head, d_head] are the outputs of the projections (before norms and rotary;
    k and v have KV heads). pattern is [image, head, query, key]. z [image, pos, head, d_head] is
    the input of the output projection.
    """

    def __init__(self, n_heads: int, n_kv_heads: int):
        super().__init__()
        group = n_heads // max(n_kv_heads, 1)
        self.hook_q = HookPoint(2, n_heads)
        self.hook_k, self.hook_v = (HookPoint(2, n_kv_heads, group) for _ in range(2))
        self.hook_pattern, self.hook_z = HookPoint(1, n_heads), HookPoint(2, n_heads)


class TowerBlockPoints(nn.Module):
    """The points of one tower layer; residual points are [image, pos, d_tower]."""

    def __init__(self, n_heads: int, n_kv_heads: int):
        super().__init__()
        self.hook_resid_pre = HookPoint()
        self.attn = TowerAttentionPoints(n_heads, n_kv_heads)
        self.hook_resid_post = HookPoint()


class TowerPoints(nn.Module):
    """The points of the vision or audio tower.

    `hook_out` holds the features that the decoder gets, of all pictures (or sounds) one after the
    other: [visual, d_model]. With DeepStack it is [visual, 1 + n, d_model], where n more features
    of each token are added after the first n layers.

    The axis "image" counts the entries of the tower's batch: images, tiles, frames, or pieces of
    sound. A tower without a batch axis runs on all patches of all pictures, joined along pos, and
    its points have a first axis of size 1. Where a tower has separate axes for rows and columns of
    patches, they are joined along pos.

    Args:
        heads: query heads and KV heads of each layer; (0, 0) where its attention cannot be reached.
    """

    def __init__(self, heads: Sequence[tuple[int, int]]):
        super().__init__()
        self.blocks = nn.ModuleList(TowerBlockPoints(*counts) for counts in heads)
        self.hook_out = HookPoint()
