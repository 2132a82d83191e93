"""Checksums of files: tensors that carry their own, and the digest of a JSON value."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from corelens.errors import CorelensError

CHECKSUM = "sha256"
UNSET = "0" * 64  # stands in place of the checksum while it is computed


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
    start = _checksum_start(blob, checksum)
    zeroed = blob[:start] + UNSET.encode() + blob[start + len(UNSET) :]
    if hashlib.sha256(zeroed).hexdigest() != checksum:
        raise _unreadable(path, "its checksum does not fit: it is not what was written")
    return tensors, metadata


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
