"""World `hop`: two steps, the first of which cannot be left out.

"What digit is on the other shape that has the colour of the star?" The question does not say the
colour: the star has to be looked at, and then the shape of its colour.

What a model can do without looking: all digits of a scene differ, so a guess is right once in ten
times. Without the first step (the star hidden): some two other shapes share a colour, too, and each
of the rest is alone with its own, so the one asked for is one of `objects` − 3 such shapes and
nothing tells which. Without the question: two pairs share a colour, and any of their four shapes
may be meant.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import ImageDraw

from corelens.data.synthetic.compare import checked, draw_shapes, wordings
from corelens.data.synthetic.drawing import (
    DIGITS,
    Number,
    Query,
    draw_number,
    next_symbol,
    smallest,
)
from corelens.data.synthetic.refer import COLOURS, KINDS, draw_size, stream
from corelens.data.synthetic.refer_hard import Scene, describe, paint, region
from corelens.inputs.sample import Sample

FORMS = ("colour", "kind")
MINIMUM = {"objects": 6, "side": 256}
"""The documented minimum of difficulty: below it no number is published. (256 px a side are 64
visual tokens of 32.)"""
WORDINGS = {
    "colour": (
        "What digit is on the other shape that has the colour of the {anchor}?",
        "Which digit does the shape with the same colour as the {anchor} carry?",
        "Look at the {anchor}. What digit is on the other shape of its colour?",
    ),
    "kind": (
        "What digit is on the other shape of the kind of the {anchor} shape?",
        "Which digit does the shape of the same kind as the {anchor} one carry?",
        "Look at the {anchor} shape. What digit is on the other shape of its kind?",
    ),
}
"""By form; the first is the plain one."""

_WORLD = 1_000_006  # in the entropy of the random stream
_GREY = (128, 128, 128)


def hop(
    n: int,
    seed: int = 0,
    *,
    objects: Number = (6, 8),
    sides: tuple[int, int] = (256, 320),
    forms: Sequence[str] = FORMS,
    wording: str = "plain",
    clutter: int = 6,
    turn: int = 0,
    hide: bool = False,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: a scene, a question that goes by way of another shape, the digit, and two boxes:
    around the shape that carries it, then around the one by whose way the question goes.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        objects: shapes in a scene, 5 to 8, or (fewest, most). Published numbers need 6 or more.
        sides: smallest and largest side of the picture in pixels; width and height are drawn apart,
            in steps of 32. Published numbers need 256 or more.
        forms: the forms of question, of which each sample draws one: "colour" (from the only star
            to the other shape of its colour), "kind" (from the only red shape to the other shape of
            its kind).
        wording: "plain", or "varied": one of three wordings a form.
        clutter: how many lines lie in the background (and half as many blotches and empty
            outlines).
        turn: the asked digit counted on by so many (digits that stand elsewhere in the scene are
            passed over, where any are left); all else stays as it is, to the pixel.
        hide: paint a grey box over the shape by whose way the question goes. The answer stays, and
            nothing tells it.
        split: "test" (everyone's), "train" or "validation"; see `refer`.

    Raises:
        CorelensError: for a scene that is impossible (more objects than fit).
    """
    forms = checked(forms, FORMS)
    wordings(wording)
    samples = []
    for i in range(n):
        rng = stream(split, _WORLD, seed, i)
        size = draw_size(rng, sides)
        scene, query = draw_scene(rng, *size, objects, str(rng.choice(forms)), wording, clutter)
        if turn:
            scene, query = _turned(scene, query, turn)
        published = (
            smallest(objects) >= MINIMUM["objects"] and sides[0] >= MINIMUM["side"] and not hide
        )
        sample = query.sample(
            "hop", f"hop-{seed}-{i:04d}", split=split, published=published, objects=describe(scene)
        )
        sample.images = [paint(scene)]
        if hide and query.anchor is not None:
            box = scene.figures[query.anchor].box
            ImageDraw.Draw(sample.images[0]).rectangle(
                (box.x0, box.y0, box.x1 - 1, box.y1 - 1), fill=_GREY
            )
        samples.append(sample)
    return samples


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    objects: Number = (6, 8),
    form: str = "colour",
    wording: str = "plain",
    clutter: int = 6,
) -> tuple[Scene, Query]:
    """A scene of `width` × `height` pixels and a question of a form that it answers; arguments as
    in `hop`."""
    count = draw_number(rng, objects, "objects", 5, 8)
    pair_trait, own_trait = (COLOURS, KINDS) if form == "colour" else (KINDS, COLOURS)
    # The trait that pairs have in common: twice the anchor's, twice another, once each of the rest.
    values = [list(pair_trait)[i] for i in rng.permutation(len(pair_trait))]
    common = [values[0], values[0], values[1], values[1], *values[2:]][:count]
    own = [list(own_trait)[i] for i in rng.permutation(len(own_trait))]
    # The trait that names the anchor is its alone; the other shapes have any others, two of one
    # pair different ones.
    rest = [own[1 + int(i)] for i in rng.integers(len(own) - 1, size=count)]
    if rest[2] == rest[3]:
        rest[3] = own[1 + own.index(rest[2]) % (len(own) - 1)]
    traits = [(common[0], own[0]), *zip(common[1:], rest[1:], strict=True)]
    names = traits if form == "colour" else [(b, a) for a, b in traits]
    symbols = [DIGITS[i] for i in rng.permutation(10)[:count]]
    order = rng.permutation(count)
    figures = draw_shapes(
        rng, [names[i] for i in order], [symbols[i] for i in order], width, height
    )
    anchor, asked = (int(i) for i in order.argsort()[:2])
    scene = Scene(width, height, figures, "digit", int(rng.integers(2**32)), clutter)
    return scene, ask(scene, asked, anchor, form, rng, wording)


def ask(
    scene: Scene, asked: int, anchor: int, form: str, rng: np.random.Generator, wording: str
) -> Query:
    """The question of a form that goes by way of one shape of a scene to another; its regions are
    both, the asked one first."""
    first, last = scene.figures[anchor], scene.figures[asked]
    name = first.kind if form == "colour" else first.colour
    question = WORDINGS[form][int(rng.integers(wordings(wording)))].format(anchor=name)
    return Query(question, last.symbol, [region(last), region(first)], form, asked, anchor)


def _turned(scene: Scene, query: Query, turn: int) -> tuple[Scene, Query]:
    """The same with another digit where the answer stands."""
    taken = [figure.symbol for figure in scene.figures]
    digit = next_symbol(DIGITS, query.answer, turn, taken)
    figures = list(scene.figures)
    figures[query.asked] = replace(figures[query.asked], symbol=digit)
    turned = replace(query, answer=digit, regions=[region(figures[query.asked]), query.regions[1]])
    return replace(scene, figures=tuple(figures)), turned
