"""Runs that survive: results in a folder, whole after every step, whatever stops the process.

A run folder holds `run.json`, which says what is computed (its identity: model, metrics, samples,
options; see `corelens.runs.provenance`), and what is finished:

- part files `part-<first sample>.safetensors`, each the per-sample results of one batch;
- `<name>.json`, a result that was made once.

Each of them carries the digest of the identity and its own checksum. What belongs to another run,
or is not what was written, is refused by name. A run that starts again computes what is missing.
One launch at a time writes a folder; its processes share it (`corelens.runs.processes`): what
one of them has taken is locked in `.claims` until it is done or the process has ended.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from corelens.disk.checksum import digest_of, open_sealed, sealed
from corelens.disk.write import file_name, make_folder, write_first, write_whole
from corelens.errors import CorelensError
from corelens.runs.lock import locked
from corelens.runs.processes import Claims, Piece, called

FORMAT = "corelens.run/2"


@dataclass(frozen=True)
class Part:
    """Results of some samples of a run.

    Args:
        numbers: which samples.
        results: {key: [sample, …]}, in the order of `numbers`.
        skipped: {number: what is wrong with it} of the samples that were left out.
        shown: of a stream, whose samples no identity can name: a digest of these.
    """

    numbers: list[int]
    results: dict[str, np.ndarray]
    skipped: dict[int, CorelensError] = field(default_factory=dict)
    shown: str = ""


def in_order(parts: Iterable[Part]) -> Part:
    """The results of several batches as one, in the order of the samples."""
    results: dict[int, dict[str, np.ndarray]] = {}
    skipped: dict[int, CorelensError] = {}
    for part in parts:
        skipped |= part.skipped
        for i, number in enumerate(part.numbers):
            results[number] = {key: x[i] for key, x in part.results.items()}
    numbers = sorted(results)
    keys = results[numbers[0]] if numbers else ()
    whole = {key: np.stack([results[number][key] for number in numbers]) for key in keys}
    return Part(numbers, whole, skipped)


class RunFolder:
    """Where the results of one run are kept; made with `with run_folder(path, identity) as folder`.

    Args:
        path: the folder.
        identity: what the run computes, JSON only; a folder that holds another run is refused.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]):
        self.path = make_folder(path)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.digest = digest_of(identity)
        header = self.path / "run.json"
        if header.is_file():
            self._check(header, identity)
        # (looked at once more: another process of this launch may just have written it)
        elif any(self.path.glob("part-*.safetensors")) and not header.is_file():
            raise CorelensError(
                f"{self.path}, parts without a run.json", "a run folder", "choose another folder"
            )
        elif not write_first(header, json.dumps(identity, indent=1, ensure_ascii=False)):
            self._check(header, identity)  # another process of this launch was the first
        self.claims = Claims(self.path)

    def _check(self, header: Path, identity: dict[str, Any]) -> None:
        try:
            stored = json.loads(header.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise CorelensError(
                f"{header}, which is no JSON", "a run.json", "choose another folder"
            ) from error
        stored = stored if isinstance(stored, dict) else {}
        differs = [key for key in {**stored, **identity} if stored.get(key) != identity.get(key)]
        if differs:
            key = differs[0]
            raise CorelensError(
                f"{self.path}, which holds a run with another {' and '.join(differs)} "
                f"({key}: {_short(stored.get(key))} there, {_short(identity.get(key))} now"
                f"{called()})",
                "an empty folder, or one with the same model, metrics, samples and options",
                "choose another folder, or delete this one",
            )

    # --- results of samples, batch by batch

    def part(self, first: int) -> Path:
        """The file of the batch that begins with the sample of this number."""
        return self.path / f"part-{first:08d}.safetensors"

    def add(self, first: int, part: Part) -> None:
        """Keep the results of the batch that begins with this sample."""
        about = {"samples": json.dumps(part.numbers), "run": self.digest}
        if part.skipped:
            wrong = {number: error.__reduce__()[1] for number, error in part.skipped.items()}
            about["skipped"] = json.dumps(wrong, ensure_ascii=False)
        if part.shown:
            about["shown"] = part.shown
        write_whole(self.part(first), sealed(part.results, about))

    def batch(self, numbers: Sequence[int], make: Callable[[], Part]) -> Piece:
        """The work of adding one batch's results, for processes to share."""
        return Piece(self.part(numbers[0]), len(numbers), lambda: self.add(numbers[0], make()))

    def read_part(self, first: int) -> Part:
        """What `add` kept of the batch that begins with this sample."""
        file = self.part(first)
        try:
            tensors, about = open_sealed(file)
            numbers = json.loads(about["samples"])
            wrong = json.loads(about.get("skipped", "{}"))
        except (CorelensError, KeyError, ValueError) as error:
            why = error.given if isinstance(error, CorelensError) else f"{file}: {error}"
            raise _foreign(why) from error
        if about.get("run") != self.digest:
            raise _foreign(f"{file}, which belongs to another run")
        skipped = {int(number): CorelensError(*words) for number, words in wrong.items()}
        return Part(numbers, tensors, skipped, about.get("shown", ""))

    def check(self, batches: Sequence[Sequence[int]]) -> None:
        """Raise for a file in a batch's place that is not this run's, or not whole."""
        for batch in batches:
            file = self.part(batch[0])
            if file.exists():
                part = self.read_part(batch[0])
                if {*part.numbers, *part.skipped} != set(batch):
                    raise _foreign(f"{file}, which holds other samples of the run")

    def merged(self, batches: Sequence[Sequence[int]]) -> Part:
        """The results of all these batches, in the order of the samples."""
        return in_order(self.read_part(batch[0]) for batch in batches)

    # --- results that are made once

    def saved(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON), made once: it lies in the folder, whole or not at all."""
        if not self._file(name).exists():
            write_whole(self._file(name), record_of(self.digest, name, make()))
        return self.read(name)

    def piece(self, name: str, size: int, make: Callable[[], Any]) -> Piece:
        """The work of keeping what `make` returns under this name, for processes to share."""
        return Piece(self._file(name), size, lambda: self.saved(name, make))

    def read(self, name: str) -> Any:
        """What is kept under this name."""
        return read_record(self._file(name), self.digest, name, self._file(name).read_bytes())

    def _file(self, name: str) -> Path:
        return self.path / f"{file_name(name)}.json"


def record_of(run: str, name: str, value: Any) -> str:
    """A result as JSON, with its name, the digest of the run that it belongs to, and a checksum."""
    record = json.loads(json.dumps({"name": name, "run": run, "value": value}))
    return json.dumps({**record, "sha256": digest_of(record)}, ensure_ascii=False)


def read_record(file: Path, run: str, name: str, words: str | bytes) -> Any:
    """The value of what `record_of` wrote.

    Raises:
        CorelensError: it cannot be read, belongs to another run, or is not what was written.
    """
    try:
        record = json.loads(words)
        checksum = record.pop("sha256")
        fits, of_run = digest_of(record) == checksum, record["run"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _foreign(f"{file}, which cannot be read") from error
    if of_run != run or record.get("name") != name:
        raise _foreign(f"{file}, which belongs to another run")
    if not fits:
        raise _foreign(f"{file}, whose checksum does not fit: it is not what was written")
    return record["value"]


@contextmanager
def run_folder(path: str | Path, identity: dict[str, Any]) -> Iterator[RunFolder]:
    """A run folder that no other launch writes meanwhile.

    Raises:
        CorelensError: another launch is writing it; it holds another run; it cannot be written.
    """
    with locked(make_folder(path)):
        folder = RunFolder(path, identity)
        try:
            yield folder
        finally:
            folder.claims.close()


def _foreign(file: str) -> CorelensError:
    return CorelensError(
        file,
        "what this run wrote",
        "delete it and start the run again: what is missing is computed",
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"
