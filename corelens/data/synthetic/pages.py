"""A page of the world `doc`: what stands on it, and how it is painted."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.fonts import font
from corelens.tokens.regions import Box

MARGIN = 8  # pixels: the paper's edge
FOOT = 14  # font size of the page's number, in pixels
_PAD = 2  # pixels of paper around a line's ink that belong to its region


@dataclass(frozen=True)
class Line:
    """A key and its value; `x`: the left edge, `y`: the baseline, `gap`: between key and value; all
    in pixels."""

    key: str
    value: str
    x: int
    y: int
    gap: int
    size: int

    @property
    def words(self) -> list[tuple[str, int]]:
        """What is written, each word with its left edge in pixels."""
        return [
            (self.key, self.x),
            (self.value, self.x + round(font(self.size).getlength(self.key)) + self.gap),
        ]

    @property
    def box(self) -> Box:
        """The box around the line's ink and two pixels of paper, in pixels of the page."""
        corners = np.array([_ink(word, x, self.y, self.size) for word, x in self.words if word])
        x0, y0 = corners[:, :2].min(0) - _PAD
        x1, y1 = corners[:, 2:].max(0) + _PAD
        return Box(float(x0), float(y0), float(x1), float(y1))


@dataclass(frozen=True)
class Page:
    """One page; `heading_x`: the heading's left edge, `heading_y`: its baseline, `bars`: x0, y0,
    x1, y1; in pixels."""

    width: int
    height: int
    number: int
    heading: str
    heading_x: int
    heading_y: int
    heading_size: int
    lines: tuple[Line, ...]
    bars: tuple[tuple[int, int, int, int], ...]
    paper: tuple[int, int, int]
    ink: tuple[int, int, int]


def paint(page: Page) -> Image.Image:
    """The picture of a page."""
    image = Image.new("RGB", (page.width, page.height), page.paper)
    draw = ImageDraw.Draw(image)
    grey = _shade(page.paper, 0.82)
    for bar in page.bars:
        draw.rectangle(bar, fill=grey)
    rule = page.heading_y + 7
    draw.text(
        (page.heading_x, page.heading_y),
        page.heading,
        fill=page.ink,
        font=font(page.heading_size),
        anchor="ls",
    )
    draw.line((MARGIN, rule, page.width - MARGIN, rule), fill=_shade(page.paper, 0.6))
    for line in page.lines:
        for word, x in line.words:
            draw.text((x, line.y), word, fill=page.ink, font=font(line.size), anchor="ls")
    foot = (page.width / 2, page.height - MARGIN)
    draw.text(
        foot, f"Page {page.number + 1}", fill=_shade(page.paper, 0.4), font=font(FOOT), anchor="ms"
    )
    return image


# --- inside


def _ink(word: str, x: int, y: int, size: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = font(size).getbbox(word, anchor="ls")
    return x + int(np.floor(x0)), y + int(np.floor(y0)), x + int(np.ceil(x1)), y + int(np.ceil(y1))


def _shade(colour: tuple[int, int, int], by: float) -> tuple[int, int, int]:
    return int(colour[0] * by), int(colour[1] * by), int(colour[2] * by)
