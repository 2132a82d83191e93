"""Reading pictures: what a Sample holds becomes upright RGB images, or an error that says which one is broken."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from corelens.errors import CorelensError


def read_picture(picture: Any, where: str) -> Image.Image:
    """An RGB image from a PIL image, a path or an array [height, width(, 3)] of uint8.

    Files are turned upright by their EXIF tag, as transformers does: boxes count in the picture a viewer shows.
    """
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
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
