"""The two ends of a path: what can send, what can receive, and which comes before which."""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.head_set import Head, HeadSet
from corelens.hooks.edges import Edges
from corelens.hooks.points import TOWERS, Hook
from corelens.interventions.sites import axis_of
from corelens.tokens.positions import member, resolve

# the points of a layer in the order of computation
ORDER = (
    "hook_resid_pre", "ln1.hook_scale", "ln1.hook_normalized", "attn.hook_q", "attn.hook_k", "attn.hook_v",
    "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_gate", "attn.hook_z",
    "attn.hook_result", "hook_attn_out", "hook_resid_mid", "ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre",
    "mlp.hook_post", "hook_mlp_out", "hook_resid_post", "hook_deepstack",
)  # fmt: skip
FROZEN = ("attn.hook_gate", "attn.hook_z", "attn.hook_result", "hook_attn_out")  # in the path run
# before the norm's weight
ALIASES = {"hook_mlp_in": "ln2.hook_normalized", "hook_attn_in": "ln1.hook_normalized"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_HEAD = re.compile(r"blocks\.(\d+)\.attn\.(head|kv_head)\.(\d+)\.(hook_\w+)")


@dataclass(frozen=True)
class Sender:
    """What sends: these points (of one head, if `head` is given), with another run's values.

    Args:
        label: for the result's axis.
        names: hook points.
        head: one head of them; None: the whole tensor.
        visual: only at the visual tokens.
    """

    label: str
    names: tuple[str, ...]
    head: int | None = None
    visual: bool = False

    def places(self, inputs: Any, here: Tensor, batch: int) -> Tensor | None:
        """Where it may write at all, up to the last of the positions `here`: [batch, pos], or None:
        everywhere."""
        if not self.visual:
            return None
        return member(resolve("visual", inputs, here, batch, rows=True), int(here[-1]) + 1)


@dataclass(frozen=True)
class Receiver:
    """What receives: its name, and the point that is read in the path run.

    Args:
        name: as it was given.
        reads: the point (or per-head name) whose value in the path run it is given.
        alone: (layer, query head, "key" or "value") if that one query head alone is to have it.
    """

    name: str
    reads: str
    alone: tuple[int, int, str] | None = None

    def write(self, value: Tensor, where: Tensor | None) -> Hook:
        """The hook of the last run: this receiver has `value` (at `where` [sample, pos], if
        given)."""
        axis = axis_of(self.reads)[0] - (".head." in self.reads and axis_of(self.reads)[0] == 2)

        def mixed(x: Tensor, positions: Tensor) -> Tensor:
            if where is None:
                return value.clone()
            rows = where.repeat_interleave(x.shape[0] // len(where), dim=0)[
                :, positions.to(where.device)
            ].to(x.device)
            shape = [1] * x.ndim
            shape[0], shape[axis] = rows.shape
            return torch.where(rows.reshape(shape), value, x)

        if self.alone is None:

            def receive(x: Tensor, hook: Any) -> Tensor:
                return mixed(x, hook.ctx["positions"])

            return self.reads, receive
        layer, head, what = self.alone

        def receive_alone(edges: Edges, hook: Any) -> None:
            here = edges.step.positions

            def edit(x: Tensor) -> Tensor:  # [batch, key, d], a prefix among the keys
                return torch.cat([x[:, : int(here[0])], mixed(x[:, here], here)], dim=1)

            edges.give(head, what, edit)

        return f"blocks.{layer}.attn.hook_edges", receive_alone


# --- reading what was given


def parse_senders(given: Any, n_layers: int, n_heads: int, names: Iterable[str]) -> list[Sender]:
    """Senders from a HeadSet, heads, hook names or "visual", or a list of these.

    Args:
        n_layers, n_heads: the model's, to refuse heads of another.
        names: the model's hook points: what DeepStack adds belongs to "visual", a gate to its head.
    """
    gates = {name for name in names if name.endswith("hook_gate")}
    deepstack = [name for name in names if name.endswith("hook_deepstack")]
    single = isinstance(given, str | Head) or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], int)
    )
    found = []
    for one in [given] if single else given:
        head = _HEAD.fullmatch(one) if isinstance(one, str) else None
        if one in ("visual", "vision.hook_out"):
            found.append(Sender("visual", ("hook_embed", *deepstack), visual=True))
        elif head and head[2] == "head" and head[4] == "hook_z":
            found.append(_head(Head(int(head[1]), int(head[3])), n_layers, n_heads, gates))
        elif isinstance(one, str) and (one == "hook_embed" or _BLOCK.fullmatch(one)):
            point = "" if one == "hook_embed" else _BLOCK.fullmatch(one)[2]  # type: ignore[index]
            if one != "hook_embed" and (
                point not in ORDER or point.endswith(("scores", "pattern", "scale"))
            ):
                raise CorelensError(
                    f"the sender {one!r}",
                    "what writes to the residual stream: heads, hook_mlp_out, hook_embed, hook_deepstack, 'visual'",
                    "for a head write (layer, head) or 'L3H5'",
                )
            found.append(Sender(one, (one, *_gate(one, gates))))
        else:
            found.append(_head(Head.of(one), n_layers, n_heads, gates))
    if not found:
        raise CorelensError("no senders", "one or more", "for instance senders=[(3, 5)]")
    return found


def _head(head: Head, n_layers: int, n_heads: int, gates: set[str]) -> Sender:
    HeadSet([head]).check(n_layers, n_heads)
    z = f"blocks.{head.layer}.attn.hook_z"
    return Sender(str(head), (z, *_gate(z, gates)), head.head)


def _gate(name: str, gates: set[str]) -> list[str]:
    """The gate by which this z is multiplied before it is projected, where there is one."""
    gate = name.replace("hook_z", "hook_gate")
    return [gate] if name.endswith("hook_z") and gate in gates else []


def mixing(layer: int, names: Container[str], written: Container[str] = ()) -> list[str]:
    """The points that freeze what a layer carries between tokens: its heads, or else its mixer's
    output.

    Args:
        names: the points that the base run's cache holds, or that the model has.
        written: those that senders write: they are never frozen as a whole.
    """
    z, gate, out = (
        f"blocks.{layer}.{point}" for point in ("attn.hook_z", "attn.hook_gate", "hook_attn_out")
    )
    if z in names or z in written or out not in names:
        return [z, gate] if gate in names else [z]
    return [out]


def parse_receivers(given: Iterable[str] | str, model: Any) -> list[Receiver]:
    """Receivers from hook names; each is checked against the model."""
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    found = []
    for name in [given] if isinstance(given, str) else given:
        if not isinstance(name, str):
            raise CorelensError(
                f"the receiver {name!r}",
                "a hook name",
                f"for a head's query: 'blocks.5.attn.head.2.hook_q' {''}".strip(),
            )
        block = _BLOCK.fullmatch(name)
        reads = f"blocks.{block[1]}.{ALIASES[block[2]]}" if block and block[2] in ALIASES else name
        model.hook_dict[reads]  # raises with the nearest names
        head, alone = _HEAD.fullmatch(reads), None
        if (
            head
            and head[2] == "head"
            and head[4] in ("hook_k", "hook_rot_k", "hook_v")
            and group > 1
        ):
            number = int(head[3])
            what, point = ("value", "hook_v") if head[4] == "hook_v" else ("key", "hook_rot_k")
            alone = (int(head[1]), number, what)
            reads = f"blocks.{head[1]}.attn.kv_head.{number // group}.{point}"
        found.append(Receiver(name, reads, alone))
    if not found:
        raise CorelensError(
            "no receivers", "one or more hook names", "for instance receivers=['hook_logits']"
        )
    return found


def rank(name: str, n_layers: int) -> tuple[int, int]:
    """Where a point stands in the order of computation."""
    name = re.sub(r"\.(head|kv_head)\.\d+\.", ".", name)
    block = _BLOCK.fullmatch(name)
    if block:
        return int(block[1]), ORDER.index(block[2]) if block[2] in ORDER else -1
    return (
        (-1, 0)
        if name == "hook_embed" or name.startswith(TOWERS)
        else (n_layers, int(name == "hook_logits"))
    )


def reaches(sender: Sender, receiver: Receiver, n_layers: int) -> bool:
    """Whether a direct path leads from one to the other."""
    point = re.sub(r"\.(head|kv_head)\.\d+\.", ".", receiver.reads)
    if point.endswith(FROZEN) or receiver.reads in sender.names:
        return False
    return min(rank(name, n_layers) for name in sender.names) < rank(receiver.reads, n_layers)
