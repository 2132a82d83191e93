"""Frames of video files, decoded when a model reads them (PyAV; `pip install 'corelens[data]'`).

A frame's number is its place in decoding order, from 0, which is how annotations of videos count.
"""

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from corelens.data.files import package
from corelens.errors import CorelensError
from corelens.inputs.pictures import Later

ROUNDED = 1e-3  # seconds by which times of frames and of annotations may differ


def by_number(file: Path, numbers: Sequence[int], size: tuple[int, int] | None = None) -> list[Any]:
    """These frames of a video. Decoding starts at the first frame: exact, and quick for videos of
    minutes."""
    wanted = tuple(numbers)
    part = partial(_frame, _decoded_by_number, str(file), wanted)
    return [
        Later(str(file), f"frame {number}", partial(part, i), size)
        for i, number in enumerate(wanted)
    ]


def by_time(file: Path, seconds: Sequence[float]) -> list[Any]:
    """The frames shown at these times. Decoding starts at the key frame before each: quick for
    videos of hours."""
    wanted = tuple(seconds)
    part = partial(_frame, _decoded_by_time, str(file), wanted)
    return [
        Later(str(file), f"second {second:.2f}", partial(part, i))
        for i, second in enumerate(wanted)
    ]


def length(file: Path) -> float:
    """How many seconds a video lasts, as its container says."""
    with _open(str(file)) as container:
        stream = container.streams.video[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return container.duration / 1_000_000  # (containers count microseconds)
    raise CorelensError(
        f"{file}, a video that does not say how long it is",
        "a video with its duration",
        "write it anew (ffmpeg -i in.mp4 -c copy out.mp4)",
    )


def middles(count: int, start: float, stop: float) -> list[float]:
    """The middles of `count` equal parts of the stretch from start to stop."""
    step = (stop - start) / count
    return [start + step * (i + 0.5) for i in range(count)]


def _frame(decode: Any, file: str, wanted: tuple[Any, ...], i: int) -> Image.Image:
    return decode(file, wanted)[i]


@lru_cache(maxsize=2)  # a sample's frames are read one after the other, and decoded together
def _decoded_by_number(file: str, numbers: tuple[int, ...]) -> list[Image.Image]:
    frames_read: dict[int, Image.Image] = {}
    wanted, number = set(numbers), -1
    with _open(file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames_read[number] = frame.to_image()
            if number >= max(wanted):
                break
    if missing := wanted - frames_read.keys():
        raise CorelensError(
            f"{file}, a video of {number + 1} frames, asked for frame {min(missing)}",
            "the video that the annotation was made on",
            "get the file again; it may have been cut off or encoded anew",
        )
    return [frames_read[number] for number in numbers]


@lru_cache(maxsize=2)
def _decoded_by_time(file: str, seconds: tuple[float, ...]) -> list[Image.Image]:
    frames_read: list[Image.Image] = []
    with _open(file) as container:
        stream = container.streams.video[0]
        first = float((stream.start_time or 0) * stream.time_base)
        for second in seconds:
            container.seek(int((first + second) / stream.time_base), stream=stream)
            last = None
            for frame in container.decode(stream):
                if (
                    last is not None
                    and frame.time is not None
                    and frame.time - first > second + ROUNDED
                ):
                    break  # the frame before is the one shown at that time
                last = frame
            if last is None:
                raise CorelensError(
                    f"{file}, a video without a frame at second {second:.2f}",
                    "a video as long as its annotation says",
                    "get the file again; it may have been cut off",
                )
            frames_read.append(last.to_image())
    return frames_read


def _open(file: str) -> Any:
    av = package("av", f"{file}, a video", lambda: __import__("av"))
    try:
        container = av.open(file)
    except (av.FFmpegError, OSError) as error:
        raise CorelensError(
            f"{file}, which cannot be opened ({error})", "a whole video file", "get the file again"
        ) from error
    if not container.streams.video:
        container.close()
        raise CorelensError(
            f"{file}, a file without a video stream", "a video", "get the file again"
        )
    container.streams.video[0].thread_type = "AUTO"
    return container
