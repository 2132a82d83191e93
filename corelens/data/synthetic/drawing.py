"""What the drawn worlds share: figures with symbols, free places, fonts, cluttered backgrounds,
questions.

A world first describes a scene (all that a seed decides), then paints the description: the same
description with one symbol changed is the same picture with one symbol changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.fonts import font
from corelens.data.synthetic.refer import COLOURS, KINDS, Shape, muted
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box, Region

DIGITS = "0123456789"
LETTERS = "ACEFHKLMPRTUXY"
"""Capital letters that are mistaken neither for a digit (B for 8, S for 5, …) nor for one
another."""

Number = int | tuple[int, int]
"""A number, or the smallest and the largest of which one is drawn."""

_TINT = 14  # how far a painted colour strays from its name's colour, each channel, of 255
_DARTS = 256  # places tried at once


@dataclass(frozen=True)
class Figure:
    """A coloured shape that may carry a symbol.

    Args:
        colour, kind: its names, of `COLOURS` and `KINDS`.
        symbol: a digit or letter; "" for none.
        x, y: its centre in pixels. radius: of the circle around it, in pixels.
        tint: the colour as painted, red, green, blue of 255.
    """

    colour: str
    kind: str
    symbol: str
    x: float
    y: float
    radius: float
    tint: tuple[int, int, int]

    @property
    def shape(self) -> Shape:
        """Its geometry."""
        return Shape(self.colour, self.kind, 0, self.x, self.y, self.radius)

    @property
    def box(self) -> Box:
        """The box around the shape, in pixels of the picture."""
        return self.shape.box


@dataclass(frozen=True)
class Query:
    """A question that a scene answers without ambiguity.

    Args:
        question, answer: the words.
        regions: where the answer stands.
        form: what kind of question it is, for instance "relation".
        asked: the index of the figure asked for.
        anchor: the index of the figure that the question starts from, where there is one.
    """

    question: str
    answer: str
    regions: list[Region]
    form: str
    asked: int
    anchor: int | None = None

    def sample(self, world: str, name: str, **meta: object) -> Sample:
        """The question as a Sample without its pictures, with `meta` and what the query knows in
        its meta."""
        more = {"form": self.form, "asked": self.asked, "anchor": self.anchor}
        return Sample(
            question=self.question,
            answer=self.answer,
            regions=self.regions,
            id=name,
            meta={"world": world, **more, **meta},
        )


def draw_number(rng: np.random.Generator, value: Number, name: str, low: int, high: int) -> int:
    """A whole number that an option gives, or one drawn from its range; an error outside `low` …
    `high`."""
    first, last = smallest(value), value if isinstance(value, int) else value[1]
    if not low <= first <= last <= high:
        raise CorelensError(
            f"{name}={value}",
            f"a number from {low} to {high}, or (smallest, largest) within",
            f"ask for {name} that can be drawn",
        )
    return int(rng.integers(first, last + 1))


def smallest(value: Number) -> int:
    """The smallest number that an option allows."""
    return value if isinstance(value, int) else value[0]


def draw_figure(
    rng: np.random.Generator,
    name: tuple[str, str],
    symbol: str,
    centre: tuple[float, float],
    radius: float,
) -> Figure:
    """A figure of (colour, kind) `name`, its colour a little off."""
    red, green, blue = (
        int(np.clip(c + rng.integers(-_TINT, _TINT + 1), 0, 255)) for c in COLOURS[name[0]]
    )
    return Figure(*name, symbol, *centre, radius, (red, green, blue))


def draw_symbols(rng: np.random.Generator, pool: str, n: int) -> list[str]:
    """`n` symbols of a pool: all different while there are enough, else each equally often (or once
    more)."""
    rounds = [pool[i] for _ in range(-(-n // len(pool))) for i in rng.permutation(len(pool))]
    return rounds[:n]


def next_symbol(pool: str, symbol: str, turn: int, taken: Sequence[str]) -> str:
    """The symbol of a pool that stands `turn` places after this one, the first again after the
    last; those that are taken are passed over, where any are left."""
    begin = pool.index(symbol)
    others = pool[begin + 1 :] + pool[:begin]
    free = [other for other in others if other not in taken] or others
    return free[(turn - 1) % len(free)]


def draw_names(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
    """`n` different (colour, kind) names in random order; some two share the colour or the kind
    alone."""
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    twin = next(i for i, pair in enumerate(order) if traits_in_common(pair, order[0]) == 1)
    names = [order[0], order[twin], *(pair for i, pair in enumerate(order) if i not in (0, twin))][
        :n
    ]
    return [names[i] for i in rng.permutation(len(names))]


def traits_in_common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many traits two names have in common."""
    return sum(x == y for x, y in zip(a, b, strict=True))


def draw_centres(
    rng: np.random.Generator, radii: Sequence[float], width: int, height: int, gap: float
) -> list[tuple[float, float]] | None:
    """Centres of circles that neither overlap nor leave the picture; None where the darts found no
    room.

    Args:
        radii: in pixels; the largest is placed first.
        gap: pixels between any two circles, and half of it to the border.
    """
    placed = np.zeros((0, 3))
    centres: list[tuple[float, float]] = [(0.0, 0.0)] * len(radii)
    for i in np.argsort(radii)[::-1]:
        edge = radii[i] + gap / 2
        if 2 * edge > min(width, height):
            return None
        darts = np.round(rng.uniform((edge, edge), (width - edge, height - edge), (_DARTS, 2)))
        away = np.linalg.norm(darts[:, None] - placed[None, :, :2], axis=-1) - placed[None, :, 2]
        free = np.flatnonzero((away >= radii[i] + gap).all(1))
        if not len(free):
            return None
        x, y = darts[free[0]]
        centres[i] = (float(x), float(y))
        placed = np.vstack([placed, [x, y, radii[i]]])
    return centres


def paint_figure(draw: ImageDraw.ImageDraw, figure: Figure, size: int) -> None:
    """Paint a figure and, if it carries one, its symbol, `size` pixels high, black on light and
    white on dark."""
    outline = figure.shape.outline
    if figure.kind == "circle":
        draw.ellipse(outline, fill=figure.tint)
    else:
        draw.polygon(outline, fill=figure.tint)
    if figure.symbol:
        red, green, blue = figure.tint
        ink = (0, 0, 0) if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else (255, 255, 255)
        draw.text((figure.x, figure.y), figure.symbol, fill=ink, font=font(size), anchor="mm")


def paint_clutter(seed: int, width: int, height: int, amount: int) -> Image.Image:
    """A muted background: `amount` lines, half as many blotches, and half as many outlines of empty
    shapes.

    Its grey stays between that of the dark colours (blue, purple) and that of the light ones (pink,
    cyan, yellow).
    """
    rng = np.random.default_rng(seed)
    base = int(rng.integers(90, 145))
    image = Image.new("RGB", (width, height), muted(rng, base))
    draw = ImageDraw.Draw(image)
    for _ in range(amount // 2):
        x, y, a, b = rng.uniform(0, width), rng.uniform(0, height), *rng.uniform(12, 60, 2)
        draw.ellipse((x - a, y - b, x + a, y + b), fill=muted(rng, base))
    for _ in range(amount):
        ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(2)]
        draw.line(ends, fill=muted(rng, int(rng.integers(40, 220))), width=int(rng.integers(1, 4)))
    for _ in range(amount // 2):
        place = float(rng.uniform(0, width)), float(rng.uniform(0, height))
        shape = Shape("", str(rng.choice(KINDS[1:])), 0, *place, float(rng.uniform(14, 36)))
        draw.polygon(shape.outline, outline=muted(rng, int(rng.integers(50, 210))))
    return image
