"""Streams of samples: any number of them, one window in memory at a time.

A stream is read once, from its beginning, by every process. Each window of it is done by the
process that comes to it first, and its results lie in the run folder; what a window showed is kept
with them as a digest, so that a process that sees other data, or the same folder with other data,
is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from corelens.disk.checksum import map_sealed, write_sealed
from corelens.disk.write import file_name
from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.heads.stats import ratio
from corelens.inputs.sample import Sample, as_sample
from corelens.metrics.definition import Metric
from corelens.metrics.over_samples import head_scores
from corelens.runs.folder import Part, RunFolder, run_folder
from corelens.runs.processes import Piece, attempt, called, carry_out, is_first
from corelens.runs.provenance import sample_hash

WINDOW = 512  # samples in memory at a time, whose results are one file


def check_stream(metrics: Sequence[Metric], on_error: str) -> None:
    """Raise for what needs all samples at once: a median over them, a list of those left out."""
    if on_error == "skip":
        raise CorelensError(
            "on_error='skip' with a stream",
            "'raise': no list says what was left out",
            "leave such samples out in the generator, or give a list",
        )
    for m in metrics:
        if m.samples == "median" or m.finish is not None:
            raise CorelensError(
                f"{m.key} over a stream",
                "a metric of one sample after the other: this one needs all numbers at once",
                "take another (a mean instead of a median), or give a list",
            )


def score_stream(
    out: str | Path | None,
    identity: dict[str, Any],
    samples: Iterable[Sample],
    metrics: Sequence[Metric],
    score: Callable[[list[Sample]], dict[str, np.ndarray]],
    meta: Callable[[Metric], dict[str, Any]],
    progress: bool = False,
) -> dict[str, HeadScores]:
    """All scores of all heads over a stream.

    Args:
        out: the run folder. With it the numbers of single samples lie in
            `per_sample/<key>.safetensors`, and are mapped into memory: read from the disk where
            they are used. Without it only the scores themselves are kept (running means).
        identity: what the run computes, but for the samples.
        samples: the stream.
        metrics: what is scored.
        score: {key: [sample, part, layer, head]} of one window.
        meta: what a metric's result says of itself.
        progress: show one line, in the first process.
    Raises:
        CorelensError: the stream shows other samples than those whose results are there, or more or
            fewer; a process that had taken a window has ended.
    """

    def numbers_of(window: list[Sample]) -> dict[str, np.ndarray]:
        raw = score(window)
        return {
            f"{m.key} {name}": x
            for m in metrics
            for name, x in _numbers(head_scores(m, raw[m.key], {})).items()
        }

    if out is None:
        sums = {m.key: _Sums(m) for m in metrics}
        with tqdm(unit="sample", disable=not progress) as bar:
            for _, window in windows(samples):
                results = numbers_of(window)
                for total in sums.values():
                    total.add(results)
                bar.update(len(window))
        _check_not_empty(next(iter(sums.values())).n)
        return {m.key: HeadScores(sums[m.key].values(), meta=meta(m)) for m in metrics}
    with run_folder(out, identity | {"samples": "a stream", "window": WINDOW}) as folder:
        starts, n = _carry_out_windows(folder, samples, numbers_of, progress)
        return {m.key: _merged(folder, m, starts, n, meta(m)) for m in metrics}


def windows(samples: Iterable[Sample]) -> Iterator[tuple[int, list[Sample]]]:
    """(number of its first sample, samples) of one window after the other."""
    stream, start = iter(samples), 0
    while window := [as_sample(sample) for sample in islice(stream, WINDOW)]:
        yield start, window
        start += len(window)


def _carry_out_windows(
    folder: RunFolder,
    samples: Iterable[Sample],
    numbers_of: Callable[[list[Sample]], dict[str, np.ndarray]],
    progress: bool,
) -> tuple[list[int], int]:
    """Do every window, together with the other processes of this launch: (the first sample of each,
    how many samples)."""
    n, starts, of_others = 0, [], {}
    with tqdm(unit="sample", disable=not progress or not is_first()) as bar:
        for start, window in windows(samples):
            shown = sample_hash(window)

            def make(start: int = start, window: list[Sample] = window, shown: str = shown) -> Part:
                numbers = list(range(start, start + len(window)))
                return Part(numbers, numbers_of(window), shown=shown)

            if attempt(folder.claims, folder.batch([start], make)):
                _check_shown(folder, start, shown)
            else:
                of_others[start] = shown
            starts.append(start)
            n += len(window)
            bar.update(len(window))
    pieces = [Piece(folder.part(start), 0, partial(_gone, folder, start)) for start in of_others]
    carry_out(folder.claims, pieces)
    for start, shown in of_others.items():
        _check_shown(folder, start, shown)
    _check_not_empty(n)
    before = folder.saved("samples", lambda: n)
    if before != n:
        raise CorelensError(
            f"{folder.path}, the run of a stream of {before} samples; {n} now{called()}",
            "the same samples in every process and at every start",
            "choose another folder, or give the same stream",
        )
    return starts, n


def _check_shown(folder: RunFolder, start: int, shown: str) -> None:
    if folder.read_part(start).shown != shown:
        raise CorelensError(
            f"{folder.part(start)}, the results of other samples than the stream shows there"
            f"{called()}",
            "the same samples in the same order, in every process and at every start",
            "choose another folder, or give the same stream",
        )


def _gone(folder: RunFolder, start: int) -> None:
    raise CorelensError(
        f"{folder.path}, without the samples from {start} on: the process that had taken them has "
        "ended",
        "all windows of the stream",
        "start the run again: what is missing is computed (a stream cannot be gone back in)",
    )


def _check_not_empty(n: int) -> None:
    if not n:
        raise CorelensError("an empty stream", "one sample or more", "give questions with regions")


# --- sums and files


def _numbers(scores: HeadScores) -> dict[str, np.ndarray]:
    """The numbers of single samples: one array, or the two of a ratio."""
    if scores.parts is not None:
        return {"numerator": scores.parts[0], "denominator": scores.parts[1]}
    assert scores.per_sample is not None
    return {"per_sample": scores.per_sample}


class _Sums:
    """Sums of a metric over the samples seen so far, in float64."""

    def __init__(self, metric: Metric):
        names = ["numerator", "denominator"] if metric.ratio else ["per_sample"]
        self.names = [f"{metric.key} {name}" for name in names]
        self.n, self.sums = 0, [np.zeros(())] * len(names)

    def add(self, results: dict[str, np.ndarray]) -> None:
        """Add the numbers of one window."""
        self.n += len(results[self.names[0]])
        for index, name in enumerate(self.names):
            self.sums[index] = self.sums[index] + results[name].sum(0, dtype=np.float64)

    def values(self) -> np.ndarray:
        """The scores, [layer, head]."""
        denominator = self.sums[1] if len(self.sums) > 1 else None
        return ratio(self.sums[0], denominator, self.n)


def _merged(
    folder: RunFolder, m: Metric, starts: Sequence[int], n: int, meta: dict[str, Any]
) -> HeadScores:
    """One metric's scores, written once by whichever process comes to it."""
    name = f"{file_name(m.key)}.safetensors"
    per_sample, scores = folder.path / "per_sample" / name, folder.path / "scores" / name
    about = {"key": m.key, "run": folder.digest}

    def write() -> None:
        sums = _Sums(m)
        for start in starts:
            sums.add(folder.read_part(start).results)
        shape = (n, *sums.sums[0].shape)
        tensors = {
            name.removeprefix(f"{m.key} "): _of_windows(folder, starts, name) for name in sums.names
        }
        write_sealed(per_sample, shape, tensors, about)
        HeadScores(sums.values(), meta=meta | {"run": folder.digest}).save(scores)

    carry_out(folder.claims, [Piece(scores, 0, write)])
    whole, tensors = HeadScores.load(scores), map_sealed(per_sample, about)
    if whole.meta.pop("run", None) != folder.digest:
        raise CorelensError(
            f"{scores}, which belongs to another run",
            "what this run wrote",
            "delete it and start the run again: what is missing is computed",
        )
    # (a ratio's parts stay on the disk: see the file)
    return whole if m.ratio else HeadScores(whole.values, tensors["per_sample"], whole.meta)


def _of_windows(folder: RunFolder, starts: Sequence[int], name: str) -> Iterator[np.ndarray]:
    for start in starts:
        yield folder.read_part(start).results[name]
