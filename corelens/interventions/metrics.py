"""What a patch is measured by: functions of logits [batch, pos, d_vocab] → one number a sample
[batch].

Any such function of your own will do. Those here know which row predicts the answer and how an
answer is tokenised as the continuation of its prompt; for that they are bound to the runs that are
compared (the runners do it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM

# one for all samples, or one a sample; an int is a token id
Answers = str | int | Sequence[str | int] | None


@dataclass(frozen=True)
class Bound:
    """A metric that is bound to the runs it measures: it knows their answers and rows.

    Args:
        label: what is measured, for axes and headings.
        function: logits [batch, pos, d_vocab] → [batch]; `pos` may be only the last `keep`
            positions.
        keep: how many of the last positions it reads; None: all of them.
    """

    label: str
    function: Callable[[Tensor], Tensor]
    keep: int | None = None

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric of each sample; an error if the function returns another shape."""
        values = self.function(logits)
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != [len(logits)]:
            raise CorelensError(
                f"the metric {self.label!r}, which returned {shape} for logits "
                f"{list(logits.shape)}",
                f"one number a sample: a tensor of shape [{len(logits)}]",
                "for instance lambda logits: logits[:, -1, a] - logits[:, -1, b]",
            )
        return values


class LogitMetric:
    """A metric that still has to be bound to runs (`bind`). One made of token ids also works
    unbound, at the last position."""

    def __init__(
        self, label: str, make: Callable[..., Bound], free: Callable[[Tensor], Tensor] | None = None
    ):
        self.label, self._make, self._free = label, make, free

    def bind(self, model: HookedMLLM, clean: Inputs, corrupted: Inputs | None = None) -> Bound:
        """The metric for these runs.

        Args:
            model: a HookedMLLM.
            clean: the batch whose answers count.
            corrupted: the other batch; its answers are the wrong ones of `logit_diff()`.
        """
        return self._make(model, clean, corrupted)

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        """The metric at the last position, if it needs no tokenizer."""
        if self._free is None:
            raise CorelensError(
                f"{self.label} called on bare logits",
                "a metric that knows its tokens",
                "hand it to a runner, bind it: metric.bind(model, inputs)(logits), or give token "
                "ids instead of texts",
            )
        return self._free(logits)

    def __repr__(self) -> str:
        return self.label


def bound(metric: Any, model: HookedMLLM, clean: Inputs, corrupted: Inputs | None) -> Bound:
    """Any metric as a Bound: ours are bound to the runs, a function is taken as it is."""
    if isinstance(metric, Bound):
        return metric
    if isinstance(metric, LogitMetric):
        return metric.bind(model, clean, corrupted)
    if not callable(metric):
        raise CorelensError(
            f"a metric {metric!r}",
            "a function of logits [batch, pos, d_vocab] that returns one number a sample",
            "for instance cl.logit_diff('7', '3')",
        )
    return Bound(getattr(metric, "__name__", type(metric).__name__), metric)


# --- the metrics


def logit_diff(right: Answers = None, wrong: Answers = None) -> LogitMetric:
    """Logit of the right answer's token minus that of the wrong one, at the row that predicts the
    first answer token.

    Args:
        right, wrong: texts of one token each as continuations of the prompt, or token ids; one for
            all samples or a list, one a sample. By default the clean samples' answers and the
            corrupted samples' answers.
    """

    def make(model: HookedMLLM, clean: Inputs, corrupted: Inputs | None) -> Bound:
        a = single_tokens(model, clean, _texts(right, clean, "right"))
        b = single_tokens(model, clean, _texts(wrong, corrupted, "wrong"))
        back = _rows_back(clean)

        def logit_diff(logits: Tensor) -> Tensor:
            rows = _rows(logits, back)
            return _pick(rows, a) - _pick(rows, b)

        return Bound("logit difference", logit_diff, int(back.max()))

    free = None
    if isinstance(right, int) and isinstance(wrong, int):

        def free(logits: Tensor) -> Tensor:
            return logits[:, -1, right] - logits[:, -1, wrong]

    return LogitMetric(f"logit_diff({right!r}, {wrong!r})", make, free)


def answer_logprob(answer: Answers = None) -> LogitMetric:
    """Log-probability (nats) of the answer.

    With `answer` given: of that one token, at the row that predicts the first answer token. By
    default: of the gold answer's tokens, summed, teacher-forced if the batch was prepared with
    answer=True, else it must be one token.
    """

    def make(model: HookedMLLM, clean: Inputs, corrupted: Inputs | None) -> Bound:
        if answer is None and all("answer" in token_map.parts for token_map in clean.token_maps):
            return Bound(
                "log-probability of the answer (nats)", *_teacher_forced(clean, _logprob_of)
            )
        ids, back = single_tokens(model, clean, _texts(answer, clean, "gold")), _rows_back(clean)

        def answer_logprob(logits: Tensor) -> Tensor:
            return _pick(_rows(logits, back).log_softmax(-1), ids)

        return Bound("log-probability of the answer (nats)", answer_logprob, int(back.max()))

    return LogitMetric(f"answer_logprob({'' if answer is None else repr(answer)})", make)


def accuracy(answer: Answers = None) -> LogitMetric:
    """1 where the most likely token is the answer's (all of its tokens, if the batch was prepared
    with answer=True)."""

    def make(model: HookedMLLM, clean: Inputs, corrupted: Inputs | None) -> Bound:
        if answer is None and all("answer" in token_map.parts for token_map in clean.token_maps):
            return Bound("accuracy", *_teacher_forced(clean, _right))
        ids, back = single_tokens(model, clean, _texts(answer, clean, "gold")), _rows_back(clean)

        def accuracy(logits: Tensor) -> Tensor:
            return (_rows(logits, back).argmax(-1) == ids.to(logits.device)).float()

        return Bound("accuracy", accuracy, int(back.max()))

    return LogitMetric(f"accuracy({'' if answer is None else repr(answer)})", make)


def kl() -> LogitMetric:
    """KL divergence (nats) from the clean run's distribution to the run's, where the first answer
    token is predicted.

    Σ_t p_clean(t) · (log p_clean(t) − log p(t)): 0 at the clean run.
    """

    def make(model: HookedMLLM, clean: Inputs, corrupted: Inputs | None) -> Bound:
        back = _rows_back(clean)
        with torch.no_grad():  # under the hooks that hang while it is bound
            wanted = _rows(model(clean, logits_to_keep=int(back.max())), back).log_softmax(-1)

        def kl(logits: Tensor) -> Tensor:
            return (wanted.exp() * (wanted - _rows(logits, back).log_softmax(-1))).sum(-1)

        return Bound("KL from the clean run (nats)", kl, int(back.max()))

    return LogitMetric("kl()", make)


# --- rows and tokens


def _rows_back(inputs: Inputs) -> Int[Tensor, " batch"]:
    """How far from the end the row stands that predicts the first answer token: 1 is the last
    position."""
    return torch.cat([token_map.length - token_map.last for token_map in inputs.token_maps])


def _rows(
    logits: Float[Tensor, "batch pos d_vocab"], back: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_vocab"]:
    return logits[torch.arange(len(back)), logits.shape[1] - back].float()


def _pick(
    rows: Float[Tensor, "batch d_vocab"], ids: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    return rows.gather(1, ids.to(rows.device)[:, None])[:, 0]


def _logprob_of(rows: Float[Tensor, "row d_vocab"], ids: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    return _pick(rows.log_softmax(-1), ids).sum()


def _right(rows: Float[Tensor, "row d_vocab"], ids: Int[Tensor, " row"]) -> Float[Tensor, ""]:
    return (rows.argmax(-1) == ids.to(rows.device)).all().float()


def _teacher_forced(
    inputs: Inputs, score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function of logits that scores the rows that predict each gold answer; and how many
    positions it reads."""
    length = inputs.length
    answers = [token_map.answer for token_map in inputs.token_maps]
    ids = [
        inputs.tensors["input_ids"][i, answer.to(inputs.tensors["input_ids"].device)]
        for i, answer in enumerate(answers)
    ]

    def of_answer(logits: Tensor) -> Tensor:
        shift = 1 + length - logits.shape[1]
        return torch.stack(
            [
                score(logits[i, positions - shift].float(), ids[i])
                for i, positions in enumerate(answers)
            ]
        )

    return of_answer, length - min(int(token_map.last) for token_map in inputs.token_maps)


def _texts(answers: Answers, inputs: Inputs | None, which: str) -> list[str | int] | str | int:
    """These answers, or else those of the samples."""
    if answers is not None:
        return answers if isinstance(answers, str | int) else list(answers)
    gold = [sample.answer for sample in inputs.samples] if inputs is not None else []
    if not gold or None in gold:
        having = "not all" if gold else "no"
        raise CorelensError(
            f"no {which} answer: none given, and {having} samples have one",
            "answers in the metric, or samples with answers",
            "for instance cl.logit_diff('7', '3'), or Sample(answer=…)",
        )
    return list(gold)  # type: ignore[arg-type]


def single_tokens(
    model: HookedMLLM, inputs: Inputs, answers: list[str | int] | str | int
) -> Int[Tensor, " batch"]:
    """The token of each sample's answer, tokenised as the continuation of its prompt.

    Errors: an answer of several tokens; as many answers as samples if not one for all.
    """
    n = len(inputs)
    per_sample = [answers] * n if isinstance(answers, str | int) else answers
    if len(per_sample) != n:
        raise CorelensError(
            f"{len(per_sample)} answers for {n} samples",
            "one answer, or one a sample",
            "match them",
        )
    texts = [answer for answer in per_sample if isinstance(answer, str)]
    if not texts:
        return torch.tensor(per_sample, dtype=torch.long)
    if inputs.samples:
        batch = model.prepare(
            [
                _light(s, a if isinstance(a, str) else "0")
                for s, a in zip(inputs.samples, per_sample, strict=True)
            ],
            answer=True,
        )
        tokenised = [
            ids[token_map.answer].tolist()
            for ids, token_map in zip(
                batch.tensors["input_ids"].cpu(), batch.token_maps, strict=True
            )
        ]
    else:
        tokenised = [
            model.tokenizer(str(answer), add_special_tokens=False)["input_ids"]
            for answer in per_sample
        ]
    tokens = []
    for answer, ids in zip(per_sample, tokenised, strict=True):
        if isinstance(answer, str) and len(ids) != 1:
            raise CorelensError(
                f"the answer {answer!r}, which is {len(ids)} tokens: "
                f"{[model.tokenizer.decode([i]) for i in ids]}",
                "an answer of one token",
                "choose answers that differ in one token, give a token id, or use "
                "cl.interventions.answer_logprob()",
            )
        tokens.append(answer if isinstance(answer, int) else ids[0])
    return torch.tensor(tokens, dtype=torch.long)


def _light(sample: Sample, answer: str) -> Sample:
    """The same prompt with this answer and small blank pictures: how an answer is tokenised does
    not depend on them."""
    blank = Image.new("RGB", (64, 64))
    video = None if sample.video is None else [blank] * len(sample.video)
    return replace(
        sample, answer=answer, images=[blank] * len(sample.images), video=video, regions=[]
    )
