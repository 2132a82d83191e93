"""Path patching: only direct paths from senders to receivers carry the change.

Three runs. The other run gives the senders' values. In the path run of the base input the senders
have those values and every other head is frozen at its base value (MLPs are recomputed, or frozen
too): what a receiver reads there has come on direct paths. In the last run of the base input the
receivers have what they read there, and everything past them is recomputed.

Source: Wang et al. 2022, arXiv 2211.00593, appendix B; Goldowsky-Dill et al. 2023, arXiv
2304.05969.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.interventions.ends import (
    Receiver,
    Sender,
    mixing,
    parse_receivers,
    parse_senders,
    rank,
    reaches,
)
from corelens.interventions.patching import Direction, prepare_runs, result_of, share
from corelens.interventions.replay import Replay, Start, layer_of
from corelens.interventions.result import PatchResult
from corelens.interventions.sites import PLACES, places, table
from corelens.tokens.positions import Where, check_where, member, resolve

# senders that act jointly, and at which positions
Group = tuple[Sequence[Sender], Bool[Tensor, "sample pos"] | None]


# --- the factory


def path_hooks(
    senders: Any,
    *,
    base: Any,
    source: Any,
    freeze_mlps: bool = False,
    positions: Where | None = None,
) -> list[Hook]:
    """Hooks of the path run: senders have the values of another run, every other head that of the
    base run.

    Run the base inputs under them, read what receivers read (`model.run_with_cache`), and
    `cl.patch` it into a last run. The logits of the path run itself are those with `hook_logits` as
    the receiver.

    Args:
        senders: heads (a HeadSet, pairs, names "L3H5"), hook names ("blocks.3.hook_mlp_out",
            "hook_embed", "blocks.3.attn.hook_z" for all heads of a layer), or "visual".
        base: the base run's cache, with `hook_z` of all layers (and `hook_gate` where heads are
            gated; `hook_attn_out` of layers without attention, whose mixers are frozen as heads
            are; and `hook_mlp_out`, if MLPs are frozen).
        source: the other run's cache, with what the senders write.
        freeze_mlps: freeze MLPs that are no senders at their base value too.
        positions: senders carry the change only there; elsewhere they are frozen at the base value.
    """
    if positions is not None:
        check_where(positions)
    held, other = getattr(base, "cache_dict", base), getattr(source, "cache_dict", source)
    of_heads = [name for name in held if name.endswith("attn.hook_z")]
    layers = 1 + max(
        (layer_of(name) for name in held if name.endswith(("attn.hook_z", "hook_attn_out"))),
        default=-1,
    )
    parsed = parse_senders(
        senders, layers, max((held[name].shape[2] for name in of_heads), default=0), [*other]
    )

    def where(inputs: Any, here: Tensor, batch: int) -> list[Tensor | None]:
        if positions is None:
            return [None]
        return [member(resolve(positions, inputs, here, batch, rows=True), int(here[-1]) + 1)]

    return _path_hooks([parsed], where, held, other, freeze_mlps, layers)


def _path_hooks(
    groups: Sequence[Sequence[Sender]],
    where: Callable[[Any, Tensor, int], Sequence[Tensor | None]],
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    freeze_mlps: bool,
    n_layers: int,
) -> list[Hook]:
    """Hooks for a batch in which row i·runs + j is sample i of run j, and run j has the senders of
    group j."""
    written: dict[str, list[tuple[int, Sender]]] = {}
    for run, senders in enumerate(groups):
        for sender in senders:
            for name in sender.names:
                written.setdefault(name, []).append((run, sender))
    first = max(0, min((layer_of(name) for name in written), default=0))
    frozen = [name for layer in range(first, n_layers) for name in mixing(layer, base, written)]
    if freeze_mlps:
        frozen += [f"blocks.{layer}.hook_mlp_out" for layer in range(first, n_layers)]
    for name in {*frozen, *written}:
        held = [base] * (name in frozen) + [source] * (name in written)
        if any(name not in values for values in held):
            raise CorelensError(
                f"a {'base' if name in frozen and name not in base else 'source'} cache without "
                f"{name!r}",
                "base: hook_z of all layers, and hook_mlp_out with freeze_mlps=True; source: what "
                "the senders write",
                "run model.run_with_cache(inputs) without a names_filter, or name these points",
            )

    def make(name: str) -> Callable[..., Tensor]:
        def path(x: Tensor, hook: Any) -> Tensor:
            here, inputs = hook.ctx["positions"], hook.ctx["inputs"]
            n = len(base[name] if name in base else source[name])
            runs, copies = len(groups), x.shape[0] // n // len(groups)
            x = _rows(base[name], here, x, runs * copies) if name in frozen else x.clone()
            new = _rows(source[name], here, x, copies) if name in written else x
            tables = where(inputs, here, n * copies)
            for run, sender in written.get(name, []):
                part = (slice(None), slice(None), sender.head) if sender.head is not None else ()
                written_run, theirs, table = x[run::runs][part], new[part], tables[run]
                for limit in (table, sender.places(inputs, here, len(theirs))):
                    if limit is not None:
                        limit = limit[:, here.to(limit.device)].to(x.device)
                        theirs = torch.where(
                            limit.reshape(*limit.shape, *[1] * (written_run.ndim - 2)),
                            theirs,
                            written_run,
                        )
                written_run.copy_(theirs)
            return x

        return path

    # a sender frozen first and written then is one function; embeddings come first, as they run
    return [
        (name, make(name))
        for name in sorted({*frozen, *written}, key=lambda name: rank(name, n_layers))
    ]


def _rows(values: Tensor, here: Tensor, like: Tensor, copies: int) -> Tensor:
    return values.to(like).index_select(1, here.to(like.device)).repeat_interleave(copies, dim=0)


# --- the runner


def path_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    senders: Any,
    receivers: Iterable[str] | str,
    metric: Any = None,
    freeze_mlps: bool = False,
    direction: Direction = "noising",
    per: Sequence[str] | str | None = (),
    positions: Any = None,
    receiver_positions: Where | None = None,
    hooks: Sequence[Hook] = (),
    batch_tokens: int | None = None,
    progress: bool = False,
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
            jointly unless "receiver" is among `per`: each is fixed at what it read on direct paths,
            so one that lies behind another shows nothing of it.
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

    What cannot be reached (a receiver earlier in the order of computation, or at positions where no
    sender carries a change) has effect 0, and a warning says so.
    """
    clean, corrupted, measure, base, other, meta = prepare_runs(
        model,
        clean,
        corrupted,
        metric,
        direction,
        hooks,
        {"method": "path patching", "freeze_mlps": freeze_mlps},
    )
    cfg = model.cfg
    per = (per,) if isinstance(per, str) else tuple(per or ())
    if (
        set(per) - {"sender", "receiver", *PLACES}
        or len(set(per)) < len(per)
        or sum(name in PLACES for name in per) > 1
    ):
        raise CorelensError(
            f"per={per}",
            f"axes among sender, receiver, and one of {', '.join(PLACES)}",
            "leave out the rest",
        )
    all_senders = parse_senders(senders, cfg.n_layers, cfg.n_heads, model.hook_names())
    all_receivers = parse_receivers(receivers, model)
    meta["receivers"] = [receiver.name for receiver in all_receivers]
    tables, place_labels = places(base, per, positions)
    receiver_table = None if receiver_positions is None else table(receiver_positions, base)
    axes = {
        name: [s.label for s in all_senders]
        if name == "sender"
        else [r.name for r in all_receivers]
        if name == "receiver"
        else place_labels
        for name in per
    }
    alone = [[sender] for sender in all_senders] if "sender" in per else [list(all_senders)]
    groups: list[Group] = [(group_senders, where) for group_senders in alone for where in tables]
    targets = (
        [[receiver] for receiver in all_receivers] if "receiver" in per else [list(all_receivers)]
    )
    _warn_hidden(targets)

    names = list(dict.fromkeys(name for sender in all_senders for name in sender.names))
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits, source = model.run_with_cache(
            other, names_filter=names, logits_to_keep=measure.keep, return_cache_object=False
        )
    far = measure(logits)
    keep = names + [
        name for layer in range(cfg.n_layers) for name in mixing(layer, model.hook_dict)
    ]
    keep += [f"blocks.{layer}.hook_mlp_out" for layer in range(cfg.n_layers)] if freeze_mlps else []
    replay = Replay(model, base, hooks, names=keep, keep=measure.keep)
    near = measure(replay.logits)

    values = [[near] * len(targets) for _ in groups]
    reach = [
        [_reached(group, target, receiver_table, cfg.n_layers) for target in targets]
        for group in groups
    ]
    _warn_unreachable(groups, targets, reach)
    first = [_first_row(group, replay.cache, source) for group in groups]
    todo = [number for number, row in enumerate(first) if row is not None and any(reach[number])]
    todo.sort(
        key=lambda number: (
            min(layer_of(n) for s in groups[number][0] for n in s.names),
            first[number],
        )
    )
    with torch.no_grad(), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("path patching", total=len(todo))
        while todo:
            layer = min(layer_of(n) for s in groups[todo[0]][0] for n in s.names)
            same = [
                number
                for number in todo
                if min(layer_of(n) for s in groups[number][0] for n in s.names) == layer
            ]
            row = replay.begin(layer, min(first[number] or 0 for number in same)).row
            chunk = same[: share(replay, row, batch_tokens)]
            todo = [number for number in todo if number not in chunk]
            group_senders, start = (
                [groups[number] for number in chunk],
                Start(max(layer, 0), row, len(chunk)),
            )
            measured = _measure(
                replay, group_senders, targets, source, freeze_mlps, receiver_table, start, measure
            )
            for run, number in enumerate(chunk):
                for target_number, value in enumerate(measured):
                    if reach[number][target_number]:
                        values[number][target_number] = value[run :: len(chunk)]
            bar.advance(task, len(chunk))
    return result_of(_in_order(values, per, len(alone), len(tables)), near, far, axes, base, meta)


def _measure(
    replay: Replay,
    groups: Sequence[Group],
    targets: Sequence[Sequence[Receiver]],
    source: Mapping[str, Tensor],
    freeze_mlps: bool,
    receiver_table: Tensor | None,
    start: Start,
    measure: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """The path run of these groups in one batch, and a last run for each set of receivers: [sample
    · runs] each."""
    tables = [where for _, where in groups]
    hooks = _path_hooks(
        [senders for senders, _ in groups],
        lambda inputs, here, batch: tables,
        replay.cache,
        source,
        freeze_mlps,
        replay.model.cfg.n_layers,
    )
    read: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(x: Tensor, hook: Any) -> None:
            read[name] = x.clone()

        return record

    wanted = {
        receiver.reads
        for target in targets
        for receiver in target
        if receiver.reads != "hook_logits"
    }
    to_logits = any(receiver.reads == "hook_logits" for target in targets for receiver in target)
    logits = replay.run(start, hooks, {name: recorder(name) for name in wanted}, logits=to_logits)
    values = []
    for target in targets:
        # what comes before the start was not run: no sender reaches it
        inner = [receiver for receiver in target if receiver.reads in read]
        at_logits = any(receiver.reads == "hook_logits" for receiver in target)
        if inner and not (at_logits and receiver_table is None):
            first = min(layer_of(receiver.reads) for receiver in inner)
            begin = Start(replay.begin(first, start.row).layer, start.row, start.runs)
            last = replay.run(
                begin, [receiver.write(read[receiver.reads], receiver_table) for receiver in inner]
            )
        else:
            last = replay.logits.repeat_interleave(start.runs, dim=0)
        if at_logits:
            last = (
                logits
                if receiver_table is None
                else _mixed(receiver_table, logits, last, start.runs)  # type: ignore[arg-type]
            )
        values.append(_by_run(measure, last, start.runs))  # type: ignore[arg-type]
    return values


def _mixed(where: Tensor, new: Tensor, old: Tensor, runs: int) -> Tensor:
    rows = where[:, where.shape[1] - new.shape[1] :].repeat_interleave(runs, dim=0).to(new.device)
    return torch.where(rows[..., None], new, old)


def _by_run(measure: Callable[[Tensor], Tensor], logits: Tensor, runs: int) -> Tensor:
    """The metric run by run (it speaks of the samples in their order), back in the batch's
    order."""
    return torch.stack([measure(logits[run::runs]) for run in range(runs)], dim=1).flatten()


def _in_order(
    values: list[list[Tensor]], per: Sequence[str], n_senders: int, n_places: int
) -> list[Tensor]:
    """[sender · place][receiver] in the order of the axes."""
    n_receivers = len(values[0]) if values else 0
    grid = torch.stack([torch.stack(list(by_receiver)) for by_receiver in values]).reshape(
        n_senders, n_places, n_receivers, -1
    )
    order = ["sender", next((name for name in per if name in PLACES), "place"), "receiver"]
    grid = grid.permute(
        *(order.index(name) for name in [*per, *(name for name in order if name not in per)]), 3
    )
    return list(grid.flatten(0, 2))


# --- what can be reached


def _reached(
    group: Group, target: Sequence[Receiver], receiver_table: Tensor | None, n_layers: int
) -> bool:
    senders, where = group
    if where is not None and receiver_table is not None and not (where & receiver_table).any():
        # the path run moves nothing between positions; only scores and pattern look at others
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
    groups: Sequence[Group], targets: Sequence[Sequence[Receiver]], reach: list[list[bool]]
) -> None:
    for target_number, target in enumerate(targets):
        lost = [group for number, group in enumerate(groups) if not reach[number][target_number]]
        if lost:
            examples = ", ".join(
                dict.fromkeys(sender.label for senders, _ in lost[:6] for sender in senders[:6])
            )
            warnings.warn(
                f"{len(lost)} of {len(groups)} sets of senders ({examples} …) cannot reach "
                f"{', '.join(receiver.name for receiver in target)}: it comes earlier in the order "
                "of computation, or no sender "
                "carries a change at its positions. Effect 0.",
                stacklevel=3,
            )


def _warn_hidden(targets: Sequence[Sequence[Receiver]]) -> None:
    for target in targets:
        if len(target) > 1 and any(receiver.reads == "hook_logits" for receiver in target):
            warnings.warn(
                "hook_logits among several receivers fixes the logits at what comes there on "
                "direct paths: the other "
                "receivers cannot be seen. per='receiver' patches each alone.",
                stacklevel=3,
            )
