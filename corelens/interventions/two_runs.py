"""The two runs that a patching experiment compares, prepared alike for every runner."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import TOWERS, Hook
from corelens.inputs.prepare import Inputs
from corelens.interventions.branch import branch
from corelens.interventions.metrics import Bound, bound
from corelens.interventions.pairs import as_inputs, check_pair
from corelens.interventions.replay import Replay
from corelens.interventions.result import PatchResult
from corelens.model.hooked import HookedMLLM

Direction = str  # "denoising" or "noising"


@dataclass(frozen=True)
class Runs:
    """The base run, which is patched, and the other run, whose values are put into it.

    Args:
        model: a HookedMLLM.
        base, other: their batches, whose pictures are encoded already.
        metric: the metric, bound to these batches.
        hooks: to run under, in all runs.
        meta: for the result: direction, metric, model family and what the runner adds.
    """

    model: HookedMLLM
    base: Inputs
    other: Inputs
    metric: Bound
    hooks: list[Hook]
    meta: dict[str, Any]

    def other_values(
        self, names: Sequence[str], replay: Replay | None = None
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The other run's activations at these hook points, and its metric [sample].

        With the base run as a Replay that stored these points, the first tokens that both runs have
        in common are not computed again.
        """
        branched = None if replay is None else branch(replay, self.other, names)
        if branched is not None:
            return branched[0], self.metric(branched[1])
        with torch.no_grad(), self.model.hooks(fwd_hooks=self.hooks):
            values: Any
            logits, values = self.model.run_with_cache(
                self.other, names_filter=list(names), logits_to_keep=self.metric.keep,
                return_cache_object=False,
            )  # fmt: skip
        return values, self.metric(logits)

    def result(
        self,
        values: Sequence[Tensor],
        base_metric: Tensor,
        other_metric: Tensor,
        axes: dict[str, list[str]],
    ) -> PatchResult:
        """The measured values as a PatchResult.

        Args:
            values: the metric [sample] under each patch, in the order of the axes' product.
            base_metric, other_metric: the metric of the base run and of the other run.
            axes: {name: labels}.
        """
        shape = (len(base_metric), *(len(labels) for labels in axes.values()))
        stacked = np.stack([_array(value) for value in values], axis=1) if values else np.zeros(0)
        samples = [token_map.id for token_map in self.base.token_maps]
        return PatchResult(
            stacked.reshape(shape).astype(np.float32),
            _array(base_metric),
            _array(other_metric),
            axes,
            samples,
            self.meta,
        )


def prepare_runs(
    model: HookedMLLM,
    clean: Any,
    corrupted: Any,
    metric: Any,
    direction: Direction,
    hooks: Sequence[Hook],
    **meta: Any,
) -> Runs:
    """The runs of an experiment, after a check that their tokens stand at the same positions.

    Args:
        clean, corrupted: inputs, a sample or samples.
        metric: a metric of `corelens.interventions.metrics`, or a function of logits.
        direction: "denoising" patches the corrupted run, "noising" the clean one.
        hooks: to run under.
        meta: more entries for the result's `meta`.
    """
    if direction not in ("denoising", "noising"):
        raise CorelensError(f"direction={direction!r}", "'denoising' or 'noising'", "choose one")
    if metric is None:
        raise CorelensError(
            "no metric", "what to measure", "for instance metric=cl.logit_diff('7', '3')"
        )
    clean, corrupted = as_inputs(model, clean), as_inputs(model, corrupted)
    check_pair(clean, corrupted)
    # Hooks on the vision tower have to see it run; without them its output is computed once.
    if not any(_hooks_the_tower(name, model) for name, _ in hooks):
        clean, corrupted = model.encode(clean), model.encode(corrupted)
    with model.hooks(fwd_hooks=list(hooks)):
        bound_metric = bound(metric, model, clean, corrupted)
    base, other = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    meta |= {"direction": direction, "metric": bound_metric.label, "family": model.cfg.family}
    return Runs(model, base, other, bound_metric, list(hooks), meta)


def _hooks_the_tower(name: Any, model: HookedMLLM) -> bool:
    if callable(name):
        return any(name(point) for point in model.hook_names() if point.startswith(TOWERS))
    return name.startswith(TOWERS)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
