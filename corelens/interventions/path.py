"""Path patching: only direct paths from senders to receivers carry the change.

There are four runs:

1. The other run gives the senders' values.
2. The base run gives the values of all heads.
3. The path run, on the base input: senders have the other run's values, and every other head is
   frozen at its base value (MLPs are recomputed, or frozen too). So what the receivers read here
   differs from the base run by direct paths only.
4. The last run, on the base input: receivers are set to what they read in the path run, and
   everything past them is recomputed.

Source: Wang et al. 2022, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv
2304.05969.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.interventions.patching import runs_per_forward
from corelens.interventions.path_run import group_hooks
from corelens.interventions.replay import Replay, Start, layer_of
from corelens.interventions.result import PatchResult
from corelens.interventions.resume import patched_in
from corelens.interventions.senders_receivers import (
    Receiver,
    Sender,
    mixer_points,
    parse_receivers,
    parse_senders,
    reaches,
)
from corelens.interventions.sites import POSITION_AXES, position_masks, table
from corelens.interventions.two_runs import Direction, prepare_runs
from corelens.model.hooked import HookedMLLM
from corelens.runs.processes import check_folder
from corelens.tokens.positions import Where

# senders that act jointly, and at which positions
Group = tuple[Sequence[Sender], Bool[Tensor, "sample pos"] | None]
# receivers that are patched jointly
ReceiverSet = Sequence[Receiver]


def path_patch(
    model: HookedMLLM,
    clean: Any,
    corrupted: Any,
    senders: Any,
    receivers: Iterable[str] | str,
    metric: Any = None,
    *,
    freeze_mlps: bool = False,
    direction: Direction = "noising",
    per: Sequence[str] | str | None = (),
    positions: Any = None,
    receiver_positions: Where | None = None,
    hooks: Sequence[Hook] = (),
    batch_tokens: int | None = None,
    progress: bool = False,
    out: str | Path | None = None,
    batch_size: int = 8,
) -> PatchResult:
    """Patch the direct paths from senders to receivers, and measure what they carry.

    Args:
        model: a HookedMLLM.
        clean, corrupted: inputs (or samples) of the same token grid, one or as many of both.
        senders: heads, hook names or "visual", see `path_hooks`; they act jointly unless "sender"
            is among `per`.
        receivers: hook names: "blocks.5.attn.head.2.hook_q" (or _k, _v: for that query head alone,
            whatever shares its KV head), "blocks.5.attn.kv_head.1.hook_k", "blocks.5.hook_mlp_in"
            (the MLP's input), "blocks.5.hook_resid_pre", "hook_logits" … Several are patched
            jointly unless "receiver" is among `per`. Each is then set to its value of the path run,
            so a later receiver does not respond to an earlier one.
        metric: `cl.logit_diff("7", "3")` or any function of logits [batch, pos, d_vocab] that
            returns [batch].
        freeze_mlps: MLPs are frozen too, instead of recomputed.
        direction: "noising" (the clean run is the base, senders have corrupted values) or
            "denoising".
        per: axes of the result: "sender" (each alone), "receiver" (each alone), and one of
            "position", "role", "region" (the positions at which senders carry the change).
        positions: senders carry the change only there; with "role" among `per`, a list of names.
        receiver_positions: receivers are patched only there.
        hooks: to run under, in all runs.
        batch_tokens: how many rows × senders share a forward at most; see `activation_patch`.
        progress: show a progress bar.
        out: a run folder, for lists of samples: the pairs go in batches of `batch_size`, what is
            finished is kept, and the processes of `accelerate launch` or `torchrun` share them.
        batch_size: pairs a batch, with `out`.

    What cannot be reached (a receiver earlier in the order of computation, or at positions where no
    sender carries a change) has effect 0, and a warning says so.
    """
    check_folder(out)
    if out is not None:
        options: dict[str, Any] = {
            "senders": senders, "receivers": receivers, "metric": metric,
            "freeze_mlps": freeze_mlps, "direction": direction, "per": per, "positions": positions,
            "receiver_positions": receiver_positions, "batch_tokens": batch_tokens,
        }  # fmt: skip
        patching = partial(path_patch, model, hooks=hooks, **options)
        return patched_in(
            out, model, clean, corrupted, patching, batch_size, hooks, options, progress
        )
    runs = prepare_runs(
        model,
        clean,
        corrupted,
        metric,
        direction,
        hooks,
        method="path patching",
        freeze_mlps=freeze_mlps,
    )
    n_layers = model.cfg.n_layers
    per = _checked_axes(per)
    all_senders = parse_senders(senders, n_layers, model.cfg.n_heads, model.hook_names())
    all_receivers = parse_receivers(receivers, model)
    runs.meta["receivers"] = [receiver.name for receiver in all_receivers]
    masks, mask_labels = position_masks(runs.base, per, positions)
    receiver_table = None if receiver_positions is None else table(receiver_positions, runs.base)
    labels = {
        "sender": [sender.label for sender in all_senders],
        "receiver": [receiver.name for receiver in all_receivers],
    }
    axes = {name: labels.get(name, mask_labels) for name in per}
    joint_senders = [[sender] for sender in all_senders] if "sender" in per else [all_senders]
    groups: list[Group] = list(product(joint_senders, masks))
    targets = [[receiver] for receiver in all_receivers] if "receiver" in per else [all_receivers]
    _warn_hidden(targets)

    sender_points = list(dict.fromkeys(name for sender in all_senders for name in sender.names))
    frozen = [name for layer in range(n_layers) for name in mixer_points(layer, model.hook_dict)]
    if freeze_mlps:
        frozen += [f"blocks.{layer}.hook_mlp_out" for layer in range(n_layers)]
    replay = Replay(
        model, runs.base, runs.hooks, names=[*sender_points, *frozen], keep=runs.metric.keep
    )
    base_metric = runs.metric(replay.logits)
    source, other_metric = runs.other_values(sender_points, replay)

    # Every effect starts as 0. A group is run only if it changes a value and reaches a receiver.
    values = [[base_metric] * len(targets) for _ in groups]
    reached: list[list[bool]] = []
    for group in groups:
        reached.append([_reached(group, target, receiver_table, n_layers) for target in targets])
    _warn_unreachable(groups, targets, reached)
    first_rows = {
        number: row
        for number, group in enumerate(groups)
        if any(reached[number]) and (row := _first_row(group, replay.cache, source)) is not None
    }
    with torch.no_grad(), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("path patching", total=len(first_rows))
        for chunk, start in _batches(groups, first_rows, replay, batch_tokens):
            chunk_groups = [groups[number] for number in chunk]
            path_run = _PathRun(replay, chunk_groups, targets, source, freeze_mlps, start)
            for column, target in enumerate(targets):
                measured = path_run.metric_with(target, receiver_table, runs.metric)
                for run, number in enumerate(chunk):
                    if reached[number][column]:
                        values[number][column] = measured[run]
            bar.advance(task, len(chunk))
    return runs.result(
        _in_order(values, per, len(joint_senders), len(masks)), base_metric, other_metric, axes
    )


def _checked_axes(per: Sequence[str] | str | None) -> tuple[str, ...]:
    per = (per,) if isinstance(per, str) else tuple(per or ())
    unknown = set(per) - {"sender", "receiver", *POSITION_AXES}
    if unknown or len(set(per)) < len(per) or len(set(per) & set(POSITION_AXES)) > 1:
        raise CorelensError(
            f"per={per}",
            f"axes among sender, receiver, and one of {', '.join(POSITION_AXES)}",
            "leave out the rest",
        )
    return per


def _batches(
    groups: Sequence[Group],
    first_rows: Mapping[int, int],
    replay: Replay,
    batch_tokens: int | None,
) -> Iterator[tuple[list[int], Start]]:
    """Batches of path runs: the numbers of the groups in a batch, and where its runs begin.

    A batch begins at the first layer and row that any of its groups changes, and all that lies
    before is saved. So groups are sorted by these, and a batch holds groups of one layer.
    """
    layers: dict[int, int] = {}
    for number in first_rows:
        senders, _ = groups[number]
        layers[number] = min(layer_of(name) for sender in senders for name in sender.names)
    waiting = sorted(first_rows, key=lambda number: (layers[number], first_rows[number]))
    while waiting:
        layer = layers[waiting[0]]
        same_layer = [number for number in waiting if layers[number] == layer]
        start = replay.begin(layer, first_rows[same_layer[0]])
        chunk = same_layer[: runs_per_forward(replay, start.row, batch_tokens)]
        yield chunk, Start(start.layer, start.row, len(chunk))
        waiting = [number for number in waiting if number not in chunk]


class _PathRun:
    """The path run of some groups in one batch, and the last runs that follow from it.

    Args:
        replay: of the base run.
        groups: one a run of the batch.
        targets: all receivers, so that one path run serves them all.
        source: what the senders write.
        freeze_mlps: whether MLPs are frozen too.
        start: where the runs begin, and how many they are.
    """

    def __init__(
        self,
        replay: Replay,
        groups: Sequence[Group],
        targets: Sequence[ReceiverSet],
        source: Mapping[str, Tensor],
        freeze_mlps: bool,
        start: Start,
    ):
        self.replay, self.start = replay, start
        tables = [where for _, where in groups]
        hooks = group_hooks(
            [senders for senders, _ in groups],
            lambda inputs, step_positions, batch: tables,
            replay.cache,
            source,
            freeze_mlps,
            replay.model.cfg.n_layers,
        )
        self.read: dict[str, Tensor] = {}
        points = {receiver.reads for target in targets for receiver in target}
        self.logits = replay.run(
            start,
            hooks,
            {name: self._record(name) for name in points - {"hook_logits"}},
            logits="hook_logits" in points,
        )

    def _record(self, name: str) -> Callable[..., None]:
        def record(x: Tensor, hook: Any) -> None:
            self.read[name] = x.clone()

        return record

    def metric_with(
        self, target: ReceiverSet, where: Tensor | None, metric: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """The metric [sample] of the last run, for each run of the batch.

        Args:
            target: the receivers. They are set to what they read in the path run, and everything
                past them is recomputed.
            where: [sample, pos], True where they are set; None: everywhere.
            metric: the metric.
        """
        runs = self.start.runs
        at_logits = any(receiver.reads == "hook_logits" for receiver in target)
        # A point before the start was not run in the path run, because no sender reaches it.
        inner = [receiver for receiver in target if receiver.reads in self.read]
        if at_logits and where is None:
            logits = self.logits  # the logits are set last, so no other receiver matters
        elif inner:
            first = min(layer_of(receiver.reads) for receiver in inner)
            begin = self.replay.begin(first, self.start.row, runs)
            hooks = [receiver.write(self.read[receiver.reads], where) for receiver in inner]
            logits = self.replay.run(Start(begin.layer, self.start.row, runs), hooks)
        else:
            logits = self.replay.logits.repeat_interleave(runs, dim=0)
        assert logits is not None
        if at_logits and where is not None:
            assert self.logits is not None
            logits = _mixed(where, self.logits, logits, runs)
        # The metric expects one batch of samples, so it is called once a run.
        return [metric(logits[run::runs]) for run in range(runs)]


def _mixed(where: Tensor, new: Tensor, old: Tensor, runs: int) -> Tensor:
    """The new logits at the positions `where`, the old ones elsewhere."""
    rows = where[:, where.shape[1] - new.shape[1] :].repeat_interleave(runs, dim=0).to(new.device)
    return torch.where(rows[..., None], new, old)


def _in_order(
    values: list[list[Tensor]], per: Sequence[str], n_senders: int, n_masks: int
) -> list[Tensor]:
    """One value for each combination of senders, mask and receivers, in the order of `per`.

    Args:
        values: [senders · masks][receivers], each [sample].
        per: the axes of the result.
        n_senders, n_masks: how many sets of senders and masks of positions there are.
    """
    grid = torch.stack([torch.stack(by_receiver) for by_receiver in values])
    grid = grid.unflatten(0, (n_senders, n_masks))  # [sender, mask, receiver, sample]
    position_axis = next((name for name in per if name in POSITION_AXES), "mask")
    order = ["sender", position_axis, "receiver"]
    # Axes that were not asked for have size 1 and go behind the others.
    names = [*per, *(name for name in order if name not in per)]
    grid = grid.permute(*(order.index(name) for name in names), 3)
    return list(grid.flatten(0, 2))


# --- what can be reached


def _reached(
    group: Group, target: ReceiverSet, receiver_table: Tensor | None, n_layers: int
) -> bool:
    """Whether a direct path leads from one of these senders to one of these receivers."""
    senders, where = group
    if where is not None and receiver_table is not None and not (where & receiver_table).any():
        # In the path run other heads are frozen, so a change stays at its own position. Only scores
        # and pattern combine positions (a row's query with another position's key).
        target = [
            receiver
            for receiver in target
            if receiver.reads.endswith(("hook_attn_scores", "hook_pattern"))
        ]
    return any(reaches(sender, receiver, n_layers) for sender in senders for receiver in target)


def _first_row(
    group: Group, base: Mapping[str, Tensor], source: Mapping[str, Tensor]
) -> int | None:
    """The first row at which the senders' values differ between the runs."""
    senders, where = group
    rows = []
    for sender in senders:
        for name in sender.names:
            part = (slice(None), slice(None), sender.head) if sender.head is not None else ()
            differs = (base[name][part] != source[name][part]).flatten(2).any(-1)
            if where is not None:
                differs = differs & where.to(differs.device)
            rows += differs.any(0).nonzero()[:1, 0].tolist()
    return min(rows, default=None)


def _warn_unreachable(
    groups: Sequence[Group], targets: Sequence[ReceiverSet], reached: list[list[bool]]
) -> None:
    """Warn of receivers that some groups of senders cannot reach: an effect of 0 there is no
    finding."""
    for column, target in enumerate(targets):
        lost = [group for group, row in zip(groups, reached, strict=True) if not row[column]]
        if lost:
            labels = dict.fromkeys(s.label for senders, _ in lost[:6] for s in senders[:6])
            examples, names = ", ".join(labels), ", ".join(receiver.name for receiver in target)
            warnings.warn(
                f"{len(lost)} of {len(groups)} sets of senders ({examples} …) cannot reach "
                f"{names}: it comes earlier in the order of computation, or no sender carries a "
                "change at its positions. Effect 0.",
                stacklevel=3,
            )


def _warn_hidden(targets: Sequence[ReceiverSet]) -> None:
    """Warn where receivers that are patched jointly cannot be seen behind the logits."""
    for target in targets:
        if len(target) > 1 and any(receiver.reads == "hook_logits" for receiver in target):
            warnings.warn(
                "hook_logits among several receivers: the logits are set to their values of the "
                "path run, so the other receivers have no effect. per='receiver' patches each "
                "alone.",
                stacklevel=3,
            )
