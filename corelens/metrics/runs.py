"""Runs that survive: results in a folder, whole after every step, whatever stops the process.

A run folder holds `run.json`, which says what is computed (its identity: model, metrics, samples,
options; see `corelens.metrics.provenance`), and what is finished:

- part files `part-<first sample>.safetensors`, each the per-sample results of one batch;
- `<name>.json`, a result that was made once;
- `<name>.jsonl`, results that come one by one, a line each.

Each of them carries the digest of the identity and its own checksum. What belongs to another run,
or is not what was written, is refused by name. A run that starts again computes what is missing.
One launch at a time writes a folder; its processes share it, and no two of them take the same
batch.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from corelens.errors import CorelensError
from corelens.heads.disk import (
    append_line,
    cannot_write,
    digest_of,
    file_name,
    make_folder,
    open_sealed,
    sealed,
    write_whole,
)

FORMAT = "corelens.run/2"
PATIENCE = 10  # seconds in which another process of this launch may be taking the lock


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
        elif any(self.path.glob("part-*.safetensors")):
            raise CorelensError(
                f"{self.path}, parts without a run.json", "a run folder", "choose another folder"
            )
        else:
            write_whole(header, json.dumps(identity, indent=1, ensure_ascii=False))

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
                f"({key}: {_short(stored.get(key))} there, {_short(identity.get(key))} now)",
                "an empty folder, or one with the same model, metrics, samples and options",
                "choose another folder, or delete this one",
            )

    # --- results of samples, batch by batch

    def done(self) -> set[int]:
        """The numbers of the samples whose results are there."""
        return {number for part in self._parts() for number in self._part(part)[0]}

    def add(self, numbers: Sequence[int], results: dict[str, np.ndarray]) -> None:
        """Keep the results of one batch: `results[key]` is [sample of the batch, …]."""
        about = {"samples": json.dumps(list(numbers)), "run": self.digest}
        write_whole(self.path / f"part-{numbers[0]:08d}.safetensors", sealed(results, about))

    def merged(self, wanted: Sequence[int]) -> dict[str, np.ndarray]:
        """The results of the samples of these numbers, in their order: {key: [sample, …]}."""
        results: dict[int, dict[str, np.ndarray]] = {}
        for part in self._parts():
            numbers, tensors = self._part(part)
            for i, number in enumerate(numbers):
                results[number] = {key: x[i] for key, x in tensors.items()}
        missing = set(wanted) - set(results)
        if missing:
            raise CorelensError(
                f"{self.path}, in which {len(missing)} of {len(wanted)} samples are missing",
                "all of them",
                "start the run again",
            )
        return {
            key: np.stack([results[number][key] for number in wanted]) for key in results[wanted[0]]
        }

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.safetensors"))

    def _part(self, part: Path) -> tuple[list[int], dict[str, np.ndarray]]:
        try:
            tensors, about = open_sealed(part)
            numbers = json.loads(about["samples"])
        except (CorelensError, KeyError, ValueError) as error:
            why = error.given if isinstance(error, CorelensError) else f"{part}: {error}"
            raise _foreign(why) from error
        if about.get("run") != self.digest:
            raise _foreign(f"{part}, which belongs to another run")
        return numbers, tensors

    # --- results that are made once

    def saved(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON), made once: it lies in the folder, whole or not at all."""
        file = self.path / f"{file_name(name)}.json"
        if file.exists():
            return self._read(file, name, file.read_bytes())
        value = json.loads(json.dumps(make()))
        write_whole(file, self._written(name, value))
        return value

    def read_lines(self, name: str) -> dict[str, Any]:
        """{key: value} of what `add_line` kept under this name. A line that a kill has torn is left
        out."""
        file, values = self.path / f"{file_name(name)}.jsonl", {}
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                json.loads(line)
            except ValueError:  # torn: the process ended while writing it; it is made again
                continue
            key, value = self._read(file, name, line)
            values[key] = value
        return values

    def add_line(self, name: str, key: str, value: Any) -> None:
        """Keep one result (JSON) under a key, as a line of its own."""
        append_line(self.path / f"{file_name(name)}.jsonl", self._written(name, [key, value]))

    def _written(self, name: str, value: Any) -> str:
        record = {"name": name, "run": self.digest, "value": value}
        return json.dumps({**record, "sha256": digest_of(record)}, ensure_ascii=False)

    def _read(self, file: Path, name: str, words: bytes) -> Any:
        try:
            record = json.loads(words)
            checksum = record.pop("sha256")
            fits, run = digest_of(record) == checksum, record["run"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _foreign(f"{file}, which cannot be read") from error
        if run != self.digest or record.get("name") != name:
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
        yield RunFolder(path, identity)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this launch; it is let go when the process ends, however that happens.

    The processes of one launch (`accelerate launch`, `torchrun`) hold it together.

    Raises:
        CorelensError: another launch holds it.
    """
    try:
        import fcntl
    except ImportError:  # (Windows has no such locks)
        yield
        return
    name = _launch()
    try:
        file = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise cannot_write(folder, error) from error
    with file:
        deadline = time.monotonic() + PATIENCE
        while not _take(file, name, folder, fcntl):
            if time.monotonic() > deadline:
                raise _held(folder, "unknown")
            time.sleep(0.02)
        yield


def _take(file: Any, name: str, folder: Path, fcntl: Any) -> bool:
    """Take the lock: alone if nobody has it, together with others of this launch; False: try
    again."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(name)
        file.flush()
        for part in folder.rglob(".*.part"):  # what a kill left half written
            part.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:  # somebody is just writing a name
        return False
    if _holder(file) != name:
        raise _held(folder, _holder(file).rpartition(" ")[0])
    return True


def _held(folder: Path, launch: str) -> CorelensError:
    return CorelensError(
        f"{folder}, which another launch is writing ({launch})",
        "a folder that one launch at a time writes",
        "wait until it has finished, or choose another folder",
    )


def _holder(file: Any) -> str:
    file.seek(0)
    return file.read()


def _launch() -> str:
    """The name of this launch: the same in its processes, and in no other launch."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        return "a launch of several processes " + "/".join(
            os.environ.get(name, "") for name in names
        )
    return f"process {os.getpid()} on {socket.gethostname()} {uuid.uuid4().hex}"


def _foreign(file: str) -> CorelensError:
    return CorelensError(
        file,
        "what this run wrote",
        "delete it and start the run again: what is missing is computed",
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"
