"""Senders and receivers of path patching, read from what a user writes, and which sender can reach
which receiver."""

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
from corelens.model.hooked import HookedMLLM
from corelens.tokens.positions import member, resolve

# the points of a layer in the order of computation
ORDER = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot_q",
    "attn.hook_rot_k",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_gate",
    "attn.hook_z",
    "attn.hook_result",
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
    "hook_deepstack",
)
FROZEN = ("attn.hook_gate", "attn.hook_z", "attn.hook_result", "hook_attn_out")  # in the path run
# before the norm's weight
ALIASES = {"hook_mlp_in": "ln2.hook_normalized", "hook_attn_in": "ln1.hook_normalized"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_HEAD = re.compile(r"blocks\.(\d+)\.attn\.(head|kv_head)\.(\d+)\.(hook_\w+)")


@dataclass(frozen=True)
class Sender:
    """A sender: hook points, or one head of them, that get the other run's values.

    Args:
        label: its name on the result's axis.
        names: its hook points.
        head: the head that is written; None: the whole tensor.
        visual: whether it is written at the visual tokens only.
    """

    label: str
    names: tuple[str, ...]
    head: int | None = None
    visual: bool = False

    def allowed(self, inputs: Any, step_positions: Tensor, batch: int) -> Tensor | None:
        """The positions at which it is written, as a mask [batch, pos] up to the last of
        `step_positions`; None: everywhere."""
        if not self.visual:
            return None
        visual = resolve("visual", inputs, step_positions, batch, rows=True)
        return member(visual, int(step_positions[-1]) + 1)


@dataclass(frozen=True)
class Receiver:
    """A receiver: a point that is set, in the last run, to its value in the path run.

    Args:
        name: as the user wrote it.
        reads: the hook point (or per-head name) whose value in the path run is taken.
        alone: (layer, query head, "key" or "value") if the value is set for that query head alone,
            and not for the heads that share its KV head.
    """

    name: str
    reads: str
    alone: tuple[int, int, str] | None = None

    def write(self, value: Tensor, where: Tensor | None) -> Hook:
        """The hook of the last run, which sets this receiver to `value` (only at `where` [sample,
        pos], if given)."""
        # A per-head name of pattern or scores has no head axis, so positions are one axis earlier.
        axis = 1 if ".head." in self.reads else axis_of(self.reads)[0]

        def mixed(x: Tensor, positions: Tensor) -> Tensor:
            if where is None:
                return value.clone()
            mask = where.repeat_interleave(x.shape[0] // len(where), dim=0)
            mask = mask[:, positions.to(where.device)].to(x.device)
            shape = [1] * x.ndim  # so that it broadcasts over x
            shape[0], shape[axis] = mask.shape
            return torch.where(mask.reshape(shape), value, x)

        if self.alone is None:

            def receive(x: Tensor, hook: Any) -> Tensor:
                return mixed(x, hook.ctx["positions"])

            return self.reads, receive
        layer, head, kind = self.alone

        def receive_alone(edges: Edges, hook: Any) -> None:
            step_positions = edges.step.positions

            def edit(x: Tensor) -> Tensor:
                # [batch, key, d]: in a run that begins at a later row, x has earlier keys too
                earlier, new = x[:, : int(step_positions[0])], x[:, step_positions]
                return torch.cat([earlier, mixed(new, step_positions)], dim=1)

            edges.give(head, kind, edit)

        return f"blocks.{layer}.attn.hook_edges", receive_alone


# --- reading what was given


def parse_senders(senders: Any, n_layers: int, n_heads: int, names: Iterable[str]) -> list[Sender]:
    """Senders from a HeadSet, heads, hook names or "visual", or a list of these.

    Args:
        n_layers, n_heads: the model's, to refuse heads of another.
        names: the model's hook points: what DeepStack adds belongs to "visual", a gate to its head.
    """
    gates = {name for name in names if name.endswith("hook_gate")}
    deepstack = [name for name in names if name.endswith("hook_deepstack")]
    single = isinstance(senders, str | Head) or (
        isinstance(senders, tuple) and len(senders) == 2 and isinstance(senders[0], int)
    )
    parsed = []
    for sender in [senders] if single else senders:
        head = _HEAD.fullmatch(sender) if isinstance(sender, str) else None
        if sender in ("visual", "vision.hook_out"):
            parsed.append(Sender("visual", ("hook_embed", *deepstack), visual=True))
        elif head and head[2] == "head" and head[4] == "hook_z":
            parsed.append(_head(Head(int(head[1]), int(head[3])), n_layers, n_heads, gates))
        elif isinstance(sender, str) and (sender == "hook_embed" or _BLOCK.fullmatch(sender)):
            point = "" if sender == "hook_embed" else _BLOCK.fullmatch(sender)[2]  # type: ignore[index]
            if sender != "hook_embed" and (
                point not in ORDER or point.endswith(("scores", "pattern", "scale"))
            ):
                raise CorelensError(
                    f"the sender {sender!r}",
                    "what writes to the residual stream: heads, hook_mlp_out, hook_embed, "
                    "hook_deepstack, 'visual'",
                    "for a head write (layer, head) or 'L3H5'",
                )
            parsed.append(Sender(sender, (sender, *_gate(sender, gates))))
        else:
            parsed.append(_head(Head.of(sender), n_layers, n_heads, gates))
    if not parsed:
        raise CorelensError("no senders", "one or more", "for instance senders=[(3, 5)]")
    return parsed


def _head(head: Head, n_layers: int, n_heads: int, gates: set[str]) -> Sender:
    HeadSet([head]).check(n_layers, n_heads)
    z = f"blocks.{head.layer}.attn.hook_z"
    return Sender(str(head), (z, *_gate(z, gates)), head.head)


def _gate(name: str, gates: set[str]) -> list[str]:
    """The gate by which this z is multiplied before it is projected, where there is one."""
    gate = name.replace("hook_z", "hook_gate")
    return [gate] if name.endswith("hook_z") and gate in gates else []


def mixer_points(layer: int, names: Container[str], written: Container[str] = ()) -> list[str]:
    """The points at which a layer is frozen: z of its heads (and their gate), or the layer's output
    where it mixes tokens without heads.

    Args:
        names: the points in the base run's cache, or those of the model.
        written: the points that senders write.
    """
    z, gate, out = (
        f"blocks.{layer}.{point}" for point in ("attn.hook_z", "attn.hook_gate", "hook_attn_out")
    )
    if z in names or z in written or out not in names:
        return [z, gate] if gate in names else [z]
    return [out]


def parse_receivers(receivers: Iterable[str] | str, model: HookedMLLM) -> list[Receiver]:
    """Receivers from hook names; each is checked against the model."""
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    parsed = []
    for name in [receivers] if isinstance(receivers, str) else receivers:
        if not isinstance(name, str):
            raise CorelensError(
                f"the receiver {name!r}",
                "a hook name",
                "for a head's query: 'blocks.5.attn.head.2.hook_q'",
            )
        block = _BLOCK.fullmatch(name)
        reads = f"blocks.{block[1]}.{ALIASES[block[2]]}" if block and block[2] in ALIASES else name
        model.hook_dict[reads]  # raises with the nearest names
        head, alone = _HEAD.fullmatch(reads), None
        is_kv = head and head[2] == "head" and head[4] in ("hook_k", "hook_rot_k", "hook_v")
        if head and is_kv and group > 1:
            number = int(head[3])
            kind, point = ("value", "hook_v") if head[4] == "hook_v" else ("key", "hook_rot_k")
            alone = (int(head[1]), number, kind)
            reads = f"blocks.{head[1]}.attn.kv_head.{number // group}.{point}"
        parsed.append(Receiver(name, reads, alone))
    if not parsed:
        raise CorelensError(
            "no receivers", "one or more hook names", "for instance receivers=['hook_logits']"
        )
    return parsed


def rank(name: str, n_layers: int) -> tuple[int, int]:
    """(layer, number in the layer) of a point in the order of computation."""
    name = re.sub(r"\.(head|kv_head)\.\d+\.", ".", name)
    block = _BLOCK.fullmatch(name)
    if block:
        return int(block[1]), ORDER.index(block[2]) if block[2] in ORDER else -1
    if name == "hook_embed" or name.startswith(TOWERS):
        return -1, 0
    return n_layers, 1 if name == "hook_logits" else 0


def reaches(sender: Sender, receiver: Receiver, n_layers: int) -> bool:
    """Whether a direct path can lead from a sender to a receiver."""
    point = re.sub(r"\.(head|kv_head)\.\d+\.", ".", receiver.reads)
    if point.endswith(FROZEN) or receiver.reads in sender.names:
        return False
    return min(rank(name, n_layers) for name in sender.names) < rank(receiver.reads, n_layers)
