"""Activation patching: values of another run put into this one.

`patch` makes the hooks. `activation_patch` is a loop over them: one patch after the other, each
measured; several patches share a batch, and a run begins at the patched layer and row (see
replay.py), where the result is the same.

Source: Meng et al. 2022, arXiv 2202.05262 (causal tracing); the words denoising and noising as in
Heimersheim and Nanda 2024, arXiv 2404.15255.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import TOWERS, Hook
from corelens.interventions.replay import Replay, Start, layer_of
from corelens.interventions.result import PatchResult
from corelens.interventions.resume import patched_in
from corelens.interventions.sites import Patch, axis_of, patches
from corelens.interventions.two_runs import Direction, Runs, prepare_runs
from corelens.model.hooked import HookedMLLM
from corelens.runs.processes import check_folder
from corelens.tokens.positions import Where, check_where, member, resolve

# rows × patches in one forward, at most: more of them only fill a processor's caches
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 16_384


# --- the factory


def patch(names: str | Iterable[str], source: Any, positions: Where | None = None) -> list[Hook]:
    """Hooks that replace activations by those of another run.

    Args:
        names: hook names, per-head names too.
        source: the other run's cache (or a dict {name: tensor}), over the same positions, of one
            sample or of as many as run; for a per-head name it holds that name or the point's own.
            Tokens generated later are left alone.
        positions: only there ("region", "last", [3, 4] …; for pattern and scores: query rows);
            everywhere by default.
    """
    if positions is not None:
        check_where(positions)
    hook_names = [names] if isinstance(names, str) else list(names)
    return [(name, _put(name, _value(source, name), positions)) for name in hook_names]


def _value(source: Any, name: str) -> Tensor:
    """A point's tensor in a cache; of a per-head name also from the tensor of all heads."""
    values = getattr(source, "cache_dict", source)
    if name in values:
        return values[name]
    per_head = re.fullmatch(r"(.+\.attn)\.(head|kv_head)\.(\d+)\.(hook_\w+)", name)
    if per_head and f"{per_head[1]}.{per_head[4]}" in values:
        whole, number = values[f"{per_head[1]}.{per_head[4]}"], int(per_head[3])
        axis = 1 if per_head[4] in ("hook_pattern", "hook_pattern_rows", "hook_attn_scores") else 2
        # (writing through head.{h}.hook_k is refused where heads share it)
        if number < whole.shape[axis]:
            return whole.select(axis, number)
    raise CorelensError(
        f"a source without {name!r}; it has {', '.join(list(values)[:4])} …",
        "a cache that holds the points to patch",
        f"model.run_with_cache(inputs, names_filter={[name]!r})",
    )


def _put(name: str, source_value: Tensor, positions: Where | None) -> Callable[..., Any]:
    """A hook function that writes another run's activation, at these positions."""
    query_axis = 2 if axis_of(name)[0] == 2 and ".head." not in name else 1

    def patch(x: Tensor, hook: Any) -> Tensor:
        step_positions = hook.ctx.get("positions")
        if step_positions is None or name.startswith(TOWERS) or name.endswith("hook_pattern_rows"):
            # what has no positions of the decoder is replaced as a whole
            return _same_shape(source_value, x, name).to(x)
        length, last = source_value.shape[query_axis], int(step_positions[-1]) + 1
        if int(step_positions[0]) >= length:  # generated tokens
            return x
        if last != length or x.shape[0] % source_value.shape[0]:
            raise CorelensError(
                f"a source of {list(source_value.shape[:1])} samples × {length} positions for "
                f"{name!r} in a run of "
                f"{x.shape[0]} × {last}",
                "a source over the same positions, of one sample or of as many as run",
                "pair inputs of the same token grid (cl.counterfactual, "
                "cl.interventions.counterfactual_pairs)",
            )
        new = source_value.to(x).index_select(query_axis, step_positions.to(source_value.device))
        new = _same_shape(
            new.repeat_interleave(x.shape[0] // source_value.shape[0], dim=0), x, name
        )
        if positions is None:
            return new.clone()
        where = member(
            resolve(positions, hook.ctx.get("inputs"), step_positions, x.shape[0], rows=True), last
        )[:, step_positions]
        return torch.where(_along(where, x, query_axis), new, x)

    return patch


def _same_shape(source_value: Tensor, x: Tensor, name: str) -> Tensor:
    if source_value.shape == x.shape:
        return source_value
    raise CorelensError(
        f"a source {list(source_value.shape)} for {name!r}, which is {list(x.shape)}",
        "the same shape",
        "run both on inputs alike",
    )


def _along(where: Tensor, x: Tensor, axis: int) -> Tensor:
    """A mask [batch, pos], reshaped so that it broadcasts over x, whose positions are on
    `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = where.shape
    return where.to(x.device).reshape(shape)


# --- the runner


def activation_patch(
    model: HookedMLLM,
    clean: Any,
    corrupted: Any,
    site: str = "z",
    metric: Any = None,
    per: Sequence[str] | str | None = ("layer", "head"),
    *,
    direction: Direction = "denoising",
    positions: Any = None,
    hooks: Sequence[Hook] = (),
    block: int = 64,
    batch_tokens: int | None = None,
    fast: bool = True,
    progress: bool = False,
    out: str | Path | None = None,
    batch_size: int = 8,
) -> PatchResult:
    """Patch one activation after the other, and measure what each does to the metric.

    Args:
        model: a HookedMLLM.
        clean, corrupted: inputs (or samples) of the same token grid, one or as many of both.
        site: resid_pre, resid_mid, resid_post, attn_out, mlp_out, mlp_pre, mlp_post, z, result, q,
            rot_q, k, rot_k, v, pattern, attn_scores, embed, or visual (the visual features,
            DeepStack's included).
        metric: `cl.logit_diff("7", "3")` or any function of logits [batch, pos, d_vocab] that
            returns [batch].
        per: the axes: "layer", "head" (or "kv_head", "neuron"), "position" or "role" or "region";
            (): all at once.
        direction: "denoising" (the corrupted run with clean values) or "noising" (the clean run
            with corrupted values).
        positions: only there; with "role" among `per`, a list of names to sweep ("region",
            "question", "last" …).
        hooks: to run under, in all runs.
        block: how many neurons are one block.
        batch_tokens: how many rows × patches share a forward at most: memory grows with it. By
            default 1,024 on a CPU, 16,384 elsewhere; one patch is always run whole.
        fast: False: one whole forward a patch, as you would write it yourself; slower, the same
            numbers.
        progress: show a progress bar.
        out: a run folder, for lists of samples: the pairs go in batches of `batch_size`, what is
            finished is kept, and the processes of `accelerate launch` or `torchrun` share them.
        batch_size: pairs a batch, with `out`.

    What the model does not have (a head of a layer without attention) has the value NaN.

    Errors: grids that differ; a metric of the wrong shape; a site without such an axis.
    """
    check_folder(out)
    if out is not None:
        options: dict[str, Any] = {
            "site": site, "metric": metric, "per": per, "direction": direction,
            "positions": positions, "block": block, "batch_tokens": batch_tokens, "fast": fast,
        }  # fmt: skip
        patching = partial(activation_patch, model, hooks=hooks, **options)
        return patched_in(
            out, model, clean, corrupted, patching, batch_size, hooks, options, progress
        )
    runs = prepare_runs(
        model, clean, corrupted, metric, direction, hooks, site=site, method="activation patching"
    )
    axes, jobs = patches(model, runs.base, site, per, positions, block)
    names = list(dict.fromkeys(name for job in jobs for name in job.names))  # each once, in order
    if fast:
        replay = Replay(model, runs.base, runs.hooks, names=names, keep=runs.metric.keep)
        base_metric = runs.metric(replay.logits)
        source, other_metric = runs.other_values(names, replay)
        values = _together(runs, replay, base_metric, jobs, source, batch_tokens, progress)
    else:
        source, other_metric = runs.other_values(names)
        base_metric, values = _one_by_one(runs, jobs, source, progress)
    return runs.result(values, base_metric, other_metric, axes)


def _one_by_one(
    runs: Runs, jobs: Sequence[Patch], source: Mapping[str, Tensor], progress: bool
) -> tuple[Tensor, list[Tensor]]:
    """The metric of the base run, and under each patch: one whole forward a patch."""
    keep = runs.metric.keep

    def measured(hooks: Sequence[Hook]) -> Tensor:
        logits = runs.model.run_with_hooks(runs.base, fwd_hooks=list(hooks), logits_to_keep=keep)
        return runs.metric(logits)

    with torch.no_grad(), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("patching", total=len(jobs))
        base_metric = measured(runs.hooks)
        values = []
        for job in jobs:
            hooks = [(name, write([job], name, source[name])) for name in job.names]
            missing = torch.full_like(base_metric, torch.nan)
            values.append(measured([*runs.hooks, *hooks]) if hooks else missing)
            bar.advance(task)
    return base_metric, values


def _together(
    runs: Runs,
    replay: Replay,
    base_metric: Tensor,
    jobs: Sequence[Patch],
    source: Mapping[str, Tensor],
    batch_tokens: int | None,
    progress: bool,
) -> list[Tensor]:
    """The metric under each patch, faster than `_one_by_one`: patches of one layer share batches,
    and a run begins at the first layer and row that a patch changes."""
    values: list[Tensor] = [torch.full_like(base_metric, torch.nan)] * len(jobs)
    by_points: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # (first row, number of the job)
    for number, job in enumerate(jobs):
        row = first_row(job, replay.cache, source)
        if row is not None:
            by_points.setdefault(job.names, []).append((row, number))
        elif job.names:  # the two runs agree wherever this patch writes: nothing to run
            values[number] = base_metric
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("patching", total=sum(map(len, by_points.values())))
        for names, members in by_points.items():
            # Sorted by row, patches that begin late share a batch that begins late.
            members.sort()
            while members:
                start = replay.begin(min(map(layer_of, names)), members[0][0])
                size = runs_per_forward(replay, start.row, batch_tokens)
                chunk, members = [number for _, number in members[:size]], members[size:]
                chunk_jobs = [jobs[number] for number in chunk]
                logits = replay.run(
                    Start(start.layer, start.row, len(chunk)),
                    [(name, write(chunk_jobs, name, source[name])) for name in names],
                )
                for run, number in enumerate(chunk):
                    values[number] = runs.metric(logits[run :: len(chunk)])  # type: ignore[index]
                bar.advance(task, len(chunk))
    return values


def runs_per_forward(replay: Replay, row: int, batch_tokens: int | None) -> int:
    """How many runs that begin at `row` share one forward.

    A row before it costs only its keys and values, which the runs share, or which are repeated for
    one layer at a time (see hooks/prefix.py): it counts as a 32nd of a row.
    """
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(replay.model.device.type, BATCH_TOKENS_ELSEWHERE)
    return max(1, batch_tokens // (len(replay.inputs) * (replay.length - row + row // 32)))


def write(jobs: Sequence[Patch], name: str, source: Tensor) -> Callable[..., Tensor]:
    """A hook for a batch in which row i·runs + j is sample i under patch j: each run gets its own
    patch."""
    rows_axis, part_axis = axis_of(name)

    def patch(x: Tensor, hook: Any) -> Tensor:
        step_positions = hook.ctx["positions"]
        new = source.to(x).index_select(rows_axis, step_positions.to(source.device))
        x = x.clone()
        for run, job in enumerate(jobs):
            part = (slice(None),) * part_axis + (job.part,) if job.part is not None else ()
            run_part, new_part = x[run :: len(jobs)][part], new[part]
            if job.where is not None:
                where = job.where[:, step_positions.to(job.where.device)]
                where = _along(where, run_part, rows_axis)
                new_part = torch.where(where, new_part, run_part)
            run_part.copy_(new_part)  # a view: this writes into x
        return x

    return patch


def first_row(job: Patch, base: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> int | None:
    """The first row at which a patch changes anything, over its points and samples; None if it
    changes nothing."""
    first = None
    for name in job.names:
        rows_axis, part_axis = axis_of(name)
        part = (slice(None),) * part_axis + (job.part,) if job.part is not None else ()
        unequal = base[name][part] != source[name][part]
        differs = unequal.transpose(1, rows_axis).flatten(2).any(-1)  # [sample, pos]
        if job.where is not None:
            differs = differs & job.where.to(differs.device)
        rows = differs.any(0).nonzero()[:, 0]
        if len(rows):
            first = int(rows[0]) if first is None else min(first, int(rows[0]))
    return first
