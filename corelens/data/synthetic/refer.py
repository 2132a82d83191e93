"""World `refer`, after RefCOCOg: coloured shapes that carry digits; the question names one by
colour and kind.

What is drawn: a canvas of muted clutter (blotches, lines), on it shapes of unique (colour, kind),
each with a digit in Pillow's bundled FreeType font. The asked shape has a near twin: another of the
same colour or of the same kind.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.fonts import font
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

COLOURS = {
    "red": (214, 38, 38),
    "green": (36, 150, 60),
    "blue": (38, 74, 214),
    "yellow": (240, 214, 46),
    "orange": (244, 132, 28),
    "purple": (128, 44, 168),
    "pink": (246, 146, 196),
    "cyan": (60, 208, 222),
}
KINDS = ("circle", "square", "triangle", "diamond", "hexagon", "star")
QUESTION = "What digit is on the {colour} {kind}?"
MINIMUM = {"objects": 6, "side": 256}
"""The documented minimum of difficulty: below it no number is published. (256 px a side are 64
visual tokens of 32.)"""

_SPLITS = {"test": 0, "train": 1, "validation": 2}
_GRID = 16  # pixels: a vision patch of the demo models
_RADII = (26, 32)  # pixels; also how near a centre may come to the border
_FONT = 24  # pixels
_TRIES = 300


@dataclass(frozen=True)
class Shape:
    """One object of a scene; `x`, `y`: its centre, `radius`: of the circle around it, in pixels."""

    colour: str
    kind: str
    digit: int
    x: int | float
    y: int | float
    radius: int | float

    @property
    def outline(self) -> list[tuple[float, float]]:
        """The polygon's corners in pixels (for a circle: left top and right bottom of the box
        around it)."""
        if self.kind == "circle":
            return [
                (self.x - self.radius, self.y - self.radius),
                (self.x + self.radius, self.y + self.radius),
            ]
        turns, ratio = {
            "square": ([45, 135, 225, 315], 1.0),
            "triangle": ([30, 150, 270], 1.0),
            "diamond": ([0, 90, 180, 270], 1.0),
            "hexagon": (list(range(0, 360, 60)), 1.0),
            "star": ([270 + 36 * i for i in range(10)], 0.6),
        }[self.kind]
        corners = []
        for i, turn in enumerate(turns):
            r = self.radius * (ratio if i % 2 and self.kind == "star" else 1.0)
            angle = math.radians(turn)
            corners.append((self.x + r * math.cos(angle), self.y + r * math.sin(angle)))
        return corners

    @property
    def box(self) -> Box:
        """The box around the shape, in pixels of the picture."""
        xs, ys = zip(*self.outline, strict=True)
        x0, y0 = float(math.floor(min(xs))), float(math.floor(min(ys)))
        return Box(x0, y0, math.ceil(max(xs)) + 1.0, math.ceil(max(ys)) + 1.0)


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it; `asked` is the index of the shape that the question names."""

    image: Image.Image
    shapes: list[Shape]
    asked: int


def refer(
    n: int,
    seed: int = 0,
    *,
    objects: int = 6,
    sides: tuple[int, int] = (256, 320),
    jitter: int | float = 0,
    clutter: int = 6,
    colours: int = len(COLOURS),
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: a scene, "What digit is on the red circle?", "7", and the box around that shape.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        objects: shapes in a scene, 1 to 48. Published numbers need 6 or more; fewer are for
            training.
        sides: smallest and largest side of the picture in pixels; width and height are drawn apart,
            in steps of 32. Published numbers need 256 or more.
        jitter: how far centres stray from the 16 px patch grid, in pixels each way (0: on the grid;
            8: anywhere).
        clutter: how many lines lie in the background (and half as many blotches).
        colours: how many colours a scene may use. Few make many twins of one colour, told apart by
            kind alone.
        turn: the asked shape's digit counted on by so many (9 + 1 is 0); all else stays as it is,
            to the pixel. A model that looks answers the new digit.
        split: "test" (everyone's), "train" or "validation" (which checkpoint to keep). A scene's
            random stream begins with its split's number, so the scenes of one split cannot be drawn
            in another, whatever the seed.

    Raises:
        CorelensError: for a scene that is impossible (more objects than fit or than there are
            colour-kind pairs).
    """
    samples = []
    for i in range(n):
        rng = stream(split, seed, i)
        scene = draw_scene(rng, *draw_size(rng, sides), objects, jitter, clutter, colours, turn)
        asked = scene.shapes[scene.asked]
        box = asked.box
        samples.append(
            Sample(
                images=[scene.image],
                question=QUESTION.format(colour=asked.colour, kind=asked.kind),
                answer=str(asked.digit),
                regions=[Box(box.x0, box.y0, box.x1, box.y1, text=str(asked.digit))],
                id=f"refer-{seed}-{i:04d}",
                meta={
                    "world": "refer",
                    "split": split,
                    "published": objects >= MINIMUM["objects"] and sides[0] >= MINIMUM["side"],
                    "asked": scene.asked,
                    "objects": [
                        {"colour": s.colour, "kind": s.kind, "digit": s.digit, "box": s.box.bounds}
                        for s in scene.shapes
                    ],
                },
            )
        )
    return samples


def stream(split: str, *numbers: int) -> np.random.Generator:
    """The random stream of a split and further numbers. Streams of different splits never meet: the
    split comes first in the entropy from which numpy seeds them."""
    if split not in _SPLITS:
        raise CorelensError(
            f"split {split!r}", f"one of {', '.join(_SPLITS)}", "name one of these splits"
        )
    return np.random.default_rng((_SPLITS[split], *numbers))


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    objects: int,
    jitter: int | float = 0,
    clutter: int = 6,
    colours: int = len(COLOURS),
    turn: int = 0,
) -> Scene:
    """One scene of `width` × `height` pixels from a random stream; the other arguments as in
    `refer`."""
    if not 1 <= colours <= len(COLOURS):
        raise CorelensError(
            f"colours={colours}",
            f"1 to {len(COLOURS)}",
            "ask for a number of colours that there are",
        )
    if not 1 <= objects <= colours * len(KINDS):
        raise CorelensError(
            f"objects={objects} in {colours} colours",
            f"1 to {colours * len(KINDS)} objects (each pair of colour and kind occurs once)",
            "ask for fewer objects or more colours",
        )
    names = _names(rng, objects, colours)
    centres = _centres(rng, objects, width, height, jitter)
    digits = rng.permutation(10)[:objects] if objects <= 10 else rng.integers(0, 10, objects)
    shapes = [
        Shape(colour, kind, int(digit), *centre)
        for (colour, kind), digit, centre in zip(names, digits, centres, strict=True)
    ]

    def has_twin(shape: Shape) -> bool:
        """Whether another has its colour or its kind."""
        return any((shape.colour == b.colour) != (shape.kind == b.kind) for b in shapes)

    twins = [i for i, shape in enumerate(shapes) if has_twin(shape)]
    asked = int(rng.choice(twins or range(objects)))  # one object alone has no twin
    shapes[asked] = replace(shapes[asked], digit=(shapes[asked].digit + turn) % 10)
    return Scene(_paint(rng, width, height, shapes, clutter), shapes, asked)


def draw_size(rng: np.random.Generator, sides: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture in pixels, each from `sides` (smallest, largest) in steps of
    32."""
    low, high = sides
    if low > high or low < 2 * _RADII[1]:
        raise CorelensError(
            f"sides={sides}",
            f"(smallest, largest) of {2 * _RADII[1]} px or more",
            "give a larger picture",
        )
    width, height = (int(low + 32 * rng.integers((high - low) // 32 + 1)) for _ in range(2))
    return width, height


def _names(rng: np.random.Generator, objects: int, colours: int) -> list[tuple[str, str]]:
    """Unique (colour, kind) pairs; the second is a near twin of the first."""
    palette = (
        list(COLOURS)
        if colours == len(COLOURS)
        else rng.permutation(list(COLOURS))[:colours].tolist()
    )
    pairs = [(colour, kind) for colour in palette for kind in KINDS]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    first = order[0]
    twin = next(pair for pair in order[1:] if (pair[0] == first[0]) != (pair[1] == first[1]))
    rest = [pair for pair in order[1:] if pair != twin]
    return [first, twin, *rest][:objects]


def _centres(
    rng: np.random.Generator, objects: int, width: int, height: int, jitter: int | float
) -> list[tuple[float, float, float]]:
    """Centres and radii of shapes that neither overlap nor leave the picture."""
    margin = _RADII[1]
    xs = np.arange(margin, width - margin + 1, _GRID)
    ys = np.arange(margin, height - margin + 1, _GRID)
    grid = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2).astype(float)
    for _ in range(_TRIES):
        placed: list[tuple[float, float, float]] = []
        points = grid
        if jitter:
            points = grid + rng.uniform(-jitter, jitter, grid.shape)
            points = np.clip(np.round(points), margin, [width - margin, height - margin])
        free = np.ones(len(points), bool)
        for radius in rng.uniform(*_RADII, objects):
            # earlier ones are marked already, for the largest radius
            for x, y, other in placed[-1:]:
                free &= np.hypot(points[:, 0] - x, points[:, 1] - y) > other + _RADII[1] + 1
            if not free.any():
                break
            x, y = points[rng.choice(np.flatnonzero(free))]
            placed.append((float(x), float(y), float(radius)))
        if len(placed) == objects:
            return placed
    raise CorelensError(
        f"{objects} objects in a picture of {width} × {height} pixels",
        f"a scene that can be drawn: shapes of {2 * _RADII[1]} px that do not overlap",
        "ask for fewer objects or for larger sides",
    )


def _paint(
    rng: np.random.Generator, width: int, height: int, shapes: list[Shape], clutter: int
) -> Image.Image:
    base = int(rng.integers(70, 190))
    image = Image.new("RGB", (width, height), muted(rng, base))
    draw = ImageDraw.Draw(image)
    for _ in range(clutter // 2):
        x, y, a, b = rng.uniform(0, width), rng.uniform(0, height), *rng.uniform(12, 60, 2)
        draw.ellipse((x - a, y - b, x + a, y + b), fill=muted(rng, base))
    for _ in range(clutter):
        ends = [(float(rng.uniform(0, width)), float(rng.uniform(0, height))) for _ in range(2)]
        draw.line(ends, fill=muted(rng, int(rng.integers(40, 220))), width=int(rng.integers(1, 4)))
    for shape in shapes:
        red, green, blue = (
            int(np.clip(c + rng.integers(-14, 15), 0, 255)) for c in COLOURS[shape.colour]
        )
        if shape.kind == "circle":
            draw.ellipse(shape.outline, fill=(red, green, blue))
        else:
            draw.polygon(shape.outline, fill=(red, green, blue))
        light = 0.3 * red + 0.59 * green + 0.11 * blue > 120
        ink = (0, 0, 0) if light else (255, 255, 255)
        draw.text((shape.x, shape.y), str(shape.digit), fill=ink, font=font(_FONT), anchor="mm")
    return image


def muted(rng: np.random.Generator, base: int) -> tuple[int, int, int]:
    """A colour of clutter: a grey, each channel up to 18 off."""
    red, green, blue = np.clip(base + rng.integers(-18, 19, 3), 0, 255)
    return int(red), int(green), int(blue)
