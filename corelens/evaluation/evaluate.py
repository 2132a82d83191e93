"""How well a model answers, under any hooks: accuracy, log-probabilities, paired differences,
ablation sweeps."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.evaluation.answers import Answer, Evaluation, named, paired
from corelens.evaluation.decoding import read
from corelens.evaluation.own_scoring import has_rule, scored_by_rule
from corelens.evaluation.sparse_run import compare
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import (
    CI,
    Difference,
    Interval,
    accuracy_difference,
    accuracy_interval,
    bootstrap_mean,
)
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook, hook_list
from corelens.inputs.each import OnError, check_on_error, left_out, of_usable
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions.ablation import ablate, mean_z
from corelens.interventions.edges import knockout

__all__ = [
    "CI",
    "Answer",
    "Difference",
    "Evaluation",
    "Interval",
    "Point",
    "Sweep",
    "ablation_sweep",
    "batches",
    "bootstrap_mean",
    "conditions",
    "evaluate",
    "hooks_of",
    "measure",
    "paired",
]


def batches(model: Any, samples: Sequence[Sample] | Sample, batch_size: int = 32) -> list[Inputs]:
    """The samples with their gold answers as batches, the pictures encoded once: what `evaluate`
    runs on.

    Hand the result to several `evaluate` calls and the vision tower runs once instead of once a
    call.
    """
    return _batches(model, [samples] if isinstance(samples, Sample) else samples, batch_size)[0]


def _batches(
    model: Any, samples: Sequence[Sample], batch_size: int, on_error: OnError = "raise"
) -> tuple[list[Inputs], dict[str, str]]:
    """The batches, and {id: reason} of the samples that are left out."""
    without = [sample.id for sample in samples if sample.answer is None]
    if (without and on_error == "raise") or not samples:
        raise CorelensError(
            f"samples without an answer: {without[:5]}" if samples else "no samples",
            "samples with gold answers",
            "give Sample(answer=…)",
        )
    made: list[Inputs] = []
    wrong: dict[int, CorelensError] = {}
    prepare = partial(model.prepare, answer=True)
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            inputs, of_batch = of_usable(batch, prepare, prepare, on_error)
            wrong |= {start + place: error for place, error in of_batch.items()}
            if inputs is not None:
                made.append(model.encode(inputs))
    return made, left_out(samples, wrong)


def evaluate(
    model: Any,
    samples: Sequence[Sample] | Sequence[Inputs] | Sample | Inputs,
    hooks: Sequence[Hook] | Hook = (),
    batch_size: int = 32,
    sparse: Any = None,
    rounds: int = 5,
    on_error: OnError = "raise",
) -> Evaluation:
    """Greedy exact match and the gold answer's log-probability, under hooks and under sparse
    inference.

    One forward a batch, with the gold answer appended: greedy decoding writes the gold answer if
    and only if every one of its tokens is the argmax after the gold tokens before it, and the
    end-of-sequence token after the last. Under sparse inference answers are decoded step by step
    instead (`corelens.evaluation.decoding` says why).

    A sample whose set has a rule of its own (`sample.meta["scoring"]`: ANLS, overlap of boxes,
    MMLongBench-Doc's rules) is scored by that rule on the text that the model writes;
    `Answer.score` holds it, and accuracy is the mean.

    Args:
        model: a HookedMLLM.
        samples: questions with gold answers, or what `batches` made of them.
        hooks: to run under; all of them, at every forward.
        sparse: a SparseInference; the result has a `speed` then, a SpeedReport against the dense
            run.
        rounds: how often dense and sparse are timed, in turns, on each of four samples; 0: answers
            only, no report.
        on_error: "raise" at a sample that cannot be prepared (a region that the processor crops
            away, a picture that is broken), or "skip" it: a warning counts those left out,
            `.meta["skipped"]` is {id: reason}.

    Raises:
        CorelensError: a sample without an answer; a rule that is not known, or one that needs a
            judge model.
    """
    check_on_error(on_error)
    listed = [samples] if isinstance(samples, Sample | Inputs) else samples
    prepared = [inputs for inputs in listed if isinstance(inputs, Inputs)]
    skipped: dict[str, str] = {}
    if not prepared:
        questions = [sample for sample in listed if isinstance(sample, Sample)]
        prepared, skipped = _batches(model, questions, batch_size, on_error)
    meta = {"skipped": skipped} if skipped else {}
    scored = has_rule([sample for inputs in prepared for sample in inputs.samples])
    if sparse is not None:
        compared = compare(model, prepared, sparse, hook_list(hooks), rounds)
        return replace(compared, meta=compared.meta | meta)
    answers: list[Answer] = []
    with torch.no_grad():
        for inputs in prepared:
            logits = model.run_with_hooks(
                inputs, fwd_hooks=hook_list(hooks), logits_to_keep=answer_rows(inputs)
            )
            answers += read_batch(model, inputs, logits)
    if scored:
        answers = scored_by_rule(model, prepared, answers, hook_list(hooks))
    return Evaluation(
        named(answers, [sample for inputs in prepared for sample in inputs.samples]), meta
    )


def answer_rows(inputs: Inputs) -> int:
    """How many of the last rows predict an answer, in a batch with gold answers."""
    return inputs.length - min(int(token_map.last) for token_map in inputs.token_maps)


def read_batch(
    model: Any, inputs: Inputs, logits: Float[Tensor, "batch row d_vocab"]
) -> list[Answer]:
    """What the last `answer_rows(inputs)` rows' logits say of every sample's answer."""
    first, answers = inputs.length - answer_rows(inputs), []
    for i, (sample, token_map) in enumerate(zip(inputs.samples, inputs.token_maps, strict=True)):
        gold = token_map.answer
        rows = logits[i, torch.cat([gold - 1, gold[-1:]]) - first]
        answers.append(read(model, sample, inputs.tensors["input_ids"][i, gold].cpu(), rows))
    return answers


# --- sweeps


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
    model: Any, prepared: Sequence[Inputs], clean: Evaluation, sets: Iterable[HeadSet], kind: str,
    fraction: float,
    reference: Any = None, advance: Callable[[], None] = lambda: None,
) -> Point:  # fmt: skip
    """Ablate each of these sets in turn; accuracy is over samples, each the mean over the sets.
    `advance` is called after each."""
    head_sets, runs = list(sets), []
    for heads in head_sets:
        runs.append(evaluate(model, prepared, hooks_of(kind, heads, reference)))
        advance()
    mean = np.mean([run.correct for run in runs], axis=0)
    return Point(
        fraction,
        len(head_sets[0]),
        accuracy_interval(mean),
        accuracy_difference(clean.correct, mean),
        [heads.to_json() for heads in head_sets],
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

    In a small model a layer-matched draw takes the next-best retrieval heads of the same layer: its
    cost is no noise.

    Warns where the top heads cost no more than random ones at any share (`Sweep.hint`): heads that
    look need not be heads that the answer needs.
    """
    scores.top(k=1).check(model.cfg.n_layers, model.cfg.n_heads)
    if kind == "mean" and reference is None:
        reference = mean_z(model, samples)
    prepared = batches(model, samples, batch_size)
    clean = evaluate(model, prepared)
    curves: dict[str, list[Point]] = {}
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("ablating", total=len(fractions) * 2 * (1 + draws))
        for fraction in fractions:
            for name, sets in conditions(scores, fraction, draws, seed=seed).items():
                point = measure(
                    model, prepared, clean, sets, kind, fraction, reference,
                    advance=partial(bar.advance, task),
                )  # fmt: skip
                curves.setdefault(name, []).append(point)
    about = {"samples": len(samples), "draws": draws, "metric": scores.meta.get("key")}
    sweep = Sweep(kind, clean.interval, curves, about | {"label": scores.label})
    if sweep.hint:
        warnings.warn(sweep.hint, stacklevel=2)
    return sweep
