"""World `video`, after VidSTG: coloured shapes that move, each with a digit that it carries for
some frames only.

What is drawn: shapes of unique (colour, kind) on a still, cluttered background; each goes straight
on and turns back at the borders; none overlaps another in any frame. Every shape carries its digit
in one unbroken span of frames, is bare in the others, and has no other digit. The asked shape has a
near twin (of the same colour or the same kind alone), and some other shape's digit is to be seen
while the asked one's is not. The region is a tube over exactly the frames that show the digit.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.drawing import (
    DIGITS,
    Figure,
    Number,
    Query,
    draw_figure,
    draw_names,
    draw_number,
    draw_symbols,
    paint_clutter,
    paint_figure,
    smallest,
    traits_in_common,
)
from corelens.data.synthetic.refer import COLOURS, KINDS, draw_size, stream
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Tube

QUESTION = "What digit is shown on the {colour} {kind}?"
MINIMUM = {"frames": 4, "objects": 4, "side": 256, "speed": 4}
"""The documented minimum of difficulty: below it no number is published. (256 px a side: 64 tokens
of 32 a frame.)"""
LONG = {"frames": 32, "objects": 8, "sides": (512, 576), "speed": (4, 8)}
"""A long context: 16 pairs of frames, 256 to 324 visual tokens of 32 × 32 pixels each."""
FPS = 2.0
"""Frames a second that the samples claim."""

_WORLD = 1_000_003  # in the entropy of the random stream
_RADII = (26, 32)  # pixels
_FONT = 24  # pixels
_GAP = 2  # pixels between shapes
_DARTS, _TRIES = 128, 100


@dataclass(frozen=True)
class Actor:
    """A moving shape: `figure` with its digit, its centre in every frame, and the frames [first,
    end) of its digit."""

    figure: Figure
    path: tuple[tuple[float, float], ...]
    first: int
    end: int

    def at(self, frame: int) -> Figure:
        """The shape in a frame, with its digit or bare."""
        x, y = self.path[frame]
        return replace(
            self.figure,
            x=x,
            y=y,
            symbol=self.figure.symbol if self.first <= frame < self.end else "",
        )


@dataclass(frozen=True)
class Scene:
    """What happens: all that `paint` needs. `paper` is the seed of the background."""

    width: int
    height: int
    frames: int
    actors: tuple[Actor, ...]
    paper: int
    clutter: int


def video(
    n: int,
    seed: int = 0,
    *,
    frames: Number = 6,
    objects: Number = 5,
    sides: tuple[int, int] = (256, 320),
    speed: tuple[float, float] = (4, 12),
    span: tuple[int, int] | None = None,
    grid: int = 1,
    clutter: int = 6,
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: frames, "What digit is shown on the red circle?", "7", and the tube of that
    shape with its digit.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        frames: how many, 2 to 256, or (fewest, most). Published numbers need 4 or more.
        objects: shapes in a scene, 1 to 48, or (fewest, most). Published numbers need 4 or more.
        sides: smallest and largest side of a frame in pixels; width and height are drawn apart, in
            steps of 32, once a scene. Published numbers need 256 or more.
        speed: smallest and largest, in pixels a frame (less where a shape turns back). Published
            numbers need 4 or more.
        span: fewest and most frames in which a shape carries its digit; by default 2 to half of the
            frames.
        grid: centres lie on every so many pixels in every frame (1: anywhere; 16: on `refer`'s
            grid, the patches of the bundled models, where shapes stand still for a while and then
            step on).
        clutter: how many lines lie in the background (and half as many blotches and empty
            outlines).
        turn: the asked shape's digit counted on by so many (9 + 1 is 0); all else stays as it is,
            to the pixel.
        split: "test" (everyone's), "train" or "validation"; see `refer`.

    Raises:
        CorelensError: for a scene that is impossible (more objects than find a way, a span of all
            frames).
    """
    samples = []
    for i in range(n):
        rng = stream(split, _WORLD, seed, i)
        scene, asked = draw_scene(
            rng, *draw_size(rng, sides), frames, objects, speed, span, clutter, grid, turn
        )
        enough = smallest(frames) >= MINIMUM["frames"] and smallest(objects) >= MINIMUM["objects"]
        published = enough and sides[0] >= MINIMUM["side"] and speed[0] >= MINIMUM["speed"]
        actors = [
            {
                "colour": a.figure.colour,
                "kind": a.figure.kind,
                "digit": a.figure.symbol,
                "frames": [a.first, a.end],
            }
            | {"boxes": [a.at(frame).box.bounds for frame in range(scene.frames)]}
            for a in scene.actors
        ]
        sample = ask(scene, asked).sample(
            "video",
            f"video-{seed}-{i:04d}",
            split=split,
            published=published,
            fps=FPS,
            objects=actors,
        )
        sample.video = paint(scene)
        samples.append(sample)
    return samples


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    frames: Number = 6,
    objects: Number = 5,
    speed: tuple[float, float] = (4, 12),
    span: tuple[int, int] | None = None,
    clutter: int = 6,
    grid: int = 1,
    turn: int = 0,
) -> tuple[Scene, int]:
    """A scene in frames of `width` × `height` pixels, and which shape shall be asked; arguments as
    in `video`.

    Any other shape can be asked too, with `ask`.
    """
    count = draw_number(rng, objects, "objects", 1, len(COLOURS) * len(KINDS))
    length = draw_number(rng, frames, "frames", 2, 256)
    short, long = span or (min(2, length - 1), max(length // 2, min(2, length - 1)))
    if not (1 <= short <= long < length and 0 <= speed[0] <= speed[1]):
        raise CorelensError(
            f"span={span}, speed={speed} in {length} frames",
            f"a span (fewest, most) of 1 to {length - 1} frames and a speed (smallest, largest) "
            "from 0",
            "show symbols in fewer frames, or ask for more frames",
        )
    names, marks = draw_names(rng, count), draw_symbols(rng, DIGITS, count)
    paths, radii = _paths(rng, count, width, height, length, speed, grid)

    def has_twin(name: tuple[str, str]) -> bool:
        return any(traits_in_common(name, other) == 1 for other in names)

    twins = [i for i, name in enumerate(names) if has_twin(name)]
    asked = int(rng.choice(twins or range(count)))  # one object alone has no twin
    marks[asked] = str((int(marks[asked]) + turn) % 10)
    spans = _spans(rng, count, length, short, long, asked)
    actors = tuple(
        Actor(draw_figure(rng, name, mark, path[0], radius), tuple(path), *frames)
        for name, mark, path, radius, frames in zip(names, marks, paths, radii, spans, strict=True)
    )
    return Scene(width, height, length, actors, int(rng.integers(2**32)), clutter), asked


def ask(scene: Scene, asked: int) -> Query:
    """The question of one shape; its region is the shape in the frames that show its digit."""
    actor = scene.actors[asked]
    figure = actor.figure
    tube = Tube(
        {frame: actor.at(frame).box for frame in range(actor.first, actor.end)}, text=figure.symbol
    )
    question = QUESTION.format(colour=figure.colour, kind=figure.kind)
    return Query(question, figure.symbol, [tube], "digit", asked)


def paint(scene: Scene) -> list[Image.Image]:
    """The frames of a scene."""
    paper = paint_clutter(scene.paper, scene.width, scene.height, scene.clutter)
    images = []
    for frame in range(scene.frames):
        image = paper.copy()
        draw = ImageDraw.Draw(image)
        for actor in scene.actors:
            paint_figure(draw, actor.at(frame), _FONT)
        images.append(image)
    return images


# --- inside


def _paths(
    rng: np.random.Generator,
    objects: int,
    width: int,
    height: int,
    frames: int,
    speed: tuple[float, float],
    grid: int,
) -> tuple[list[list[tuple[float, float]]], list[float]]:
    """Centres in every frame, and radii, of shapes that never overlap nor leave the picture."""
    least = np.full(2, _RADII[1] + 1.0)
    room = np.array([width, height]) - 2 * least
    for _ in range(_TRIES):
        radii = [float(r) for r in rng.uniform(*_RADII, objects)]
        placed: list[np.ndarray] = []
        for i, radius in enumerate(radii):
            turn, pace = rng.uniform(0, 2 * np.pi, _DARTS), rng.uniform(*speed, _DARTS)
            step = pace[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)
            way = (
                rng.uniform(0, room, (_DARTS, 2))[:, None]
                + np.arange(frames)[:, None] * step[:, None]
            )
            # turns back at the borders
            way = np.round(least + room - np.abs(room - way % (2 * room)))
            if grid > 1:
                way = _RADII[1] + np.round((way - _RADII[1]) / grid) * grid
            free = np.ones(_DARTS, bool)
            for other, path in zip(radii[:i], placed, strict=True):
                apart = np.linalg.norm(way - path, axis=-1)
                free &= (apart >= radius + other + _GAP).all(1)
            if not free.any():
                break
            placed.append(way[free.argmax()])
        if len(placed) == objects:
            return [[(float(x), float(y)) for x, y in path] for path in placed], radii
    raise CorelensError(
        f"{objects} objects that move {speed} px a frame for {frames} frames of {width} × {height} "
        "pixels",
        f"a scene that can be drawn: shapes of {2 * _RADII[1]} px that never overlap",
        "ask for fewer objects or frames, less speed, or larger sides",
    )


def _spans(
    rng: np.random.Generator, objects: int, frames: int, short: int, long: int, asked: int
) -> list[tuple[int, int]]:
    """Frames [first, end) of every digit; some other digit is seen in a frame in which the asked
    one is not."""
    while True:
        spans = []
        for _ in range(objects):
            length = int(rng.integers(short, long + 1))
            first = int(rng.integers(frames - length + 1))
            spans.append((first, first + length))
        first, end = spans[asked]
        if objects == 1 or any(a < first or b > end for a, b in spans[:asked] + spans[asked + 1 :]):
            return spans
