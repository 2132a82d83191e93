"""World `refer-hard`: shapes of two sizes at free places, with digits and letters; the question
names one by colour and kind, by its size as well, or by where it lies: "What symbol is on the shape
left of the blue star?"

Every scene holds, beside one shape, its twin in another size, in another colour and of another
kind; so whatever is asked, some other shape shares all that the question says but one thing, and
carries another symbol.

When a relation is unambiguous: the shape asked for lies `MARGIN` pixels or more on the named side
of the anchor, centre to centre, and no farther aside than that distance (a cone of 90°); every
other shape that the words before the relation fit lies `MARGIN` pixels or more on the opposite
side. The anchor's colour and kind occur once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from corelens.data.synthetic.drawing import (
    DIGITS,
    LETTERS,
    Figure,
    Number,
    Query,
    draw_centres,
    draw_figure,
    draw_number,
    draw_symbols,
    next_symbol,
    paint_clutter,
    paint_figure,
    smallest,
    traits_in_common,
)
from corelens.data.synthetic.refer import COLOURS, KINDS, draw_size, stream
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

SIZES = {"small": (20, 24), "large": (32, 38)}
"""Radii in pixels, smallest and largest: a large shape is a third larger than any small one, or
more."""
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""The side on which the shape asked for lies, seen from the anchor, as a step in x (to the right)
and y (down)."""
MARGIN = 24
"""Pixels, centre to centre: nearer to the line through the anchor nothing counts as on one side of
it."""
FORMS = ("attribute", "size", "relation")
SYMBOLS = {"digit": DIGITS, "letter": LETTERS, "symbol": DIGITS + LETTERS}
MINIMUM = {"objects": 6, "side": 320}
"""The documented minimum of difficulty: below it no number is published. (320 px a side: 100 visual
tokens of 32.)"""
LONG = {"objects": (36, 48), "sides": (1536, 1600), "clutter": 60}
"""A long context: 2,304 to 2,500 visual tokens of 32 × 32 pixels."""

_WORLD = 1_000_001  # in the entropy of the random stream
_GAP = 4  # pixels between shapes
_TRIES = 200


@dataclass(frozen=True)
class Scene:
    """What is in a picture: all that `paint` needs. `paper` is the seed of the background."""

    width: int
    height: int
    figures: tuple[Figure, ...]
    word: str
    paper: int
    clutter: int


def refer_hard(
    n: int,
    seed: int = 0,
    *,
    objects: Number = (6, 12),
    sides: tuple[int, int] = (320, 416),
    symbols: str = "symbol",
    forms: Sequence[str] = FORMS,
    clutter: int = 8,
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: a scene, a question of one of the forms, the symbol, and the box around the
    shape asked for.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        objects: shapes in a scene, 4 to 64, or (fewest, most). Published numbers need 6 or more.
        sides: smallest and largest side of the picture in pixels; width and height are drawn apart,
            in steps of 32. Published numbers need 320 or more.
        symbols: "digit", "letter" or "symbol" (both); the question uses this word.
        forms: the forms of question, of which each sample draws one: "attribute" ("the red
            circle"), "size" ("the small red circle", beside a large one), "relation" ("the circle
            left of the blue star").
        clutter: how many lines lie in the background (and half as many blotches and empty
            outlines).
        turn: the asked shape's symbol counted on by so many (after the last comes the first;
            symbols that stand elsewhere in the scene are left out, if any are left); all else stays
            as it is, to the pixel.
        split: "test" (everyone's), "train" or "validation"; see `refer`.

    Raises:
        CorelensError: for a scene that is impossible (more objects than fit).
    """
    known = [form for form in forms if form in FORMS]
    if not known or len(known) < len(forms) or isinstance(forms, str):
        raise CorelensError(f"forms={forms!r}", f"one or more of {FORMS}", "give a list of these")
    samples = []
    for i in range(n):
        rng = stream(split, _WORLD, seed, i)
        size = draw_size(rng, sides)
        form = str(rng.choice(known))
        scene, query = draw_scene(rng, *size, objects, symbols, form, clutter)
        if turn:
            scene, query = _turned(scene, query, turn)
        published = smallest(objects) >= MINIMUM["objects"] and sides[0] >= MINIMUM["side"]
        sample = query.sample(
            "refer-hard",
            f"refer-hard-{seed}-{i:04d}",
            split=split,
            published=published,
            objects=describe(scene),
        )
        sample.images = [paint(scene)]
        samples.append(sample)
    return samples


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    objects: Number = (6, 12),
    symbols: str = "symbol",
    form: str = "attribute",
    clutter: int = 8,
) -> tuple[Scene, Query]:
    """A scene of `width` × `height` pixels and a question of a form that it answers; arguments as
    in `refer_hard`."""
    if symbols not in SYMBOLS:
        raise CorelensError(
            f"symbols={symbols!r}", f"one of {', '.join(SYMBOLS)}", "name one of these"
        )
    count = draw_number(rng, objects, "objects", 4, 64)
    for _ in range(_TRIES):
        names = _names(rng, count)
        radii = [float(rng.uniform(*SIZES[size])) for _, _, size in names]
        centres = draw_centres(rng, radii, width, height, _GAP)
        marks = draw_symbols(rng, SYMBOLS[symbols], count)
        if centres is None:
            continue
        parts = zip(names, marks, centres, radii, strict=True)
        figures = tuple(
            draw_figure(rng, name[:2], mark, centre, radius) for name, mark, centre, radius in parts
        )
        scene = Scene(width, height, figures, symbols, int(rng.integers(2**32)), clutter)
        queries = [query for query in questions(scene) if query.form == form]
        if queries:
            return scene, queries[int(rng.integers(len(queries)))]
    raise CorelensError(
        f"{count} objects in a picture of {width} × {height} pixels and a question of form "
        f"{form!r}",
        f"a scene that can be drawn: shapes of up to {2 * SIZES['large'][1]} px that do not "
        "overlap",
        "ask for fewer objects or for larger sides",
    )


def questions(scene: Scene) -> list[Query]:
    """Every question that the scene answers without ambiguity and in the face of a distractor.

    A distractor fits the question but for one thing; a question whose distractor carries the same
    symbol is left out.
    """
    figures, queries = scene.figures, []
    for form, words, asked, anchor, others in (*_by_name(figures), *_by_place(figures)):
        target = figures[asked]
        if others and all(figures[i].symbol != target.symbol for i in others):
            question = f"What {scene.word} is on the {words}?"
            queries.append(Query(question, target.symbol, [region(target)], form, asked, anchor))
    return queries


def paint(scene: Scene) -> Image.Image:
    """The picture that a scene describes."""
    image = paint_clutter(scene.paper, scene.width, scene.height, scene.clutter)
    draw = ImageDraw.Draw(image)
    for figure in scene.figures:
        paint_figure(draw, figure, round(0.9 * figure.radius))
    return image


def size_of(figure: Figure) -> str:
    """ "small" or "large"."""
    return "small" if figure.radius <= SIZES["small"][1] else "large"


def describe(scene: Scene) -> list[dict[str, Any]]:
    """What a sample's meta says of each shape."""
    return [
        {"colour": f.colour, "kind": f.kind, "size": size_of(f), "symbol": f.symbol}
        | {"x": f.x, "y": f.y, "box": f.box.bounds}
        for f in scene.figures
    ]


def region(figure: Figure) -> Box:
    """The box around a shape, which knows the symbol on it."""
    box = figure.box
    return Box(box.x0, box.y0, box.x1, box.y1, text=figure.symbol)


# --- inside


def _turned(scene: Scene, query: Query, turn: int) -> tuple[Scene, Query]:
    """The same with another symbol where the answer stands."""
    figures = list(scene.figures)
    taken = [figure.symbol for figure in figures]
    symbol = next_symbol(SYMBOLS[scene.word], query.answer, turn, taken)
    figures[query.asked] = replace(figures[query.asked], symbol=symbol)
    turned = replace(query, answer=symbol, regions=[region(figures[query.asked])])
    return replace(scene, figures=tuple(figures)), turned


_Found = tuple[str, str, int, int | None, list[int]]  # form, words, asked, anchor, distractors


def _by_name(figures: Sequence[Figure]) -> Iterator[_Found]:
    """Questions by colour and kind, where these occur once, and by size where they occur once in
    each size."""
    traits = [(f.colour, f.kind, size_of(f)) for f in figures]
    for i, (colour, kind, size) in enumerate(traits):
        alike = [j for j, t in enumerate(traits) if j != i and t[:2] == (colour, kind)]
        if alike:  # the same in the other size: no two shapes are alike in all three
            yield "size", f"{size} {colour} {kind}", i, None, alike
        else:
            near = [j for j, t in enumerate(traits) if traits_in_common(t, traits[i]) == 2]
            yield "attribute", f"{colour} {kind}", i, None, near


def _by_place(figures: Sequence[Figure]) -> Iterator[_Found]:
    """Questions by where a shape lies from an anchor; distractors are what the words fit on the
    other side."""
    names = [(f.colour, f.kind) for f in figures]
    nouns = {"shape": list(range(len(figures)))}
    for name in KINDS:
        nouns[name] = [i for i, f in enumerate(figures) if f.kind == name]
    for name in COLOURS:
        nouns[f"{name} shape"] = [i for i, f in enumerate(figures) if f.colour == name]
    for anchor, f in enumerate(figures):
        if names.count(names[anchor]) > 1:
            continue
        for relation, (right, down) in RELATIONS.items():
            for noun, fits in nouns.items():
                others = [i for i in fits if i != anchor]
                along = {
                    i: right * (figures[i].x - f.x) + down * (figures[i].y - f.y) for i in others
                }
                aside = {
                    i: abs(down * (figures[i].x - f.x)) + abs(right * (figures[i].y - f.y))
                    for i in others
                }
                beyond = [i for i in others if along[i] > -MARGIN]
                if (
                    len(beyond) == 1
                    and along[beyond[0]] >= MARGIN
                    and aside[beyond[0]] <= along[beyond[0]]
                ):
                    rest = [i for i in others if i != beyond[0]]
                    yield (
                        "relation",
                        f"{noun} {relation} the {f.colour} {f.kind}",
                        beyond[0],
                        anchor,
                        rest,
                    )


def _names(rng: np.random.Generator, objects: int) -> list[tuple[str, str, str]]:
    """Unique (colour, kind, size) in random order; one of them has a twin in size, in colour and in
    kind."""
    everything = _triples()
    order = [everything[i] for i in rng.permutation(len(everything))]
    first = order[0]

    def differs_in(triple: tuple[str, str, str]) -> list[int]:
        return [i for i in range(3) if triple[i] != first[i]]

    twins = [next(t for t in order if differs_in(t) == [trait]) for trait in range(3)]
    names = [first, *twins, *(t for t in order[1:] if t not in twins)][:objects]
    return [names[i] for i in rng.permutation(objects)]


@lru_cache(maxsize=1)
def _triples() -> list[tuple[str, str, str]]:
    return [(colour, kind, size) for colour in COLOURS for kind in KINDS for size in SIZES]
