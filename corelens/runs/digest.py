"""A digest of any value by its contents: pictures by their pixels, files by their bytes, functions
by their code."""

import dataclasses
import functools
import hashlib
import inspect
import os
from collections.abc import Mapping
from functools import lru_cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from corelens.inputs.pictures import Later

SHORT = 16  # hexadecimal digits of a digest that are shown and kept


class Digest:
    """SHA-256 of values by their contents: arrays by their bytes, files by theirs, functions by
    their code."""

    def __init__(self, walked: "dict[int, tuple[Any, str | None]] | None" = None) -> None:
        self._sha = hashlib.sha256()
        # {id: (object, its digest, None while it is walked through)}: shared objects are walked
        # once
        self._walked = {} if walked is None else walked

    def hexdigest(self) -> str:
        """The digest of all that was added, shortened."""
        return self._sha.hexdigest()[:SHORT]

    def add(self, value: Any) -> "Digest":
        """Add one value; its type and extent are part of it, so that no two values run together."""
        if value is None or isinstance(value, bool | int | float | complex | str | np.generic):
            self._put(type(value).__name__, repr(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes | bytearray | memoryview):
            self._put("bytes", bytes(value))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._put(
                f"array {value.dtype.str} {value.shape}", np.ascontiguousarray(value).tobytes()
            )
        elif isinstance(value, Tensor):
            self._put(f"tensor {value.dtype} {tuple(value.shape)}", tensor_bytes(value))
        elif isinstance(value, Image.Image):
            self._picture(value)
        elif isinstance(value, os.PathLike):
            self._put("path", os.fspath(value).encode("utf-8", "surrogatepass"))
        elif isinstance(value, Later):
            self._put(
                "later",
                f"{value.part} {file_digest(value.file)} {value.size} {value.broken}".encode(),
            )
        elif isinstance(value, ModuleType):
            self._put("module", value.__name__.encode())
        elif isinstance(value, type):
            self._put("type", f"{value.__module__}.{value.__qualname__}".encode())
        else:
            if id(value) not in self._walked:
                self._walked[id(value)] = value, None
                part = Digest(self._walked)
                part._walk(value)
                self._walked[id(value)] = value, part.hexdigest()
            self._put("value", (self._walked[id(value)][1] or "circle").encode())
        return self

    def picture(self, picture: Any) -> "Digest":
        """Add a picture as a Sample holds it: a path stands for the bytes of its file."""
        if isinstance(picture, str | os.PathLike):
            self._put("file", file_digest(picture).encode())
            return self
        return self.add(picture)

    def _put(self, kind: str, content: bytes) -> None:
        self._sha.update(f"{kind} {len(content)}:".encode("utf-8", "surrogatepass"))
        self._sha.update(content)

    def _picture(self, image: Image.Image) -> None:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation)  # by which it is set upright
        except Exception:  # Pillow raises many kinds for a broken tag; `prepare` says what is wrong
            turned = "unreadable"
        palette = image.getpalette() if image.mode in ("P", "PA") else None
        self.add((image.mode, image.size, palette, image.info.get("transparency"), turned))
        try:
            self._put("pixels", image.tobytes())
        except (OSError, ValueError, SyntaxError):  # `prepare` says what is wrong with it
            self._put(
                "unreadable", str(getattr(image, "filename", "")).encode("utf-8", "surrogatepass")
            )

    def _walk(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, CodeType):
            self._code(value)
        elif isinstance(value, MethodType):
            self.add("method").add(value.__func__).add(value.__self__)
        elif isinstance(value, functools.partial):
            self.add("partial").add(value.func).add(value.args).add(value.keywords)
        elif isinstance(value, Mapping):
            self._put("mapping", str(len(value)).encode())
            for name, item in sorted(value.items(), key=lambda pair: repr(pair[0])):
                self.add(name).add(item)
        elif isinstance(value, list | tuple | np.ndarray):
            self._put("list" if isinstance(value, list) else "sequence", str(len(value)).encode())
            for item in value:
                self.add(item)
        elif isinstance(value, set | frozenset):
            self.add(sorted(digest(item) for item in value))
        elif dataclasses.is_dataclass(value):
            self.add(type(value))
            for field in dataclasses.fields(value):
                self.add(field.name).add(getattr(value, field.name))
        elif hasattr(value, "__dict__"):
            self.add(type(value)).add(vars(value))
            call = inspect.getattr_static(type(value), "__call__", None)
            if isinstance(call, FunctionType):
                self.add(call)
        else:
            self.add(type(value)).add(repr(value))

    def _function(self, function: FunctionType) -> None:
        """Its source, byte code, defaults, what it closes over, and the globals that it names."""
        package = (function.__module__ or "").partition(".")[0]
        ours = package == __name__.partition(".")[0]
        if ours:  # whatever it names, the version tells; not what it closes over (a hook's heads)
            self.add((function.__module__, function.__qualname__, source(function)))
            function = inspect.unwrap(function)  # (of what a type checker puts around it)
        else:
            self.add(source(function)).add(function.__code__)
        self.add(function.__defaults__).add(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError:  # a name that is not bound yet
                self.add("empty")
        if ours:
            return
        for name in sorted(_names(function.__code__)):
            held = function.__globals__.get(name)
            theirs = (getattr(held, "__module__", None) or "").partition(".")[0]
            if isinstance(held, FunctionType | type) and theirs != package:
                self.add((name, theirs, held.__qualname__))  # a library's, which its version tells
            elif name in function.__globals__:
                self.add(name).add(held)

    def _code(self, code: CodeType) -> None:
        self.add(code.co_code).add(code.co_names).add(code.co_varnames)
        self.add(list(code.co_consts))


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def digest(*values: Any) -> str:
    """The digest of these values."""
    total = Digest()
    for value in values:
        total.add(value)
    return total.hexdigest()


def source(function: Any) -> str | None:
    """The source of a function; None where there is none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def tensor_bytes(tensor: Tensor) -> bytes:
    """All bytes of a tensor, wherever it lies and whatever its dtype."""
    plain = tensor.detach()
    plain = plain.dequantize() if plain.is_quantized else plain
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    flat = plain.cpu().contiguous().flatten()
    return (
        (torch.view_as_real(flat) if flat.is_complex() else flat)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def file_digest(path: str | os.PathLike) -> str:
    """The digest of a file's bytes, computed once for each state of the file; its name if it cannot
    be read."""
    try:
        state = os.stat(path)
        return _file_digest(os.fspath(path), state.st_size, state.st_mtime_ns, state.st_ino)
    except (OSError, ValueError):  # `prepare` says what is wrong with it
        return f"no file {os.fspath(path)}"


@lru_cache(maxsize=100_000)
def _file_digest(path: str, size: int, changed: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:SHORT]
