"""Ablation sweeps: accuracy as more and more heads are ablated, beside their controls."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from corelens.errors import CorelensError
from corelens.evaluation.answers import Evaluation
from corelens.evaluation.evaluate import batches, evaluate
from corelens.evaluation.lists import listed
from corelens.evaluation.resume import by_batch, samples_folder
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import Interval, accuracy_difference, accuracy_interval
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions.ablation import ablate, mean_z
from corelens.interventions.knockouts import knockout
from corelens.runs.digest import digest
from corelens.runs.processes import check_folder


@dataclass
class Point:
    """One condition of a sweep: k heads ablated, accuracy over samples (and over draws where the
    heads are drawn)."""

    fraction: float
    k: int
    accuracy: Interval
    drop: Interval  # clean accuracy minus this one, paired by sample
    draws: list[list[list[int]]] = field(repr=False, default_factory=list)


@dataclass
class Sweep:
    """Accuracy against the share of heads ablated, for the top heads and their controls."""

    kind: str
    clean: Interval
    curves: dict[str, list[Point]]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def hint(self) -> str | None:
        """What to know where the top heads certainly cost more than random ones at no share; None
        where they do at one."""
        if not {"top", "random"} <= set(self.curves) or not self.clean.low > 0:
            return None
        pairs = zip(self.curves["top"], self.curves["random"], strict=True)
        # (one sample has no interval, and says nothing)
        if any(not top.drop.low <= max(random.drop.value, 0.0) for top, random in pairs):
            return None
        ranking = self.meta.get("label") or "this ranking"
        return (
            f"the top heads by {ranking} cost no more than random ones, within the intervals: "
            "these heads look, and the answer does not need them. cl.where_read(model, samples) "
            "measures at which rows the answer hangs on the evidence"
        )

    def plot(self, **options: Any) -> Any:
        """The curves as a matplotlib figure."""
        from corelens.viz.curves import ablation_curves

        return ablation_curves(
            {
                name: [(p.fraction, *p.accuracy) for p in points]
                for name, points in self.curves.items()
            },
            baseline=self.clean.value,
            **options,
        )

    def _repr_html_(self) -> str:
        from corelens.viz.view import image_html

        words = f"accuracy as more heads are ablated ({self.kind})"
        return image_html(self.plot(), f"{words}; {self.hint}" if self.hint else words)

    def to_json(self) -> dict[str, Any]:
        """The numbers and the heads of every draw."""
        return {
            "kind": self.kind,
            "clean": self.clean._asdict(),
            "hint": self.hint,
            "curves": {
                name: [
                    {
                        "fraction": p.fraction,
                        "k": p.k,
                        "accuracy": p.accuracy._asdict(),
                        "drop": p.drop._asdict(),
                        "heads": p.draws,
                    }
                    for p in points
                ]
                for name, points in self.curves.items()
            },
            **self.meta,
        }


def conditions(
    scores: HeadScores, fraction: float, draws: int, exclude: HeadSet | None = None, seed: int = 0
) -> dict[str, list[HeadSet]]:
    """The top heads and their controls: bottom k; random k outside the top; layer-matched random k,
    several draws."""
    top = scores.top(fraction) if exclude is None else exclude
    k = len(top)
    return {
        "top": [top],
        "bottom": [scores.bottom(k=k)],
        "random": [scores.random(k=k, seed=seed + i, exclude=top) for i in range(draws)],
        "layer-matched": [
            scores.random(k=k, seed=seed + i, exclude=top, match="layer") for i in range(draws)
        ],
    }


def hooks_of(kind: str, heads: HeadSet, reference: Any = None) -> list[Hook]:
    """An ablation by its name: "zero" … as `ablate` has them, or "knockout" (question, last, answer
    rows → region)."""
    if kind == "knockout":
        return knockout(heads)
    return ablate(heads, kind, reference=reference if kind in ("mean", "resample") else None)


def measure(
    model: Any,
    prepared: Sequence[Inputs],
    clean: Evaluation,
    sets: Iterable[HeadSet],
    kind: str,
    fraction: float,
    reference: Any = None,
    advance: Callable[[], None] = lambda: None,
) -> Point:
    """Ablate each of these sets in turn; accuracy is over samples, each the mean over the sets.
    `advance` is called after each."""
    head_sets, runs = list(sets), []
    for heads in head_sets:
        runs.append(evaluate(model, prepared, hooks_of(kind, heads, reference)))
        advance()
    return _point(clean.correct, [run.correct for run in runs], head_sets, fraction)


def _point(
    clean: Float[np.ndarray, " sample"],
    runs: Sequence[Float[np.ndarray, " sample"]],
    sets: Sequence[HeadSet],
    fraction: float,
) -> Point:
    mean = np.mean(runs, axis=0)
    return Point(
        fraction,
        len(sets[0]),
        accuracy_interval(mean),
        accuracy_difference(clean, mean),
        [heads.to_json() for heads in sets],
    )


def ablation_sweep(
    model: Any,
    samples: Sequence[Sample],
    scores: HeadScores,
    fractions: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    kind: str = "mean",
    draws: int = 5,
    reference: Any = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
    out: str | Path | None = None,
) -> Sweep:
    """Ablate more and more heads: the top ones, and for each share its three controls.

    Args:
        model: a HookedMLLM.
        samples: questions with answers; not those that the scores were taken from.
        scores: which heads are the top ones.
        fractions: shares of all heads.
        kind: "zero", "mean", "resample", "uniform" or "knockout".
        draws: how many random and layer-matched sets a share.
        reference: for "mean" what `mean_z` returned (by default taken from these samples), for
            "resample" a cache.
        out: a run folder: what each batch answers under all sets is kept, a sweep that was stopped
            goes on, and the processes of `accelerate launch` or `torchrun` share the batches.

    In a small model a layer-matched draw takes the next-best retrieval heads of the same layer: its
    cost is no noise.

    Warns where the top heads cost no more than random ones at any share (`Sweep.hint`): heads that
    look need not be heads that the answer needs.
    """
    if not isinstance(scores, HeadScores):
        raise CorelensError(
            f"a {type(scores).__name__} as scores",
            "HeadScores: one ranking",
            'one of those that cl.score_heads gave: scores["ram"]',
        )
    scores.top(k=1).check(model.cfg.n_layers, model.cfg.n_heads)
    check_folder(out)
    samples = listed(samples, "ablation_sweep", "every set of heads is one more run of all")
    if kind == "mean" and reference is None:
        reference = mean_z(model, samples)
    sets = [
        (fraction, name, drawn)
        for fraction in fractions
        for name, drawn in conditions(scores, fraction, draws, seed=seed).items()
    ]
    curves: dict[str, list[Point]] = {}
    if out is None:
        prepared = batches(model, samples, batch_size)
        clean = evaluate(model, prepared)
        interval = clean.interval
        with Progress(transient=True, disable=not progress) as bar:
            task = bar.add_task("ablating", total=sum(len(drawn) for *_, drawn in sets))
            for fraction, name, drawn in sets:
                point = measure(
                    model, prepared, clean, drawn, kind, fraction, reference,
                    advance=partial(bar.advance, task),
                )  # fmt: skip
                curves.setdefault(name, []).append(point)
    else:
        every = [heads for *_, drawn in sets for heads in drawn]

        def answered(batch: Sequence[Sample]) -> list[list[float]]:
            """Whether each sample is answered: without an ablation, then under that of each set."""
            prepared = batches(model, batch, batch_size)
            runs = [evaluate(model, prepared)]
            runs += [evaluate(model, prepared, hooks_of(kind, h, reference)) for h in every]
            return [run.correct.tolist() for run in runs]

        with samples_folder(
            model, samples, out, run="ablation", kind=kind, batch_size=batch_size,
            sets=digest(every), reference=digest(reference),
        ) as folder:  # fmt: skip
            parts = by_batch(folder, samples, batch_size, answered, progress)
        correct, *ablated = (np.concatenate(of_run) for of_run in zip(*parts, strict=True))
        interval, rest = accuracy_interval(correct), iter(ablated)
        for fraction, name, drawn in sets:
            runs = [next(rest) for _ in drawn]
            curves.setdefault(name, []).append(_point(correct, runs, drawn, fraction))
    about = {"samples": len(samples), "draws": draws, "metric": scores.meta.get("key")}
    sweep = Sweep(kind, interval, curves, about | {"label": scores.label})
    if sweep.hint:
        warnings.warn(sweep.hint, stacklevel=2)
    return sweep
