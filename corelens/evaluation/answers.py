"""Answers: what greedy decoding writes and whether it is right, accuracy with intervals, paired
differences."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.intervals import (
    CI,
    Difference,
    Interval,
    accuracy_difference,
    accuracy_interval,
)
from corelens.inputs.prepare import Sample
from corelens.model.hooked import HookedMLLM
from corelens.runs.provenance import sample_hash

if TYPE_CHECKING:
    from corelens.evaluation.speed_report import SpeedReport


@dataclass
class Answer:
    """What the model did with one sample.

    Args:
        id: the sample's.
        gold: the gold answer.
        given: what greedy decoding writes, up to the first token that differs from the gold answer
            ("…" behind it if more may follow).
        correct: whether greedy decoding gives the gold answer and then stops.
        logprob: log-probability of the gold answer's tokens, summed (natural logarithm).
        asked: a digest of the sample, where it had no name and its id is its index in the list.
        score: what the sample's own set gives for the text that the model writes, 0 to 1; None
            where the set has no rule of its own (`sample.meta["scoring"]`). `given` is that text
            then.
    """

    id: str
    gold: str
    given: str
    correct: bool
    logprob: float
    asked: str = ""
    score: float | None = None


@dataclass
class Evaluation:
    """Answers to a set of samples; `speed` is there when they were given under sparse inference."""

    per_sample: list[Answer]
    meta: dict[str, Any] = field(default_factory=dict)
    speed: "SpeedReport | None" = None

    @property
    def correct(self) -> Float[np.ndarray, " sample"]:
        """1.0 where the answer is right; the set's own score, 0 to 1, where it has a rule of its
        own."""
        return np.array([float(a.correct if a.score is None else a.score) for a in self.per_sample])

    @property
    def accuracy(self) -> float:
        """Share of samples answered exactly, or the mean of the sets' own scores."""
        return float(self.correct.mean())

    @property
    def logprobs(self) -> Float[np.ndarray, " sample"]:
        """Log-probability of each gold answer (nats)."""
        return np.array([answer.logprob for answer in self.per_sample])

    @property
    def answer_logprob(self) -> float:
        """Mean log-probability of the gold answer (nats)."""
        return float(self.logprobs.mean())

    @cached_property
    def interval(self) -> Interval:
        """Accuracy with its exact 95% interval over samples (Clopper–Pearson)."""
        return accuracy_interval(self.correct)

    @property
    def ci(self) -> CI:
        """The ends of accuracy's exact 95% interval over samples (Clopper–Pearson)."""
        return self.interval.ci

    def __repr__(self) -> str:
        n = len(self.per_sample)
        return (
            f"Evaluation(accuracy {self.interval}, answer_logprob {self.answer_logprob:.3f}, "
            f"{n} samples)"
        )

    def plot(self, ax: Any = None) -> Any:
        """Log-probabilities of right and wrong answers as a matplotlib figure."""
        from corelens.viz.answers import answer_histogram

        return answer_histogram(self, ax)

    def _repr_html_(self) -> str:
        from corelens.viz.answers import answers_html

        return f"{answers_html(self)}{self.speed._repr_html_() if self.speed is not None else ''}"


def greedy_answer(
    model: HookedMLLM,
    sample: Sample,
    gold: Int[Tensor, " answer"],
    rows: Float[Tensor, "answer_and_end d_vocab"],
) -> Answer:
    """What greedy decoding writes, and the gold answer's log-probability."""
    ends = _end_tokens(model)
    logprobs = rows[:-1].float().log_softmax(-1).cpu()
    logprob = float(logprobs.gather(1, gold[:, None]).sum())
    best = logprobs.argmax(-1)
    wrong = (best != gold).nonzero()[:, 0]
    if len(wrong):
        upto = int(wrong[0])
        written = [*gold[:upto].tolist(), int(best[upto])]
    else:
        written = [*gold.tolist(), int(rows[-1].argmax())]
    ended = written[-1] in ends
    text = model.tokenizer.decode(written[:-1] if ended else written).strip()
    right = not len(wrong) and (ended or not ends)
    return Answer(
        sample.id, str(sample.answer), text if ended else f"{text}…", bool(right), logprob
    )


def _end_tokens(model: HookedMLLM) -> set[int]:
    """The tokens that end a sequence; empty for a model that names none."""
    end = model.hf.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else set() if end is None else {end}


def named(answers: list[Answer], samples: Sequence[Sample]) -> list[Answer]:
    """These answers, those to samples without a name called after their index ("sample-0007")."""
    for index, (answer, sample) in enumerate(zip(answers, samples, strict=True)):
        if not answer.id:
            answer.id, answer.asked = f"sample-{index:04d}", sample_hash([sample])
    return answers


def paired(a: Evaluation, b: Evaluation) -> Difference:
    """Accuracy of `a` minus that of `b` on the same samples, with its 95% interval (Newcombe 1998,
    method 10).

    Raises:
        CorelensError: other samples, another order, or ids that are empty or not unique; where ids
            were made up from indices in the list, the samples themselves must be the same.
    """
    ids = [answer.id for answer in a.per_sample]
    if ids != [answer.id for answer in b.per_sample]:
        raise _unlike(a, b, "the ids differ")
    if len(set(ids)) < len(ids) or not all(ids):
        raise CorelensError(
            f"{len(ids)} answers with {len(set(filter(None, ids)))} different ids",
            "an id for each sample, and no two the same",
            "give Sample(id=…)",
        )
    if [answer.asked for answer in a.per_sample] != [answer.asked for answer in b.per_sample]:
        raise _unlike(a, b, "the samples have no ids, and what is asked differs")
    interval = accuracy_difference(a.correct, b.correct)
    return Difference(interval.value, interval.ci)


def _unlike(a: Evaluation, b: Evaluation, why: str) -> CorelensError:
    return CorelensError(
        f"evaluations of {len(a.per_sample)} and {len(b.per_sample)} samples that are not the "
        f"same: {why}",
        "two evaluations of the same samples in the same order",
        "evaluate both on one list of samples",
    )
