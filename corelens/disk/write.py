"""Files written whole or not at all.

The one way in which CoreLens writes a file: under another name in the same folder, synced to the
disk, then renamed. A reader sees the old file or the new one, whatever stops the process.
"""

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from corelens.errors import CorelensError

LONGEST_NAME = 180  # bytes; file systems take 255, and an ending and a temporary mark are added


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file that is there as a whole or not at all; its folder is made.

    Raises:
        CorelensError: the disk is full, or the file cannot be written there.
    """
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write to, piece by piece, that is there as a whole once the context ends, or not at
    all if something is raised in it; its folder is made.

    Raises:
        CorelensError: the disk is full, or the file cannot be written there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_first(path: str | os.PathLike, content: str) -> bool:
    """Write a file unless it is there by then; whether it was written. Of several processes one
    does."""
    path = Path(path)
    if path.exists():
        return False
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    write_whole(draft, content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        write_whole(path, content)
    finally:
        draft.unlink(missing_ok=True)
    return True


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and sync it. A line that a kill has torn ends where the next begins."""
    try:
        with path.open("ab") as file:
            file.write(f"\n{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(path, error) from error


def make_folder(path: str | os.PathLike) -> Path:
    """This folder, made with those above it.

    Raises:
        CorelensError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(Path(path), error) from error
    return Path(path)


def cannot_write(path: Path, error: OSError) -> CorelensError:
    """An error of the operating system, as CoreLens says it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return CorelensError(
        f"no room left on the disk of {path}"
        if full
        else f"{path}, which cannot be written ({error.strerror or error})",
        "a folder that can be written to, with room on its disk",
        "free some room or choose another place, and run the same again: what is finished is kept",
    )


def file_name(key: str) -> str:
    """A key as the name of a file, without its ending: no key leaves its folder.

    Letters, digits and ``[]=,+- ._`` stay, all else becomes %XX (as in addresses), and so does a
    dot in front. A long key is cut, with a digest of the whole behind it.
    """
    name = re.sub(r"[^\w\[\]=,+\- .]|^\.", lambda match: _percent(match[0]), key) or "%"
    if len(name.encode()) > LONGEST_NAME:
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{name.encode()[: LONGEST_NAME - 20].decode(errors='ignore')}%{digest}"
    return name


def _percent(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))
