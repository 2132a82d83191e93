"""One run, several processes: each takes work that no other has taken, and all see every result.

`accelerate launch`, `torchrun` or a cluster's scheduler start one script several times; RANK and
WORLD_SIZE in the environment say which process this is, of how many. They meet in the run folder
and send each other nothing. A process begins with its own share and then helps with the rest, so
that one that is slow holds nobody up, and what one that died had begun is done by another.
"""

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from corelens.errors import CorelensError

PAUSE = 0.05  # seconds between two looks at what others are doing
LOOK = 2.0  # seconds between two counts of all that is finished, for the progress line

# whether this process is doing a piece of shared work: what it calls for that is its own
_at_work: ContextVar[bool] = ContextVar("at_work", default=False)


def process() -> tuple[int, int]:
    """(number of this process, how many there are) in this launch."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes what is written once, and shows the progress."""
    return process()[0] == 0


def called() -> str:
    """What this process is called in a message; empty where it is alone."""
    rank, world = process()
    return f", seen by process {rank} of {world} on {socket.gethostname()}" if world > 1 else ""


def check_folder(out: Any) -> None:
    """Raise where several processes run without a folder in which they could meet."""
    world = process()[1]
    if world > 1 and out is None and not _at_work.get():
        raise CorelensError(
            f"{world} processes without a run folder",
            "out='run/'",
            "they share the work through it",
        )


@contextmanager
def working() -> Iterator[None]:
    """Within this context runners without a run folder are parts of shared work, and not
    refused."""
    before = _at_work.set(True)
    try:
        yield
    finally:
        _at_work.reset(before)


@dataclass(frozen=True)
class Piece:
    """A piece of a run's work, the same in every process.

    Args:
        file: the file that is there, whole, once the work is done.
        size: how many samples it is, for the progress line.
        make: does the work and writes the file.
    """

    file: Path
    size: int
    make: Callable[[], object]


class Claims:
    """Which work of a folder a process has taken: a byte of its `.claims` is locked for each.

    A lock ends with its process, however that ends. Where nothing can be locked (Windows, a file
    system without locks), work may be done twice: the files are the same.

    Args:
        folder: where the work's files are written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: Any = None

    def take(self, name: str) -> bool:
        """Take the work of this name; False where another process has it."""
        if process()[1] == 1:
            return True
        try:
            import fcntl

            if self._file is None:
                self._file = (self.folder / ".claims").open("ab")
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
        except (BlockingIOError, PermissionError):
            return False
        except (ImportError, OSError):
            return True
        return True

    def let_go(self, name: str) -> None:
        """Let others have the work of this name."""
        if self._file is not None:
            import fcntl

            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, _byte(name))

    def close(self) -> None:
        """Let go of everything."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _byte(name: str) -> int:
    """Which byte of `.claims` stands for the work of this name."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)


def carry_out(
    claims: Claims, pieces: Sequence[Piece], progress: bool = False, unit: str = "sample"
) -> None:
    """Do all of this work, together with the other processes of this launch; return when all of it
    is done.

    Args:
        claims: of the folder in which the files are written.
        pieces: all of the work, in the same order in every process.
        progress: show one line, in the first process, that counts what all of them have done.
        unit: what the line counts.
    """
    total, counted = sum(piece.size for piece in pieces), time.monotonic()
    waiting = _own_first(pieces)
    with tqdm(total=total, unit=unit, disable=not progress or not is_first()) as bar:
        while waiting:
            left = []
            for piece in waiting:
                if not attempt(claims, piece):
                    left.append(piece)
                if not bar.disable and time.monotonic() - counted > LOOK:
                    done = sum(piece.size for piece in pieces if piece.file.exists())
                    bar.update(done - bar.n)
                    counted = time.monotonic()
            if len(left) == len(waiting):
                time.sleep(PAUSE)
            waiting = left
        bar.update(total - bar.n)


def _own_first(pieces: Sequence[Piece]) -> list[Piece]:
    """This process's share, then those of the others; the last of another's share comes first,
    since its owner begins at the other end."""
    rank, world = process()
    order = list(pieces[rank::world])
    for other in [*range(rank + 1, world), *range(rank)]:
        order += reversed(pieces[other::world])
    return order


def attempt(claims: Claims, piece: Piece) -> bool:
    """Do this work if it is not done and no other process has taken it; False where another has."""
    if piece.file.exists():
        return True
    name = os.path.relpath(piece.file, claims.folder)
    if not claims.take(name):
        return False
    try:
        if not piece.file.exists():
            with working():
                piece.make()
    finally:
        claims.let_go(name)
    return True
