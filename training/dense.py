"""Dense labels: what stands at every visual token, for training a vision tower alone.

Of scenes of the worlds, and of sheets full of symbols, which teach reading anywhere with many
examples a picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.doc import KEYS
from corelens.data.synthetic.drawing import DIGITS, LETTERS, Figure
from corelens.data.synthetic.fonts import font
from corelens.data.synthetic.pages import Page
from corelens.data.synthetic.refer import COLOURS, KINDS, Shape
from corelens.data.synthetic.refer_hard import SIZES, size_of
from corelens.data.synthetic.video import Scene as Clip
from corelens.tokens.cells import Cells

LABELS = {
    "colour": len(COLOURS),
    "kind": len(KINDS),
    "digit": 10,
    "key": len(KEYS),
    "tens": 10,
    "ones": 10,
}
_PLACES = 8  # columns and rows that a picture is divided into
LABELS |= {"letter": len(LETTERS), "size": len(SIZES), "column": _PLACES, "row": _PLACES}
"""Label → how many values it has; one label more means "none"."""
IGNORED = -100
_NONE = np.array(list(LABELS.values()))
_OF_SHAPES, _OF_LINES, _OF_FIGURES = slice(0, 3), slice(3, 6), [0, 1, 2, 6, 7]  # columns
_OF_SYMBOLS, _OF_PLACES = [2, 6], slice(8, 10)
# of a token's side: from an object's centre to a token's centre, to the corner of four tokens at
# most
_REACH = 23 / 32
_FILLED = 0.6  # of a sheet's tokens
# pixels: half a digit's ground, between two digits, font sizes of a sheet
_HALF, _APART, _FONTS = 15, 24, (16, 26)


def shape_labels(shapes: list[Shape], cells: Cells) -> np.ndarray:
    """[tokens, labels]: colour, kind and digit (10: none) of the shape centred within reach of a
    token, else "none"."""
    places = np.array([[shape.x, shape.y] for shape in shapes])
    names = np.array(
        [[list(COLOURS).index(s.colour), KINDS.index(s.kind), s.digit] for s in shapes]
    )
    return _nearest(places, names, cells, _OF_SHAPES)


def figure_labels(figures: Sequence[Figure], cells: Cells) -> np.ndarray:
    """[tokens, labels] as of `shape_labels`, with letters (or "none"), sizes and places."""
    places = np.array([[f.x, f.y] for f in figures])
    names = [
        [
            list(COLOURS).index(f.colour),
            KINDS.index(f.kind),
            *_digit_or_letter(f.symbol),
            list(SIZES).index(size_of(f)),
        ]
        for f in figures
    ]
    return _placed(_nearest(places, np.array(names), cells, _OF_FIGURES), cells)


def clip_labels(scene: Clip, cells: Cells) -> np.ndarray:
    """[tokens, labels] of a clip's pairs of frames, one after the other; `cells`: of one frame. A
    shape's place is the mean of its two; its digit is "none" where neither frame shows it."""
    labels = []
    for first in range(0, scene.frames, 2):
        shapes = []
        for actor in scene.actors:
            a, b = actor.at(first), actor.at(first + 1)
            digit = int(a.symbol or b.symbol or 10)
            shapes.append(
                Shape(a.colour, a.kind, digit, (a.x + b.x) / 2, (a.y + b.y) / 2, a.radius)
            )
        labels.append(shape_labels(shapes, cells))
    return np.concatenate(labels)


def page_labels(page: Page, cells: Cells) -> np.ndarray:
    """[tokens, labels]: key and both digits of the line (of two-digit values) that a token lies on,
    else "none"; and its place."""
    labels = _unsaid(cells)
    labels[:, _OF_LINES] = np.where(cells.visual.numpy()[:, None], _NONE[_OF_LINES], IGNORED)
    x, y, side = _centres(cells)
    best = np.full(len(labels), np.inf)
    for line in page.lines:
        x0, y0, x1, y1 = line.box.bounds
        beside, off = np.maximum(0, np.maximum(x0 - x, x - x1)), np.abs(y - (y0 + y1) / 2)
        near = (
            (beside <= side / 8)
            & (off <= side * 0.54)
            & (beside + off < best)
            & cells.visual.numpy()
        )
        best[near] = (beside + off)[near]
        labels[near, _OF_LINES] = [KEYS.index(line.key), int(line.value[0]), int(line.value[1])]
    return _placed(labels, cells)


def sheet(
    rng: np.random.Generator, width: int, height: int, jitter: float, cells: Cells
) -> tuple[Any, np.ndarray]:
    """A sheet of digits and letters in many inks and sizes, at most one a token, off its centre by
    up to 2 × `jitter` pixels each way; and its labels (symbols and places alone)."""
    image = Image.new("RGB", (width, height), _ink(rng))
    draw = ImageDraw.Draw(image)
    x, y, _ = _centres(cells)
    spots = np.stack([x, y], -1) + np.round(rng.uniform(-2 * jitter, 2 * jitter, (len(x), 2)))
    places, symbols = np.zeros((0, 2)), []
    drawn = [(DIGITS + LETTERS)[i] for i in rng.integers(0, len(DIGITS + LETTERS), len(x))]
    for centre, symbol in zip(spots[rng.random(len(x)) < _FILLED], drawn, strict=False):
        if (np.abs(places - centre).max(1) < _APART).any():
            continue
        ground = _ink(rng)
        draw.rectangle(
            (centre[0] - _HALF, centre[1] - _HALF, centre[0] + _HALF, centre[1] + _HALF),
            fill=ground,
        )
        light = 0.3 * ground[0] + 0.59 * ground[1] + 0.11 * ground[2] > 120
        ink, size = (0, 0, 0) if light else (255, 255, 255), int(rng.integers(*_FONTS))
        draw.text((centre[0], centre[1]), symbol, fill=ink, font=font(size), anchor="mm")
        places = np.vstack([places, centre])
        symbols.append(_digit_or_letter(symbol))
    return image, _placed(_nearest(places, np.array(symbols), cells, _OF_SYMBOLS), cells)


def _digit_or_letter(symbol: str) -> tuple[int, int]:
    """Both labels of a symbol; the one that it is not is "none"."""
    return (
        (DIGITS.index(symbol), len(LETTERS))
        if symbol in DIGITS
        else (len(DIGITS), LETTERS.index(symbol))
    )


def _placed(labels: np.ndarray, cells: Cells) -> np.ndarray:
    """With the column and row of each token: no decoder can read off a token what no label asked
    for, and "left of" needs it."""
    x, y, side = _centres(cells)
    shares = np.stack([x / (x + side / 2).max(), y / (y + side / 2).max()], -1)
    labels[:, _OF_PLACES] = np.where(
        cells.visual.numpy()[:, None], (shares * _PLACES).astype(int), IGNORED
    )
    return labels


def _nearest(
    places: np.ndarray, values: np.ndarray, cells: Cells, columns: slice | list[int]
) -> np.ndarray:
    """The values of the place nearest to a token, if within reach, else "none"; ignored where a
    token is no patch."""
    labels = _unsaid(cells)
    x, y, side = _centres(cells)
    distance = np.hypot(x[:, None] - places[:, 0], y[:, None] - places[:, 1])
    near = distance.min(1, initial=np.inf) <= _REACH * side
    nearest = np.where(
        near[:, None], values[distance.argmin(1)] if len(values) else 0, _NONE[columns]
    )
    labels[:, columns] = np.where(cells.visual.numpy()[:, None], nearest, IGNORED)
    return labels


def _unsaid(cells: Cells) -> np.ndarray:
    return np.full((len(cells.visual), len(LABELS)), IGNORED)


def _centres(cells: Cells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and side of the tokens' cells in pixels."""
    box = cells.box.numpy()
    return (box[:, 0] + box[:, 2]) / 2, (box[:, 1] + box[:, 3]) / 2, box[:, 2] - box[:, 0]


def _ink(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3)
    return int(red), int(green), int(blue)
