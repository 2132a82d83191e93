"""Activation patching: values of another run put into this one.

`patch` makes the hooks. `activation_patch` is a loop over them: one patch after the other, each
measured; several patches share a batch, and a run begins at the patched layer and row (see
replay.py), where the result is the same.

Source: Meng et al. 2022, arXiv 2202.05262 (causal tracing); the words denoising and noising as in
Heimersheim and Nanda 2024, arXiv 2404.15255.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import TOWERS, Hook
from corelens.inputs.prepare import Inputs
from corelens.interventions.metrics import Bound, bound
from corelens.interventions.pairs import as_inputs, check_pair
from corelens.interventions.replay import Replay, Start, layer_of
from corelens.interventions.result import PatchResult
from corelens.interventions.sites import Patch, axis_of, patches
from corelens.tokens.positions import Where, check_where, member, resolve

Direction = str  # "denoising" or "noising"
# rows × patches in one forward, at most: more of them only fill a processor's caches
BATCH_TOKENS = {"cpu": 1024}
BATCH_TOKENS_ELSEWHERE = 16_384


# --- the factory


def patch(names: str | Iterable[str], source: Any, positions: Where | None = None) -> list[Hook]:
    """Hooks that put the values of another run into these points.

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
    chosen = [names] if isinstance(names, str) else list(names)
    return [(name, _put(name, _value(source, name), positions)) for name in chosen]


def _value(source: Any, name: str) -> Tensor:
    """A point's tensor in a cache; of a per-head name also from the tensor of all heads."""
    held = getattr(source, "cache_dict", source)
    if name in held:
        return held[name]
    per_head = re.fullmatch(r"(.+\.attn)\.(head|kv_head)\.(\d+)\.(hook_\w+)", name)
    if per_head and f"{per_head[1]}.{per_head[4]}" in held:
        whole, number = held[f"{per_head[1]}.{per_head[4]}"], int(per_head[3])
        axis = 1 if per_head[4] in ("hook_pattern", "hook_pattern_rows", "hook_attn_scores") else 2
        # (writing through head.{h}.hook_k is refused where heads share it)
        if number < whole.shape[axis]:
            return whole.select(axis, number)
    raise CorelensError(
        f"a source without {name!r}; it has {', '.join(list(held)[:4])} …",
        "a cache that holds the points to patch",
        f"model.run_with_cache(inputs, names_filter={[name]!r})",
    )


def _put(name: str, there: Tensor, positions: Where | None) -> Callable[..., Any]:
    query_axis = 2 if axis_of(name)[0] == 2 and ".head." not in name else 1

    def patch(x: Tensor, hook: Any) -> Tensor:
        here = hook.ctx.get("positions")
        if here is None or name.startswith(TOWERS) or name.endswith("hook_pattern_rows"):
            # what has no positions of the decoder is replaced as a whole
            return _same_shape(there, x, name).to(x)
        length, last = there.shape[query_axis], int(here[-1]) + 1
        if int(here[0]) >= length:  # generated tokens
            return x
        if last != length or x.shape[0] % there.shape[0]:
            raise CorelensError(
                f"a source of {list(there.shape[:1])} samples × {length} positions for {name!r} in a run of "
                f"{x.shape[0]} × {last}",
                "a source over the same positions, of one sample or of as many as run",
                "pair inputs of the same token grid (cl.counterfactual, cl.interventions.counterfactual_pairs)",
            )
        new = there.to(x).index_select(query_axis, here.to(there.device))
        new = _same_shape(new.repeat_interleave(x.shape[0] // there.shape[0], dim=0), x, name)
        if positions is None:
            return new.clone()
        where = member(
            resolve(positions, hook.ctx.get("inputs"), here, x.shape[0], rows=True), last
        )[:, here]
        return torch.where(_along(where, x, query_axis), new, x)

    return patch


def _same_shape(there: Tensor, x: Tensor, name: str) -> Tensor:
    if there.shape == x.shape:
        return there
    raise CorelensError(
        f"a source {list(there.shape)} for {name!r}, which is {list(x.shape)}",
        "the same shape",
        "run both on inputs alike",
    )


def _along(where: Tensor, x: Tensor, axis: int) -> Tensor:
    """[batch, pos] as a mask that broadcasts over x, whose positions are on `axis`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = where.shape
    return where.to(x.device).reshape(shape)


# --- the runner


def activation_patch(
    model: Any,
    clean: Any,
    corrupted: Any,
    site: str = "z",
    metric: Any = None,
    per: Sequence[str] | str | None = ("layer", "head"),
    direction: Direction = "denoising",
    positions: Any = None,
    hooks: Sequence[Hook] = (),
    block: int = 64,
    batch_tokens: int | None = None,
    fast: bool = True,
    progress: bool = False,
) -> PatchResult:
    """Patch one place after the other and measure what it does.

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

    A place that the model does not have (a head of a layer without attention) has the value NaN.

    Errors: grids that differ; a metric of the wrong shape; a site without such an axis.
    """
    clean, corrupted, measure, base, other, site_meta = prepare_runs(
        model,
        clean,
        corrupted,
        metric,
        direction,
        hooks,
        {"site": site, "method": "activation patching"},
    )
    axes, jobs = patches(model, base, site, per, positions, block)
    names = list(dict.fromkeys(name for job in jobs for name in job.names))
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits, source = model.run_with_cache(
            other, names_filter=names, logits_to_keep=measure.keep, return_cache_object=False
        )
    far = measure(logits)
    if not fast:
        near, values = _one_by_one(model, base, jobs, source, measure, hooks, progress)
    else:
        near, values = _together(model, base, jobs, source, measure, hooks, batch_tokens, progress)
    return result_of(values, near, far, axes, base, site_meta)


def prepare_runs(
    model: Any,
    clean: Any,
    corrupted: Any,
    metric: Any,
    direction: str,
    hooks: Sequence[Hook],
    meta: dict[str, Any],
) -> tuple[Inputs, Inputs, Bound, Inputs, Inputs, dict[str, Any]]:
    """What every runner begins with: (clean, corrupted, metric, base run, other run, meta),
    pictures encoded once."""
    if direction not in ("denoising", "noising"):
        raise CorelensError(f"direction={direction!r}", "'denoising' or 'noising'", "choose one")
    if metric is None:
        raise CorelensError(
            "no metric", "what to measure", "for instance metric=cl.logit_diff('7', '3')"
        )
    clean, corrupted = as_inputs(model, clean), as_inputs(model, corrupted)
    check_pair(clean, corrupted)
    tower = [name for name in model.hook_names() if name.startswith(TOWERS)]
    if not any(
        any(map(name, tower)) if callable(name) else name.startswith(TOWERS) for name, _ in hooks
    ):
        clean, corrupted = model.encode(clean), model.encode(corrupted)
    with model.hooks(fwd_hooks=list(hooks)):
        measure = bound(metric, model, clean, corrupted)
    base, other = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    meta = meta | {"direction": direction, "metric": measure.label, "family": model.cfg.family}
    return clean, corrupted, measure, base, other, meta


def result_of(
    values: Sequence[Tensor],
    near: Tensor,
    far: Tensor,
    axes: dict[str, list[str]],
    base: Inputs,
    meta: dict[str, Any],
) -> PatchResult:
    """Values in the order of the axes' product, each [sample], as a PatchResult."""
    shape = [len(labels) for labels in axes.values()]
    stacked = (
        torch.stack([value.detach().float().cpu() for value in values], dim=1).numpy()
        if values
        else np.zeros((len(near), 0))
    )
    to_array = lambda x: x.detach().float().cpu().numpy()  # noqa: E731
    return PatchResult(
        stacked.reshape(len(near), *shape).astype(np.float32), to_array(near), to_array(far), axes,
        [token_map.id for token_map in base.token_maps], meta,
    )  # fmt: skip


def _one_by_one(
    model: Any, base: Inputs, jobs: Sequence[Patch], source: Mapping[str, Tensor], measure: Bound,
    hooks: Sequence[Hook], progress: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The plain loop: one whole forward a patch."""
    with torch.no_grad(), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("patching", total=len(jobs))
        near = measure(
            model.run_with_hooks(base, fwd_hooks=list(hooks), logits_to_keep=measure.keep)
        )
        values = []
        for job in jobs:
            if not job.names:
                values.append(torch.full_like(near, torch.nan))
                continue
            put = [(name, write([job], name, source[name])) for name in job.names]
            values.append(
                measure(
                    model.run_with_hooks(
                        base, fwd_hooks=[*hooks, *put], logits_to_keep=measure.keep
                    )
                )
            )
            bar.advance(task)
    return near, values


def _together(
    model: Any, base: Inputs, jobs: Sequence[Patch], source: Mapping[str, Tensor], measure: Bound,
    hooks: Sequence[Hook], batch_tokens: int | None, progress: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Patches of one layer share batches; a run begins at the first layer and row that a patch
    changes."""
    replay = Replay(model, base, hooks, names=list(source), keep=measure.keep)
    near = measure(replay.logits)
    values: list[Tensor | None] = [None] * len(jobs)
    groups: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for number, job in enumerate(jobs):
        if not job.names:
            values[number] = torch.full_like(near, torch.nan)
            continue
        row = first_row(job, replay.cache, source)
        if row is None:  # the two runs agree wherever this patch writes
            values[number] = near
        else:
            groups.setdefault(job.names, []).append((row, number))
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("patching", total=sum(map(len, groups.values())))
        for names, members in groups.items():
            members.sort()
            while members:
                start = replay.begin(min(map(layer_of, names)), members[0][0])
                runs = share(replay, start.row, batch_tokens)
                chunk, members = [number for _, number in members[:runs]], members[runs:]
                start = Start(start.layer, start.row, len(chunk))
                some = [jobs[number] for number in chunk]
                logits = replay.run(
                    start, [(name, write(some, name, source[name])) for name in names]
                )
                for run, number in enumerate(chunk):
                    values[number] = measure(logits[run :: start.runs])  # type: ignore[index]
                bar.advance(task, len(chunk))
    return near, values  # type: ignore[return-value]


def share(replay: Replay, row: int, batch_tokens: int | None) -> int:
    """How many runs from `row` on share a batch; the keys and values of a prefix row count as an
    eighth of a row."""
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(replay.model.device.type, BATCH_TOKENS_ELSEWHERE)
    return max(1, batch_tokens // (len(replay.inputs) * (replay.length - row + row // 8)))


def write(jobs: Sequence[Patch], name: str, source: Tensor) -> Callable[..., Tensor]:
    """A hook for a batch in which row i·runs + j is sample i under patch j: each run gets its own
    patch."""
    rows_axis, part_axis = axis_of(name)

    def patch(x: Tensor, hook: Any) -> Tensor:
        here = hook.ctx["positions"]
        new = source.to(x).index_select(rows_axis, here.to(source.device))
        x = x.clone()
        for run, job in enumerate(jobs):
            mine, theirs = x[run :: len(jobs)], new
            if job.part is not None:
                at = (slice(None),) * part_axis + (job.part,)
                mine, theirs = mine[at], theirs[at]
            if job.where is None:
                mine.copy_(theirs)
            else:
                mine.copy_(
                    torch.where(
                        _along(job.where[:, here.to(job.where.device)], mine, rows_axis),
                        theirs,
                        mine,
                    )
                )
        return x

    return patch


def first_row(job: Patch, base: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> int | None:
    """The first row at which a patch changes anything, over its points and samples; None if it
    changes nothing."""
    first = None
    for name in job.names:
        rows_axis, part_axis = axis_of(name)
        at = (slice(None),) * part_axis + (job.part,) if job.part is not None else ()
        # [sample, pos]
        differs = (base[name][at] != source[name][at]).transpose(1, rows_axis).flatten(2).any(-1)
        if job.where is not None:
            differs = differs & job.where.to(differs.device)
        found = differs.any(0).nonzero()[:, 0]
        if len(found):
            first = int(found[0]) if first is None else min(first, int(found[0]))
    return first
