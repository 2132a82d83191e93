"""A full disk while a study runs."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from corelens.errors import CorelensError


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """A disk without room becomes an error that says what is kept and how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and f"code: {errno.ENOSPC}" not in str(
            error
        ):
            raise
        raise CorelensError(
            f"no room left on the disk of {folder}",
            "room for the study's results",
            "free some and run the same again: what is finished there is kept and not run again",
        ) from error
