"""What is said of one picture or video beside its pixels: its frame rate, which frames it holds,
its size, its limits.

A chat message says it in the part that holds the picture, in the words of transformers and
qwen-vl-utils: {"type": "video", "video": frames, "fps": 2.0}. Every picture keeps what is said of
it; what cannot be used is refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from corelens.errors import CorelensError

# what a part is, and where its picture is
PLACES = ("type", "text", "image", "video", "audio", "path", "url")
SIZES = ("resized_height", "resized_width")
LIMITS = ("min_pixels", "max_pixels")
RATES = ("fps", "sample_fps", "raw_fps", "frames_indices", "video_metadata")
KNOWN = {
    "image": (*LIMITS, *SIZES),
    "video": (*RATES, *LIMITS, *SIZES),
    "audio": ("sampling_rate",),
}


@dataclass(frozen=True)
class Medium:
    """One picture, video or sound of a prompt.

    Args:
        kind: "image", "video" or "audio".
        picture: as it was given.
        fps: frames a second: of the frames given, or with `indices` of the file they come from;
            None if not said.
        indices: which frames of the file these are; None if not said.
        size: width and height to which it is resized before the processor sees it.
        limits: fewest and most pixels that the processor may make of it (of each frame of a video),
            each None if not said.
    """

    kind: str
    picture: Any
    fps: float | None = None
    indices: tuple[int, ...] | None = None
    size: tuple[int, int] | None = None
    limits: tuple[int | None, int | None] = (None, None)

    def seen(self, picture: Any) -> Any:
        """The image, or the frames, at the size at which the processor is to see it."""
        if self.size is None:
            return picture
        if isinstance(picture, list):
            return [frame.resize(self.size, Image.Resampling.BICUBIC) for frame in picture]
        return picture.resize(self.size, Image.Resampling.BICUBIC)


def medium(kind: str, picture: Any, part: Mapping[str, Any], fps: Any, where: str) -> Medium:
    """The picture of a message's part, with what the part says of it.

    Args:
        kind: "image", "video" or "audio".
        part: the part of the message; entries that are None say nothing.
        fps: the frame rate that the sample names, for a video whose part names none.
        where: which picture this is, for messages.

    Errors: a word that is not known, a value that it cannot have, two rates that contradict each
    other.
    """
    words = {
        name: value for name, value in part.items() if value is not None and name not in PLACES
    }
    unknown = [name for name in words if name not in KNOWN[kind]]
    if unknown:
        raise CorelensError(
            f"{where}: its message says {unknown[0]}={words[unknown[0]]!r}, which is not used",
            f"beside the {kind} one of {', '.join(KNOWN[kind])}",
            "leave it out; frames are chosen, and pictures cut, before they go into a sample",
        )
    if kind == "audio":
        rate = words.get("sampling_rate")
        return Medium(kind, picture if rate is None else (picture, rate))
    size = None
    if any(name in words for name in SIZES):
        height, width = (_whole(words.get(name), name, where) for name in SIZES)
        size = width, height
    least, most = (_whole(words[name], name, where) if name in words else None for name in LIMITS)
    if kind == "image":
        return Medium(kind, picture, size=size, limits=(least, most))
    rate, indices = _rate(words, where)
    if rate is None and fps is not None:
        rate = _positive(fps, "meta['fps']", where)
    return Medium(kind, picture, rate, indices, size, (least, most))


def _rate(words: dict[str, Any], where: str) -> tuple[float | None, tuple[int, ...] | None]:
    """Frames a second and frame numbers, from whichever words say them."""
    metadata = words.get("video_metadata") or {}
    if not isinstance(metadata, Mapping):
        metadata = vars(metadata)
    words = {
        name: metadata[name] for name in ("fps", "frames_indices") if metadata.get(name) is not None
    } | words
    rates = {name: _positive(words[name], name, where) for name in RATES[:3] if name in words}
    if "frames_indices" in words:
        indices = words["frames_indices"]
        indices = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        whole = all(isinstance(index, int | np.integer) and index >= 0 for index in indices)
        if not whole or any(b < a for a, b in pairwise(indices)):
            raise CorelensError(
                f"{where}: frames_indices={indices[:8]}",
                "ascending whole numbers from 0",
                "count frames",
            )
        rate = rates.get("raw_fps", rates.get("fps"))
        if rate is None:
            raise CorelensError(
                f"{where}: frames_indices without the frame rate of the file they count in",
                "fps (or raw_fps) beside them",
                "say the file's frames a second",
            )
        return rate, tuple(indices)
    rate = rates.get("sample_fps", rates.get("fps"))
    if rate is None and "raw_fps" in rates:
        raise CorelensError(
            f"{where}: raw_fps={rates['raw_fps']} alone, the rate of the file",
            "sample_fps, the rate of these frames, or frames_indices beside it",
            "say how many of the frames given make a second",
        )
    if "fps" in rates and rate != rates["fps"] and "raw_fps" not in rates:
        raise CorelensError(
            f"{where}: fps={rates['fps']} and sample_fps={rate}",
            "one frame rate, that of the frames given",
            "leave one out; the rate of the file is raw_fps",
        )
    return rate, None


def _positive(value: Any, name: str, where: str) -> float:
    if (
        isinstance(value, int | float | np.number)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    ):
        return float(value)
    raise CorelensError(
        f"{where}: {name}={value!r}",
        "frames a second, a number above 0",
        "say the rate of the frames given",
    )


def _whole(value: Any, name: str, where: str) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool) and value > 0:
        return int(value)
    raise CorelensError(
        f"{where}: {name}={value!r}",
        "a whole number of pixels above 0; resized_height and resized_width together",
        "say both, or neither",
    )
