"""Files that are there as a whole or not at all, and a full disk said plainly."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from corelens.errors import CorelensError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside the file, then rename: a reader sees all of it or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def full_disk_is_said(folder: Path) -> Iterator[None]:
    """A disk without room becomes an error that says what is kept and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and f"code: {errno.ENOSPC}" not in str(error):
            raise
        raise CorelensError(
            f"no room left on the disk of {folder}",
            "room for the study's results",
            "free some and run the same again: what is finished there is kept and not run again",
        ) from error
