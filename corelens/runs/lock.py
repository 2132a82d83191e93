"""The lock of a run folder: one launch at a time writes it, with all its processes."""

import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from corelens.disk.write import cannot_write
from corelens.errors import CorelensError

PATIENCE = 10  # seconds in which another process of this launch may be taking the lock


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
