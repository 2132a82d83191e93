"""Reading pictures: what a Sample holds becomes upright RGB images, or an error that says which one is broken."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from corelens.errors import CorelensError


@dataclass(frozen=True)
class Later:
    """A picture that is opened when a model reads it: a page of a PDF, a frame of a video, a row of a table.

    Args:
        file: the file that it stands in.
        part: where in the file, for messages; file and part together name the picture.
        open: returns the picture.
        size: its width and height in pixels, if known before it is opened; it must then be so.
        broken: why it cannot be read, if that is known already.
    """

    file: str
    part: str
    open: Callable[[], Image.Image]
    size: tuple[int, int] | None = None
    broken: str | None = None

    def __str__(self) -> str:
        return f"{self.file}, {self.part}"

    def read(self) -> Image.Image:
        """Open it; raise if it has not the size that was said (regions are in these pixels)."""
        image = self.open()
        if self.size is not None and image.size != self.size:
            raise CorelensError(
                f"{self}, a picture of {image.size[0]} × {image.size[1]} pixels",
                f"{self.size[0]} × {self.size[1]} pixels, as its annotation says",
                "use the file that the data set publishes, neither resized nor turned",
            )
        return image.convert("RGB")


def read_picture(picture: Any, where: str) -> Image.Image:
    """An RGB image from a PIL image, a path, a Later or an array [height, width(, 3)] of uint8.

    Files are turned upright by their EXIF tag, as transformers does: boxes count in the picture a viewer shows.
    """
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        if isinstance(picture, Later):
            where = f"{where} ({picture})"
            return picture.read()
        if isinstance(picture, (str, os.PathLike)):
            if str(picture).startswith(("http:", "https:", "data:")):
                raise CorelensError(
                    f"{where} is the address {str(picture)[:60]!r}", "a file, a PIL image or an array", "fetch it first"
                )
            with Image.open(picture) as file:
                return ImageOps.exif_transpose(file).convert("RGB")
        array = np.asarray(picture)
        if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
            return Image.fromarray(array).convert("RGB")
    except CorelensError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and struct.error for broken files
        raise CorelensError(
            f"{where} cannot be read: {type(error).__name__}: {error}",
            "a whole image file of a format that PIL reads",
            "open it in a viewer; a download may have been cut off",
        ) from error
    raise CorelensError(
        f"{where} is of type {type(picture).__name__}" + (f", {array.dtype} {array.shape}" if array.ndim else ""),
        "a PIL image, the path of an image file, or a uint8 array [height, width, 3]",
        "convert it first",
    )


def read_video(frames: Any, where: str) -> list[Image.Image]:
    """The frames of a video, all of one size."""
    if isinstance(frames, (str, os.PathLike)) or not isinstance(frames, (Sequence, np.ndarray)) or len(frames) == 0:
        raise CorelensError(
            f"{where} is {type(frames).__name__} {str(frames)[:60]!r}",
            "a list of frames (PIL images, paths or uint8 arrays), or one array [frame, height, width, 3]",
            "decode the video first and choose its frames: regions count in these frames",
        )
    images = [read_picture(frame, f"{where}, frame {number}") for number, frame in enumerate(frames)]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise CorelensError(f"{where} has frames of sizes {sorted(sizes)}", "frames of one size", "resize the frames")
    return images
