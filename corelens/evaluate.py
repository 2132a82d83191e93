"""How well a model answers, under any hooks: accuracy, log-probabilities, paired differences, ablation sweeps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor

from corelens.errors import CorelensError
from corelens.head_set import HeadSet
from corelens.heads import HeadScores
from corelens.hooks import Hook
from corelens.inputs import Inputs, Sample
from corelens.interventions.ablate import ablate, mean_z
from corelens.interventions.edges import knockout


class Interval(NamedTuple):
    """A number with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def ci(self) -> "CI":
        """Its ends alone."""
        return CI(self.low, self.high)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class CI(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A paired difference and its 95% confidence interval: `difference, (low, high) = cl.paired(a, b)`."""

    difference: float
    ci: CI

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.ci.low:+.3f}, {self.ci.high:+.3f}]"


def bootstrap_mean(x: Float[np.ndarray, " sample"], level: float = 0.95, draws: int = 2000, seed: int = 0) -> Interval:
    """The mean of per-sample numbers with its percentile-bootstrap interval over samples."""
    rng = np.random.default_rng(seed)
    means = np.array([x[rng.integers(len(x), size=len(x))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


@dataclass
class Answer:
    """What the model did with one sample.

    Args:
        id: the sample's.
        gold: the gold answer.
        given: what greedy decoding writes, up to the first token that differs from the gold answer ("…" behind it if
            more may follow).
        correct: whether greedy decoding gives the gold answer and then stops.
        logprob: log-probability of the gold answer's tokens, summed (natural logarithm).
    """

    id: str
    gold: str
    given: str
    correct: bool
    logprob: float


@dataclass
class Evaluation:
    """Answers to a set of samples."""

    per_sample: list[Answer]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def correct(self) -> Float[np.ndarray, " sample"]:
        """1.0 where the answer is right."""
        return np.array([float(answer.correct) for answer in self.per_sample])

    @property
    def accuracy(self) -> float:
        """Share of samples answered exactly."""
        return float(self.correct.mean())

    @property
    def answer_logprob(self) -> float:
        """Mean log-probability of the gold answer (nats)."""
        return float(np.mean([answer.logprob for answer in self.per_sample]))

    @cached_property
    def interval(self) -> Interval:
        """Accuracy with its 95% bootstrap interval over samples."""
        return bootstrap_mean(self.correct)

    @property
    def ci(self) -> CI:
        """The ends of accuracy's 95% bootstrap interval over samples."""
        return self.interval.ci

    def __repr__(self) -> str:
        n = len(self.per_sample)
        return f"Evaluation(accuracy {self.interval}, answer_logprob {self.answer_logprob:.3f}, {n} samples)"


def paired(a: Evaluation, b: Evaluation) -> Difference:
    """Accuracy of `a` minus that of `b` on the same samples, with its 95% interval (bootstrap over pairs)."""
    if [answer.id for answer in a.per_sample] != [answer.id for answer in b.per_sample]:
        raise CorelensError(
            f"evaluations of {len(a.per_sample)} and {len(b.per_sample)} samples that are not the same",
            "two evaluations of the same samples in the same order",
            "evaluate both on one list of samples",
        )
    found = bootstrap_mean(a.correct - b.correct)
    return Difference(found.value, found.ci)


def batches(model: Any, samples: Sequence[Sample], batch_size: int = 32) -> list[Inputs]:
    """The samples with their gold answers as batches, the pictures encoded once: what `evaluate` runs on.

    Hand the result to several `evaluate` calls and the vision tower runs once instead of once a call.
    """
    without = [sample.id for sample in samples if sample.answer is None]
    if without or not samples:
        raise CorelensError(
            f"samples without an answer: {without[:5]}" if samples else "no samples",
            "samples with gold answers",
            "give Sample(answer=…)",
        )
    made = []
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            made.append(model.encode(model.prepare(samples[start : start + batch_size], answer=True)))
    return made


def evaluate(
    model: Any, samples: Sequence[Sample] | Sequence[Inputs], hooks: Sequence[Hook] = (), batch_size: int = 32
) -> Evaluation:
    """Greedy exact match and the gold answer's log-probability under hooks.

    One forward a batch, with the gold answer appended: greedy decoding writes the gold answer if and only if every
    one of its tokens is the argmax after the gold tokens before it, and the end-of-sequence token after the last.

    Args:
        model: a HookedMLLM.
        samples: questions with gold answers, or what `batches` made of them.
        hooks: to run under; all of them, at every forward.
    """
    given = [one for one in samples if isinstance(one, Inputs)]
    prepared = given or batches(model, [one for one in samples if isinstance(one, Sample)], batch_size)
    answers: list[Answer] = []
    with torch.no_grad():
        for inputs in prepared:
            keep = inputs.length - min(int(token_map.last) for token_map in inputs.token_maps)
            logits = model.run_with_hooks(inputs, fwd_hooks=list(hooks), logits_to_keep=keep)
            answers.extend(_read(model, inputs, logits, inputs.length - keep))
    return Evaluation(answers)


def _read(model: Any, inputs: Inputs, logits: Float[Tensor, "batch kept d_vocab"], first: int) -> Iterator[Answer]:
    ends = _end_tokens(model)
    for i, (sample, token_map) in enumerate(zip(inputs.samples, inputs.token_maps, strict=True)):
        gold = inputs.tensors["input_ids"][i, token_map.answer].cpu()
        lines = logits[i, token_map.answer - 1 - first].float().log_softmax(-1).cpu()
        logprob = float(lines.gather(1, gold[:, None]).sum())
        best = lines.argmax(-1)
        after = int(logits[i, int(token_map.answer[-1]) - first].argmax())
        wrong = (best != gold).nonzero()[:, 0]
        if len(wrong):
            upto = int(wrong[0])
            given = [*gold[:upto].tolist(), int(best[upto])]
        else:
            given = [*gold.tolist(), after]
        ended = given[-1] in ends
        text = model.tokenizer.decode(given[:-1] if ended else given).strip()
        right = not len(wrong) and (ended or not ends)
        yield Answer(sample.id, str(sample.answer), text if ended else f"{text}…", bool(right), logprob)


def _end_tokens(model: Any) -> set[int]:
    end = model.hf.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else set() if end is None else {end}


# --- sweeps ----------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """One condition of a sweep: k heads ablated, accuracy over samples (and over draws where the heads are drawn)."""

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

    def plot(self, **options: Any) -> Any:
        """The curves as a matplotlib figure."""
        from corelens.viz.curves import ablation_curves

        return ablation_curves(
            {name: [(p.fraction, *p.accuracy) for p in points] for name, points in self.curves.items()},
            baseline=self.clean.value,
            **options,
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers and the heads of every draw."""
        return {
            "kind": self.kind,
            "clean": self.clean._asdict(),
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
    """The top heads and their controls: bottom k; random k outside the top; layer-matched random k, several draws."""
    top = scores.top(fraction) if exclude is None else exclude
    k = len(top)
    return {
        "top": [top],
        "bottom": [scores.bottom(k=k)],
        "random": [scores.random(k=k, seed=seed + i, exclude=top) for i in range(draws)],
        "layer-matched": [scores.random(k=k, seed=seed + i, exclude=top, match="layer") for i in range(draws)],
    }


def hooks_of(kind: str, heads: HeadSet, reference: Any = None) -> list[Hook]:
    """An ablation by its name: "zero", "mean", "resample", "uniform", or "knockout" (question rows → region)."""
    if kind == "knockout":
        return knockout(heads)
    return ablate(heads, kind, reference=reference if kind in ("mean", "resample") else None)


def measure(
    model: Any, prepared: Sequence[Inputs], clean: Evaluation, sets: Iterable[HeadSet], kind: str, fraction: float,
    reference: Any = None,
) -> Point:  # fmt: skip
    """Ablate each of these sets in turn; accuracy is over samples, each the mean over the sets."""
    chosen = list(sets)
    runs = [evaluate(model, prepared, hooks_of(kind, heads, reference)) for heads in chosen]
    mean = np.mean([run.correct for run in runs], axis=0)
    return Point(
        fraction,
        len(chosen[0]),
        bootstrap_mean(mean),
        bootstrap_mean(clean.correct - mean),
        [h.to_json() for h in chosen],
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
        reference: for "mean" what `mean_z` returned (by default taken from these samples), for "resample" a cache.

    In a small model a layer-matched draw takes the next-best retrieval heads of the same layer: its cost is no noise.
    """
    scores.top(k=1).check(model.cfg.n_layers, model.cfg.n_heads)
    if kind == "mean" and reference is None:
        reference = mean_z(model, samples)
    prepared = batches(model, samples, batch_size)
    clean = evaluate(model, prepared)
    curves: dict[str, list[Point]] = {}
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("ablating", total=len(fractions) * 4)
        for fraction in fractions:
            for name, sets in conditions(scores, fraction, draws, seed=seed).items():
                point = measure(model, prepared, clean, sets, kind, fraction, reference)
                curves.setdefault(name, []).append(point)
                bar.advance(task)
    about = {"samples": len(samples), "draws": draws, "metric": scores.meta.get("key")}
    return Sweep(kind, clean.interval, curves, about)
