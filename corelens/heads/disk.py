"""Files on disk: written whole or not at all, and tensors that carry their own checksum.

The one way in which CoreLens writes a file: under another name in the same folder, synced to the
disk, then renamed. A reader sees the old file or the new one, whatever stops the process.
"""

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from corelens.errors import CorelensError

CHECKSUM = "sha256"
UNSET = "0" * 64  # stands in place of the checksum while it is computed
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


# --- tensors with a checksum


def sealed(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata holds, under `sha256`, the digest of all its other bytes.

    It is taken of the whole file with zeros in the digest's place.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    blob = _ordered(save(arrays, metadata={**metadata, CHECKSUM: UNSET}))
    place = _place(blob, UNSET)
    return blob[:place] + hashlib.sha256(blob).hexdigest().encode() + blob[place + len(UNSET) :]


def _ordered(blob: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: safetensors writes it in another one
    in each process."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.pop("__metadata__").items()))
    words = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)  # (tensors begin at a multiple of 8)
    return len(words).to_bytes(8, "little") + words + blob[8 + size :]


def open_sealed(
    path: str | os.PathLike, check: Callable[[dict[str, str]], None] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) of a file that `sealed` made.

    Args:
        path: the file.
        check: looks at the metadata before the checksum is compared, to say that this is a file of
            another kind or version.

    Raises:
        CorelensError: it cannot be read, or it is not the file that was written.
    """
    path = Path(path)
    try:
        blob = path.read_bytes()
        tensors, metadata = load(blob), _metadata(blob)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, str(error)) from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise _unreadable(path, type(error).__name__) from error
    if check is not None:
        check(metadata)
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is None:
        raise _unreadable(path, "it has no checksum")
    place = _place(blob, checksum)
    zeroed = blob[:place] + UNSET.encode() + blob[place + len(UNSET) :]
    if hashlib.sha256(zeroed).hexdigest() != checksum:
        raise _unreadable(path, "its checksum does not fit: it is not what was written")
    return tensors, metadata


def _place(blob: bytes, checksum: str) -> int:
    before, _, _ = blob.partition(f'"{CHECKSUM}":"{checksum}"'.encode())
    return len(before) + len(f'"{CHECKSUM}":"')


def _metadata(blob: bytes) -> dict[str, str]:
    size = int.from_bytes(blob[:8], "little")
    metadata = json.loads(blob[8 : 8 + size]).get("__metadata__") or {}
    return {str(name): str(text) for name, text in metadata.items()}


def _unreadable(path: Path, why: str) -> CorelensError:
    return CorelensError(
        f"{path}, which cannot be read ({why})",
        "a whole safetensors file as it was written",
        "it may be truncated, changed or something else: write it again",
    )


# --- JSON with a checksum


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
