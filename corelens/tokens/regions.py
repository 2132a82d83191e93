"""Regions: which pixels of which picture, or which seconds of which sound, hold the evidence. Pure
geometry in pixels of the ORIGINAL picture.

A pixel (column x, row y) occupies the square [x, x+1) × [y, y+1), so a picture of width W and
height H spans [0, W] × [0, H], and `Box(0, 0, W, H)` is all of it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, SupportsIndex

import numpy as np

from corelens.errors import CorelensError

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original picture


def no_region(sample: str) -> CorelensError:
    """The error of an analysis of the evidence when the sample of this id says no region."""
    return CorelensError(
        f"sample {sample!r} without a region",
        "a sample that says where the evidence is",
        "Sample(regions=[Box(x0, y0, x1, y1)]) in pixels of the original picture",
    )


@dataclass(frozen=True)
class Box:
    """An axis-aligned box [x0, x1) × [y0, y1) in pixels of the original picture.

    Args:
        x0, y0, x1, y1: left, top, right, bottom edge in pixels; may be fractions.
        image: which of the sample's images (or pages) it lies in.
        text: the text that stands in the box, for scores that compare it with what is generated.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    image: int = 0
    text: str | None = None

    def __post_init__(self):
        edges = self.x0, self.y0, self.x1, self.y1
        if not all(isinstance(edge, Real) and math.isfinite(edge) for edge in edges):
            raise CorelensError(
                f"Box{edges}", "four finite numbers x0, y0, x1, y1", "give corners in pixels"
            )
        _check_picture(self)
        if not (self.x1 > self.x0 and self.y1 > self.y0):
            raise CorelensError(
                f"{self} is empty",
                "x0 < x1 and y0 < y1",
                "give corners as x0, y0, x1, y1, or use Box.from_xywh",
            )

    @classmethod
    def from_xywh(
        cls, x: float, y: float, w: float, h: float, image: int = 0, text: str | None = None
    ) -> "Box":
        """A box from its left top corner, width and height in pixels, as COCO writes them."""
        return cls(x, y, x + w, y + h, image, text)

    def check(self, width: int, height: int) -> None:
        """Raise if the box reaches beyond a picture of this size by more than one pixel (rounding
        is forgiven), or lies within its first pixel: then its corners are fractions."""
        if max(self.x1, self.y1) <= 1 < min(width, height):
            raise CorelensError(
                f"{self} lies within the first pixel of a picture of {width} × {height}",
                "a box in pixels",
                f"if these are fractions of the picture: Box({self.x0 * width:g}, "
                f"{self.y0 * height:g}, {self.x1 * width:g}, {self.y1 * height:g})",
            )
        if self.x0 < -1 or self.y0 < -1 or self.x1 > width + 1 or self.y1 > height + 1:
            raise CorelensError(
                f"{self} reaches outside its picture of {width} × {height} pixels",
                "a box inside the picture",
                "give boxes in pixels of the original picture, before any resizing",
            )

    def covered(self, cell: Rect, frame: int | None = None) -> float:
        """The fraction of `cell` that the box covers, 0 to 1."""
        width = min(self.x1, cell[2]) - max(self.x0, cell[0])
        height = min(self.y1, cell[3]) - max(self.y0, cell[1])
        if width <= 0 or height <= 0:
            return 0.0
        return width * height / ((cell[2] - cell[0]) * (cell[3] - cell[1]))

    @property
    def bounds(self) -> Rect:
        """The smallest box around the region: x0, y0, x1, y1."""
        return self.x0, self.y0, self.x1, self.y1


@dataclass(frozen=True, eq=False)
class Mask:
    """A region of any form: `mask[y, x]` is True where pixel (x, y) of the original picture belongs
    to it."""

    mask: np.ndarray
    image: int = 0
    text: str | None = None

    def __post_init__(self):
        _check_picture(self)
        mask = np.asarray(self.mask)
        if mask.ndim != 2 or mask.dtype != bool:
            raise CorelensError(
                f"a mask of shape {mask.shape} and dtype {mask.dtype}",
                "a boolean array [height, width]",
                "for a mask of numbers write mask > 0.5",
            )
        if not mask.any():
            raise CorelensError(
                "a mask without a single True pixel",
                "a region of one pixel or more",
                "check the mask",
            )
        object.__setattr__(self, "mask", mask)

    def check(self, width: int, height: int) -> None:
        """Raise unless the mask has exactly the picture's size."""
        if self.mask.shape != (height, width):
            raise CorelensError(
                f"a mask of {self.mask.shape[1]} × {self.mask.shape[0]} pixels on a picture of "
                f"{width} × {height}",
                "a mask of the original picture's size",
                "resize the mask to the original picture, before any processor",
            )

    def covered(self, cell: Rect, frame: int | None = None) -> float:
        """The fraction of `cell` that the mask covers, 0 to 1; pixels on the edge of the cell count
        in part."""
        x0, y0, x1, y1 = cell
        left, top = max(int(np.floor(x0)), 0), max(int(np.floor(y0)), 0)
        part = self.mask[top : max(int(np.ceil(y1)), 0), left : max(int(np.ceil(x1)), 0)]
        if not part.any():
            return 0.0
        xs, ys = left + np.arange(part.shape[1]), top + np.arange(part.shape[0])
        wx = np.minimum(xs + 1, x1) - np.maximum(xs, x0)
        wy = np.minimum(ys + 1, y1) - np.maximum(ys, y0)
        return float(wy @ part @ wx / ((x1 - x0) * (y1 - y0)))

    @property
    def bounds(self) -> Rect:
        """The smallest box around the region: x0, y0, x1, y1."""
        ys, xs = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


@dataclass(frozen=True, eq=False)
class Tube:
    """A region in a video: one box a frame, `boxes[f]` in frame f of the sample's `video` list.

    Args:
        boxes: {frame: Box}; four numbers x0, y0, x1, y1 mean a Box.
        text: the text that stands in it.
        image: which of the sample's videos it lies in.
    """

    boxes: Mapping[int, Any]
    text: str | None = None
    image: int = 0

    def __post_init__(self):
        _check_picture(self)
        if not isinstance(self.boxes, Mapping) or not self.boxes:
            received = (
                "a tube without frames"
                if not self.boxes
                else f"a tube of a {type(self.boxes).__name__}"
            )
            raise CorelensError(received, "Tube({frame: Box(…), …})", "give one box or more")
        boxes = {frame: as_region(box) for frame, box in self.boxes.items()}
        for frame, box in boxes.items():
            if isinstance(frame, bool) or not isinstance(frame, Integral):
                raise CorelensError(
                    f"a tube with the frame {frame!r}",
                    "whole numbers from 0",
                    "count the video's frames",
                )
            if not isinstance(box, Box):
                raise CorelensError(
                    f"a tube with a {type(box).__name__} in frame {frame}",
                    "a Box a frame",
                    "give its bounds: Box(*mask.bounds)",
                )
            if box.image not in (0, self.image):
                raise CorelensError(
                    f"a tube in video {self.image}, with a box on image {box.image} in frame "
                    f"{frame}",
                    "boxes without image=: they lie in the tube's own frames",
                    "leave image= out of the boxes; a sample's second video is Tube(…, image=1)",
                )
        object.__setattr__(self, "boxes", boxes)

    def check(self, width: int, height: int) -> None:
        """Raise if any box reaches beyond frames of this size."""
        for box in self.boxes.values():
            box.check(width, height)

    def covered(self, cell: Rect, frame: int | None = None) -> float:
        """The fraction of `cell` in frame `frame` that the tube covers, 0 to 1."""
        box = self.boxes.get(frame) if frame is not None else None
        return 0.0 if box is None else box.covered(cell)


@dataclass(frozen=True)
class Span:
    """A stretch [start, end) of a sound, in seconds from its beginning.

    Args:
        start, end: in seconds; may be fractions.
        audio: which of the sample's sounds it lies in.
        text: what is said there, for scores that compare it with what is generated.
    """

    start: float
    end: float
    audio: int = 0
    text: str | None = None

    def __post_init__(self):
        if not all(isinstance(x, Real) and math.isfinite(x) for x in (self.start, self.end)):
            raise CorelensError(
                f"Span({self.start}, {self.end})",
                "two finite numbers",
                "give start and end in seconds",
            )
        _check_picture(self)
        if not self.end > self.start:
            raise CorelensError(f"{self} is empty", "start < end", "give start and end in seconds")

    @property
    def image(self) -> int:
        """Which of the sample's sounds it lies in, under the name that all regions have."""
        return self.audio

    @property
    def bounds(self) -> tuple[float, float]:
        """Start and end in seconds."""
        return self.start, self.end

    def check(self, seconds: float) -> None:
        """Raise if the span reaches beyond a sound of this length by more than 10 ms (rounding is
        forgiven)."""
        if self.start < 0 or self.end > seconds + 0.01:
            raise CorelensError(
                f"{self} reaches outside its sound of {seconds:.3f} seconds",
                "a span inside the sound",
                "give seconds from the beginning of the sound, not samples",
            )


Shape = Box | Mask | Tube  # of a picture or video
Region = Shape | Span


def as_region(region: Any) -> Region:
    """A region as it was given, or the Box that four numbers x0, y0, x1, y1 mean.

    Errors: anything else.
    """
    if isinstance(region, Region):
        return region
    if is_corners(region):
        return Box(*(number.item() if hasattr(number, "item") else number for number in region))
    raise CorelensError(
        f"the region {str(region)[:60]!r}, a {type(region).__name__}",
        "a Box, Mask, Tube or Span, or four numbers x0, y0, x1, y1 in pixels of the original "
        "picture",
        "for COCO's x, y, width, height use Box.from_xywh; for an array of True and False use Mask",
    )


class Regions(list[Any]):
    """A sample's regions: a list that reads whatever is put into it as a region (`as_region`)."""

    def __init__(self, regions: Iterable[Any] = ()):
        super().__init__(map(as_region, regions))

    def __setitem__(self, place: SupportsIndex | slice, value: Any) -> None:
        """`regions[0] = (x0, y0, x1, y1)`."""
        if isinstance(place, slice):
            super().__setitem__(place, [as_region(region) for region in value])
        else:
            super().__setitem__(place, as_region(value))

    def __iadd__(self, regions: Iterable[Any]) -> "Regions":  # type: ignore[misc]
        """`regions += [(x0, y0, x1, y1)]`."""
        self.extend(regions)
        return self

    def append(self, region: Any) -> None:
        """Add one region."""
        super().append(as_region(region))

    def extend(self, regions: Iterable[Any]) -> None:
        """Add several regions."""
        super().extend([as_region(region) for region in regions])

    def insert(self, place: SupportsIndex, region: Any) -> None:
        """Add one region at this place."""
        super().insert(place, as_region(region))


def is_corners(region: Any) -> bool:
    """Whether this is a list, tuple or array of four numbers."""
    if isinstance(region, str | Mapping) or not hasattr(region, "__len__") or len(region) != 4:
        return False
    return all(isinstance(n, Real) or getattr(n, "shape", None) == () for n in region)


def _check_picture(region: Any) -> None:
    if isinstance(region.image, bool) or not isinstance(region.image, Integral):
        raise CorelensError(
            f"a {type(region).__name__} with image={region.image!r}",
            "a whole number",
            "count the sample's pictures from 0",
        )
