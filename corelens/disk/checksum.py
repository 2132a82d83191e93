"""Checksums of files: tensors that carry their own, and the digest of a JSON value."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from corelens.disk.write import writing
from corelens.errors import CorelensError

CHECKSUM = "sha256"
UNSET = "0" * 64  # stands in place of the checksum while it is computed
BLOCK = 1 << 24  # bytes that are read at a time, of a file that is mapped


def sealed(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata holds, under `sha256`, the digest of all its other bytes.

    It is taken of the whole file with zeros in the digest's place.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    blob = _ordered(save(arrays, metadata={**metadata, CHECKSUM: UNSET}))
    start = _checksum_start(blob, UNSET)
    return blob[:start] + hashlib.sha256(blob).hexdigest().encode() + blob[start + len(UNSET) :]


def _ordered(blob: bytes) -> bytes:
    """The same file with its metadata in alphabetical order: safetensors writes it in another one
    in each process."""
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header.pop("__metadata__").items()))
    return _head(header) + blob[8 + size :]


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
    start = _checksum_start(blob, checksum)
    zeroed = blob[:start] + UNSET.encode() + blob[start + len(UNSET) :]
    if hashlib.sha256(zeroed).hexdigest() != checksum:
        raise _unreadable(path, "its checksum does not fit: it is not what was written")
    return tensors, metadata


def write_sealed(
    path: str | os.PathLike,
    shape: tuple[int, ...],
    tensors: Mapping[str, Iterable[np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write what `sealed` makes, of float32 tensors of one shape, each given piece by piece."""
    size = 4 * int(np.prod(shape))
    header: dict[str, Any] = {
        "__metadata__": dict(sorted({**metadata, CHECKSUM: UNSET}.items())),
    }
    for index, name in enumerate(tensors):
        offsets = [index * size, (index + 1) * size]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
    head = _head(header)
    checksum = hashlib.sha256(head)
    with writing(path) as file:
        file.write(head)
        for pieces in tensors.values():
            for piece in pieces:
                block = np.ascontiguousarray(piece, dtype="<f4").tobytes()
                checksum.update(block)
                file.write(block)
        file.seek(_checksum_start(head, UNSET))
        file.write(checksum.hexdigest().encode())


def map_sealed(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors of a file that `write_sealed` wrote, mapped into memory: read from the disk where
    they are used.

    The file is read once, piece by piece, to compare its checksum.

    Args:
        path: the file.
        metadata: what it was written with.

    Raises:
        CorelensError: it cannot be read, was written with other metadata, or is not what was
            written.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), BLOCK))
            header = json.loads(head[8:])
            written = _metadata(head)
            checksum = written.pop(CHECKSUM)
            start = _checksum_start(head, checksum)
            digest = hashlib.sha256(head[:start] + UNSET.encode() + head[start + len(UNSET) :])
            while block := file.read(BLOCK):
                digest.update(block)
        if digest.hexdigest() != checksum:
            raise _unreadable(path, "its checksum does not fit: it is not what was written")
        if written != dict(metadata):
            raise _unreadable(path, "it belongs to another run")
        return {
            name: np.memmap(
                path, "<f4", "r", len(head) + entry["data_offsets"][0], tuple(entry["shape"])
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    except CorelensError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error


def _head(header: Mapping[str, Any]) -> bytes:
    """How a safetensors file begins: the length of its header, and the header."""
    words = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)  # (tensors begin at a multiple of 8)
    return len(words).to_bytes(8, "little") + words


def _checksum_start(blob: bytes, checksum: str) -> int:
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


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
