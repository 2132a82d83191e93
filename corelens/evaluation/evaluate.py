"""How well a model answers, under any hooks: accuracy and log-probabilities."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.evaluation.answers import Answer, Evaluation, greedy_answer, named, paired
from corelens.evaluation.decoding import ask
from corelens.evaluation.lists import listed
from corelens.evaluation.own_scoring import has_rule, scored_by_rule
from corelens.evaluation.resume import evaluation_in, plan_identity, samples_folder
from corelens.evaluation.sparse_run import answered_under, check_sparse, compare
from corelens.heads.intervals import CI, Difference, Interval, bootstrap_mean
from corelens.hooks.points import Hook, hook_list
from corelens.inputs.on_error import OnError, check_on_error, left_out, of_usable
from corelens.inputs.prepare import Inputs, Sample
from corelens.runs.processes import check_folder

__all__ = [
    "CI",
    "Answer",
    "Difference",
    "Evaluation",
    "Interval",
    "batches",
    "bootstrap_mean",
    "evaluate",
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
) -> tuple[list[Inputs], dict[int, CorelensError]]:
    """The batches, and {index: error} of the samples that are left out."""
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
            wrong |= {start + index: error for index, error in of_batch.items()}
            if inputs is not None:
                made.append(model.encode(inputs))
    return made, wrong


def evaluate(
    model: Any,
    samples: Sequence[Sample] | Sequence[Inputs] | Sample | Inputs,
    hooks: Sequence[Hook] | Hook = (),
    batch_size: int = 32,
    sparse: Any = None,
    rounds: int = 5,
    on_error: OnError = "raise",
    out: str | Path | None = None,
    progress: bool = False,
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
        samples: questions with gold answers (a list, or a world's name), or what `batches` made of
            them.
        hooks: to run under; all of them, at every forward.
        sparse: a SparseInference; the result has a `speed` then, a SpeedReport against the dense
            run.
        rounds: how often dense and sparse are timed, in turns, on each of four samples; 0: answers
            only, no report.
        on_error: "raise" at a sample that cannot be prepared (a region that the processor crops
            away, a picture that is broken), or "skip" it: a warning counts those left out,
            `.meta["skipped"]` is {id: reason}.
        out: a run folder: answers are kept batch by batch, a run that was stopped goes on, and the
            processes of `accelerate launch` or `torchrun` share the batches. With `sparse`, answers
            only (rounds=0): processes that share a machine cannot be timed.
        progress: show a progress line (with `out`).

    Raises:
        CorelensError: a sample without an answer; a stream; a rule that is not known, or one that
            needs a judge model; a run folder of another run.
    """
    check_on_error(on_error)
    every_sample = listed(
        samples, "evaluate", "the result holds every answer, to be paired with another's"
    )
    prepared = [inputs for inputs in every_sample if isinstance(inputs, Inputs)]
    questions = [sample for sample in every_sample if isinstance(sample, Sample)]
    fwd_hooks = hook_list(hooks)
    if not prepared:
        check_folder(out)
    if out is not None:
        return _evaluate_in(
            out, model, every_sample, fwd_hooks, batch_size, sparse, rounds, on_error, progress
        )
    meta: dict[str, Any] = {}
    if not prepared:
        prepared, wrong = _batches(model, questions, batch_size, on_error)
        skipped = left_out(questions, wrong)
        meta = {"skipped": skipped} if skipped else {}
    if sparse is not None:
        compared = compare(model, prepared, sparse, fwd_hooks, rounds)
        return replace(compared, meta=compared.meta | meta)
    answers = _answers(model, prepared, fwd_hooks)
    return Evaluation(
        named(answers, [sample for inputs in prepared for sample in inputs.samples]), meta
    )


def _answers(model: Any, prepared: Sequence[Inputs], hooks: Sequence[Hook]) -> list[Answer]:
    """The answers to batches with gold answers."""
    scored = has_rule([sample for inputs in prepared for sample in inputs.samples])
    answers: list[Answer] = []
    with torch.no_grad():
        for inputs in prepared:
            logits = model.run_with_hooks(
                inputs, fwd_hooks=hooks, logits_to_keep=n_answer_rows(inputs)
            )
            answers += read_batch(model, inputs, logits)
    return scored_by_rule(model, prepared, answers, hooks) if scored else answers


def _evaluate_in(
    out: str | Path, model: Any, samples: Sequence[Sample | Inputs], hooks: list[Hook],
    batch_size: int, sparse: Any, rounds: int, on_error: OnError, progress: bool,
) -> Evaluation:  # fmt: skip
    """`evaluate` with a run folder: one batch after the other, shared between processes."""
    if sparse is not None and rounds:
        raise CorelensError(
            f"out= with sparse= and rounds={rounds}",
            "rounds=0: the answers alone are kept",
            "time the plan in one process, without out=",
        )

    def answered(batch: Sequence[Sample]) -> tuple[list[Answer], dict[int, CorelensError]]:
        prepared, wrong = _batches(model, batch, batch_size, on_error)
        if sparse is None:
            return _answers(model, prepared, hooks), wrong
        asked = ask(model, prepared)
        return list(
            answered_under(model, asked, check_sparse(model, sparse), hooks).per_sample
        ), wrong

    options = {"run": "evaluate", "batch_size": batch_size, "sparse": plan_identity(sparse)}
    with samples_folder(model, samples, out, hooks, **options) as folder:
        questions = [sample for sample in samples if isinstance(sample, Sample)]
        return evaluation_in(folder, questions, batch_size, answered, on_error, progress)


def n_answer_rows(inputs: Inputs) -> int:
    """How many of the last rows predict an answer, in a batch with gold answers."""
    return inputs.length - min(int(token_map.last) for token_map in inputs.token_maps)


def read_batch(
    model: Any, inputs: Inputs, logits: Float[Tensor, "batch row d_vocab"]
) -> list[Answer]:
    """What the last `n_answer_rows(inputs)` rows' logits say of every sample's answer."""
    first, answers = inputs.length - n_answer_rows(inputs), []
    for i, (sample, token_map) in enumerate(zip(inputs.samples, inputs.token_maps, strict=True)):
        gold = token_map.answer
        rows = logits[i, torch.cat([gold - 1, gold[-1:]]) - first]
        ids = inputs.tensors["input_ids"][i, gold].cpu()
        answers.append(greedy_answer(model, sample, ids, rows))
    return answers
