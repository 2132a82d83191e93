"""Evaluations kept in a run folder: a run that was stopped goes on, and several processes share
it."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.evaluation.answers import Answer, Evaluation, named
from corelens.hooks.points import Hook
from corelens.inputs.on_error import OnError, left_out
from corelens.inputs.prepare import Inputs, Sample
from corelens.runs.digest import digest
from corelens.runs.folder import RunFolder, run_folder
from corelens.runs.processes import carry_out, is_first
from corelens.runs.provenance import hook_identity, model_identity, refuse_active, sample_hash


@contextmanager
def samples_folder(
    model: Any,
    samples: Sequence[Any],
    out: str | Path,
    hooks: Sequence[Hook] = (),
    **options: Any,
) -> Iterator[RunFolder]:
    """The folder of a run of this model on these samples, under these hooks and options (JSON).

    Raises:
        CorelensError: batches that were prepared before (what they show cannot be told); hooks or
            a plan active on the model; a folder of another run.
    """
    if any(isinstance(sample, Inputs) for sample in samples):
        raise CorelensError(
            "out= with prepared inputs",
            "samples, whose pictures and texts say which run this is",
            "give the list of samples, or leave out= away",
        )
    refuse_active(model)
    identity = model_identity(model) | {"sample_hash": sample_hash(samples), "n": len(samples)}
    identity |= {"hooks": hook_identity(hooks)} | options
    with run_folder(out, identity) as folder:
        yield folder


def by_batch(
    folder: RunFolder,
    samples: Sequence[Sample],
    batch_size: int,
    make: Callable[[Sequence[Sample]], Any],
    progress: bool = False,
) -> list[Any]:
    """What `make` returns (JSON) for every batch of the samples, in their order; each is made once,
    by whichever process of the launch comes to it."""
    names, pieces = [], []
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        names.append(f"batch-{start:08d}")
        pieces.append(folder.piece(names[-1], len(batch), partial(make, batch)))
    carry_out(folder.claims, pieces, progress)
    return [folder.read(name) for name in names]


def evaluation_in(
    folder: RunFolder,
    samples: Sequence[Sample],
    batch_size: int,
    answered: Callable[[Sequence[Sample]], tuple[list[Answer], dict[int, CorelensError]]],
    on_error: OnError,
    progress: bool = False,
) -> Evaluation:
    """The answers to all samples, one batch after the other; the first process also writes them to
    `evaluation.json`.

    Args:
        answered: answers one batch: (answers, {index: error} of the samples left out).
    """

    def records(batch: Sequence[Sample]) -> dict[str, Any]:
        answers, wrong = answered(batch)
        usable = [sample for index, sample in enumerate(batch) if index not in wrong]
        # (a sample without a name is called after its index in the whole list, which its batch does
        # not know)
        return {
            "answers": [
                asdict(answer) | {"id": sample.id, "asked": ""}
                for answer, sample in zip(answers, usable, strict=True)
            ],
            "skipped": [[index, *error.__reduce__()[1]] for index, error in wrong.items()],
        }

    parts = by_batch(folder, samples, batch_size, records, progress)
    wrong = {}
    for number, part in enumerate(parts):
        for index, *words in part["skipped"]:  # an index within the batch, an error's words
            wrong[number * batch_size + index] = CorelensError(*words)
    skipped = left_out(samples, wrong, on_error)
    answers = [Answer(**record) for part in parts for record in part["answers"]]
    usable = [sample for index, sample in enumerate(samples) if index not in wrong]
    evaluation = Evaluation(named(answers, usable), {"skipped": skipped} if skipped else {})
    if is_first():
        whole = {
            "accuracy": evaluation.accuracy,
            "ci": list(evaluation.ci),
            "answer_logprob": evaluation.answer_logprob,
            "n": len(answers),
            "answers": [asdict(answer) for answer in answers],
        }
        write_whole(
            folder.path / "evaluation.json", json.dumps(whole, indent=1, ensure_ascii=False)
        )
    return evaluation


def plan_identity(sparse: Any) -> str | None:
    """A digest of what a sparse plan leaves out; not of what has run under it."""
    if sparse is None or not is_dataclass(sparse):
        return None if sparse is None else digest(sparse)
    return digest([(f.name, getattr(sparse, f.name)) for f in fields(sparse) if f.compare])
