"""Reading pictures: what a Sample holds becomes upright RGB images, or an error that says which one
is broken.

Upright: turned by the EXIF tag of the file, as transformers does. RGB: transparent pictures are
laid on white, as the model authors' own pipelines do; 16 bits a channel are scaled to 8; numbers of
unknown range are refused.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from corelens.errors import CorelensError

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
UPRIGHT = (None, 1)  # values of the EXIF tag of orientation that leave a picture as it is
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Later:
    """A picture that is opened when a model reads it: a page of a PDF, a frame of a video, a row of
    a table.

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
        """Open it, turned upright unless its annotation counts in the picture as stored; raise for
        another size."""
        stored = self.open()
        image = upright(stored)
        if self.size is None or image.size == self.size:
            return to_rgb(image)
        if stored.size == self.size:
            return to_rgb(stored)
        raise CorelensError(
            f"{self}, a picture of {stored.size[0]} × {stored.size[1]} pixels",
            f"{self.size[0]} × {self.size[1]} pixels, as its annotation says",
            "use the file that the data set publishes, neither resized nor turned",
        )


def upright(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: turned by its EXIF tag, if it has one that says so."""
    return image if image.getexif().get(ORIENTATION) in UPRIGHT else ImageOps.exif_transpose(image)


def to_rgb(image: Image.Image, sixteen_bits: bool = False) -> Image.Image:
    """The picture in 8-bit RGB, what is transparent laid on white.

    Args:
        sixteen_bits: numbers of mode "I" are of 16 bits (as older versions of Pillow open 16-bit
            PNG files).

    Errors: numbers whose range is not known (32-bit integers, floats).
    """
    if 0 in image.size:
        raise CorelensError(
            f"a picture of {image.width} × {image.height} pixels",
            "a pixel or more",
            "check how it was cut",
        )
    if image.mode in SIXTEEN_BITS or (image.mode == "I" and sixteen_bits):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        numbers = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise CorelensError(
            f"a picture of {numbers} (mode {image.mode!r})",
            "8 or 16 bits a channel: which number is white is otherwise not known",
            "scale it yourself: Image.fromarray((numbers / white * 255).clip(0, "
            "255).astype('uint8'))",
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def read_picture(picture: Any, where: str) -> Image.Image:
    """An RGB image from a PIL image, a path, a Later or an array [height, width(, 3 or 4)] of uint8
    or uint16.

    Files and opened files are turned upright by their EXIF tag, as transformers does: boxes count
    in the picture that a viewer shows. See `to_rgb` for transparent and 16-bit pictures.
    """
    try:
        if isinstance(picture, Image.Image):
            return _read(picture)
        if isinstance(picture, Later):
            where = f"{where} ({picture})"
            return picture.read()
        if isinstance(picture, (str, os.PathLike)):
            check_file(picture, where)
            with Image.open(picture) as file:
                return _read(file)
        array = np.asarray(picture)
        if array.dtype in (np.uint8, np.uint16) and (
            array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
        ):
            return to_rgb(Image.fromarray(array if array.dtype == np.uint8 else _eight_bits(array)))
    except CorelensError as error:
        if error.given.startswith(where):
            raise
        raise CorelensError(f"{where}: {error.given}", error.expected, error.do) from error
    # PIL raises OSError, SyntaxError, ValueError and struct.error for broken files
    except Exception as error:
        raise cannot_be_read(where, error) from error
    raise CorelensError(
        f"{where} is of type {type(picture).__name__}"
        + (f", {array.dtype} {array.shape}" if array.ndim else ""),
        "a PIL image, the path of an image file, or a uint8 array [height, width, 3]",
        "convert it first",
    )


def read_video(frames: Any, where: str) -> list[Image.Image]:
    """The frames of a video, all of one size."""
    if (
        isinstance(frames, (str, os.PathLike))
        or not isinstance(frames, (Sequence, np.ndarray))
        or len(frames) == 0
    ):
        raise CorelensError(
            f"{where} is {type(frames).__name__} {str(frames)[:60]!r}",
            "a list of frames (PIL images, paths or uint8 arrays), or one array [frame, height, "
            "width, 3]",
            "decode the video first and choose its frames: regions count in these frames",
        )
    images = [
        read_picture(frame, f"{where}, frame {number}") for number, frame in enumerate(frames)
    ]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise CorelensError(
            f"{where} has frames of sizes {sorted(sizes)}",
            "frames of one size",
            "resize the frames",
        )
    return images


def read_mask(path: str | Path, where: str) -> np.ndarray:
    """A boolean array [height, width] from a picture file: True where it is not black."""
    check_file(path, where)
    try:
        with Image.open(path) as file:
            return np.asarray(upright(file).convert("L")) > 0
    except Exception as error:  # as in read_picture
        raise cannot_be_read(where, error) from error


def check_file(path: Any, where: str) -> None:
    """Raise for an address, and for a path at which no file is."""
    if str(path).startswith(("http:", "https:", "data:")):
        raise CorelensError(
            f"{where} is the address {str(path)[:60]!r}",
            "a file, a PIL image or an array",
            "fetch it first",
        )
    if not os.path.exists(path):
        raise CorelensError(
            f"{where}: there is no such file: {str(path)!r}",
            "the path of an image file",
            f"check the path; one that is not absolute counts from {Path.cwd()}",
        )


def cannot_be_read(where: str, error: Exception) -> CorelensError:
    """What to tell of a file that PIL refuses."""
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return CorelensError(
            f"{where} cannot be read: {error}",
            f"at most {limit:,} pixels, Pillow's limit against files that unpack to fill the "
            "memory",
            "make it smaller; if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS",
        )
    return CorelensError(
        f"{where} cannot be read: {type(error).__name__}: {error}",
        "a whole image file of a format that PIL reads",
        "open it in a viewer; a download may have been cut off",
    )


def _read(image: Image.Image) -> Image.Image:
    return to_rgb(upright(image), sixteen_bits=image.format == "PNG")


def _eight_bits(numbers: np.ndarray) -> np.ndarray:
    """16-bit numbers scaled to 8 bits, rounded: 65535 is white."""
    return ((numbers.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
