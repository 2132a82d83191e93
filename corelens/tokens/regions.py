"""Regions: which pixels of which picture hold the evidence. Pure geometry in pixels of the ORIGINAL picture.

A pixel (column x, row y) occupies the square [x, x+1) × [y, y+1), so a picture of width W and height H spans
[0, W] × [0, H], and `Box(0, 0, W, H)` is all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from corelens.errors import CorelensError

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original picture


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
        if not (self.x1 > self.x0 and self.y1 > self.y0):
            raise CorelensError(
                f"{self} is empty", "x0 < x1 and y0 < y1", "give corners as x0, y0, x1, y1, or use Box.from_xywh"
            )

    @classmethod
    def from_xywh(cls, x: float, y: float, w: float, h: float, image: int = 0, text: str | None = None) -> "Box":
        """A box from its left top corner, width and height in pixels, as COCO writes them."""
        return cls(x, y, x + w, y + h, image, text)

    def check(self, width: int, height: int) -> None:
        """Raise if the box reaches beyond a picture of this size by more than one pixel (rounding is forgiven)."""
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
    """A region of any form: `mask[y, x]` is True where pixel (x, y) of the original picture belongs to it."""

    mask: np.ndarray
    image: int = 0
    text: str | None = None

    def __post_init__(self):
        mask = np.asarray(self.mask)
        if mask.ndim != 2 or mask.dtype != bool:
            raise CorelensError(
                f"a mask of shape {mask.shape} and dtype {mask.dtype}",
                "a boolean array [height, width]",
                "for a mask of numbers write mask > 0.5",
            )
        if not mask.any():
            raise CorelensError("a mask without a single True pixel", "a region of one pixel or more", "check the mask")
        object.__setattr__(self, "mask", mask)

    def check(self, width: int, height: int) -> None:
        """Raise unless the mask has exactly the picture's size."""
        if self.mask.shape != (height, width):
            raise CorelensError(
                f"a mask of {self.mask.shape[1]} × {self.mask.shape[0]} pixels on a picture of {width} × {height}",
                "a mask of the original picture's size",
                "resize the mask to the original picture, before any processor",
            )

    def covered(self, cell: Rect, frame: int | None = None) -> float:
        """The fraction of `cell` that the mask covers, 0 to 1; pixels on the edge of the cell count in part."""
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
        ys, xs = np.nonzero(self.mask)
        return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


@dataclass(frozen=True, eq=False)
class Tube:
    """A region in a video: one box a frame, `boxes[f]` in frame f of the sample's `video` list."""

    boxes: Mapping[int, Box]
    text: str | None = None
    image: int = 0

    def __post_init__(self):
        if not self.boxes:
            raise CorelensError("a tube without frames", "Tube({frame: Box(…), …})", "give one box or more")

    def check(self, width: int, height: int) -> None:
        """Raise if any box reaches beyond frames of this size."""
        for box in self.boxes.values():
            box.check(width, height)

    def covered(self, cell: Rect, frame: int | None = None) -> float:
        """The fraction of `cell` in frame `frame` that the tube covers, 0 to 1."""
        box = self.boxes.get(frame) if frame is not None else None
        return 0.0 if box is None else box.covered(cell)


Region = Box | Mask | Tube
