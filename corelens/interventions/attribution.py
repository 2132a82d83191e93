"""Attribution patching: the effect of every patch at once, to first order. Two forwards and one
backward.

    effect of a patch ≈ Σ (source − base) · ∂ metric / ∂ activation, taken at the base run

Source: Nanda 2023, "Attribution patching" (neelnanda.io); Syed et al. 2023, arXiv 2310.10348. With
`steps` the gradient is the mean over runs whose embeddings go in equal steps from the base to the
source (EAP-IG: Hanna et al. 2024, arXiv 2403.17806), which repairs gradients that vanish at the
base, as behind a saturated softmax.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.interventions.result import PatchResult
from corelens.interventions.resume import patched_in
from corelens.interventions.sites import Patch, axis_of, patches
from corelens.interventions.two_runs import Direction, Runs, prepare_runs
from corelens.model.hooked import HookedMLLM
from corelens.runs.processes import check_folder


def attribution_patch(
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
    steps: int = 0,
    progress: bool = False,
    out: str | Path | None = None,
    batch_size: int = 8,
) -> PatchResult:
    """Estimate what `activation_patch` with the same arguments measures; `values` are base +
    estimated effect.

    Args:
        model, clean, corrupted, site, metric, per, direction, positions, hooks, block: as in
            `activation_patch`; the metric must be differentiable (accuracy is not: its gradient is
            0).
        steps: 0: the gradient at the base run; n: the mean gradient at n points from the base's
            embeddings (and what DeepStack adds) to the source's.
        out, batch_size: as in `activation_patch`: a run folder, for lists of samples.
        progress: with `out`, show a progress bar.

    `result.plot_against(exact)` shows how good the estimate is.
    """
    if steps < 0:
        raise CorelensError(
            f"steps={steps}", "0 (the gradient at the base run) or more", "5 to 10 are usual"
        )
    check_folder(out)
    if out is not None:
        options: dict[str, Any] = {
            "site": site, "metric": metric, "per": per, "direction": direction,
            "positions": positions, "block": block, "steps": steps,
        }  # fmt: skip
        patching = partial(attribution_patch, model, hooks=hooks, **options)
        return patched_in(
            out, model, clean, corrupted, patching, batch_size, hooks, options, progress
        )
    method = f"attribution patching ({steps} steps)" if steps else "attribution patching"
    runs = prepare_runs(model, clean, corrupted, metric, direction, hooks, site=site, method=method)
    bound_metric = runs.metric
    axes, jobs = patches(model, runs.base, site, per, positions, block)
    names = list(dict.fromkeys(name for job in jobs for name in job.names))
    inputs = ["hook_embed", *model.hook_names("hook_deepstack")]
    with torch.no_grad(), model.hooks(fwd_hooks=runs.hooks):
        base_logits, base_values = model.run_with_cache(
            runs.base, names_filter=[*names, *inputs], return_cache_object=False
        )
        other_logits, other_values = model.run_with_cache(
            runs.other, names_filter=[*names, *inputs], return_cache_object=False
        )
    # The metric reads the last `keep` rows of logits; 0 or None: all of them.
    last_rows = slice(-bound_metric.keep, None) if bound_metric.keep else slice(None)
    base_metric = bound_metric(base_logits[:, last_rows])
    other_metric = bound_metric(other_logits[:, last_rows])
    difference = {name: other_values[name] - base_values[name] for name in inputs}
    total: dict[str, Tensor] = {}
    fractions = [step / steps for step in range(steps)] if steps else [0.0]
    for fraction in fractions:
        # At fraction 0 the run is the base run itself: its own embeddings are not replaced.
        replaced = inputs if fraction else []
        mixed = {name: base_values[name] + fraction * difference[name] for name in replaced}
        for name, gradient in _gradients(runs, names, mixed).items():
            total[name] = total.get(name, 0) + gradient / len(fractions)
    scores = {
        name: (other_values[name].float() - base_values[name].float()) * total[name].float()
        for name in names
    }
    values = []
    for job in jobs:
        effect = sum(_part_of(job, name, scores[name]) for name in job.names)
        missing = torch.full_like(base_metric, torch.nan)  # a layer without attention
        values.append(base_metric + effect if job.names else missing)
    return runs.result(values, base_metric, other_metric, axes)


def _gradients(runs: Runs, names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """∂ Σ metric / ∂ activation at each of these points, in the base run with these embeddings."""
    model = runs.model
    activations: dict[str, Tensor] = {}

    def put(value: Tensor) -> Callable[..., Tensor]:
        def at_a_step(x: Tensor, hook: Any) -> Tensor:
            return value

        return at_a_step

    def begin(x: Tensor, hook: Any) -> Tensor:
        # the graph begins here: the vision tower is not part of it
        return x.detach().requires_grad_()

    def keeping(name: str) -> Callable[..., Tensor]:
        def keep(x: Tensor, hook: Any) -> Tensor:
            activations[name] = x.clone() if x.requires_grad else x.detach().requires_grad_()
            return activations[name]

        return keep

    all_hooks: list[Hook] = [
        *runs.hooks,
        *((name, put(value)) for name, value in inputs.items()),
        ("hook_embed", begin),
    ]
    all_hooks += [(name, keeping(name)) for name in names]
    with torch.enable_grad(), _frozen(model):
        logits = model.run_with_hooks(
            runs.base, fwd_hooks=all_hooks, logits_to_keep=runs.metric.keep
        )
        values = runs.metric(logits)
        if not values.requires_grad:  # a metric without a gradient, such as accuracy
            return {name: torch.zeros_like(x) for name, x in activations.items()}
        gradients = torch.autograd.grad(values.sum(), list(activations.values()), allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(activations.items(), gradients, strict=True)
    }


@contextmanager
def _frozen(model: HookedMLLM) -> Iterator[None]:
    """Within this context no parameter asks for a gradient."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()


def _part_of(job: Patch, name: str, score: Tensor) -> Tensor:
    """The part of a point's products that one patch covers, summed: [sample]."""
    rows_axis, part_axis = axis_of(name)
    if job.part is not None:
        score = score[(slice(None),) * part_axis + (job.part,)]
    score = score.transpose(1, rows_axis).flatten(2).sum(-1)  # [sample, pos]
    return (score if job.where is None else score * job.where.to(score.device)).sum(1)
