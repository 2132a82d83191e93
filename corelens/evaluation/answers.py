"""What was answered, and how sure that is: answers, accuracy with intervals, paired differences. Pure numbers."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from corelens.errors import CorelensError

if TYPE_CHECKING:
    from corelens.evaluation.speed_report import SpeedReport


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
    at_once = max(1, (1 << 16) // max(len(x), 1))  # resamples; all of them at once would not fit for many samples
    rows = [min(at_once, draws - start) for start in range(0, draws, at_once)]
    means = np.concatenate([x[rng.integers(len(x), size=(some, len(x)))].mean(axis=1) for some in rows])
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
    """Answers to a set of samples; `speed` is there when they were given under sparse inference."""

    per_sample: list[Answer]
    meta: dict[str, Any] = field(default_factory=dict)
    speed: "SpeedReport | None" = None

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

    def plot(self, ax: Any = None) -> Any:
        """Log-probabilities of right and wrong answers as a matplotlib figure."""
        from corelens.viz.answers import answer_histogram

        return answer_histogram(self, ax)

    def _repr_html_(self) -> str:
        from corelens.viz.answers import answers_html

        return f"{answers_html(self)}{self.speed._repr_html_() if self.speed is not None else ''}"


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
