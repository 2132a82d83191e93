"""World `compare`: the question names two shapes, and the answer takes both of their symbols.

"Which digit is larger, the one on the red circle or the one on the blue star?" Each descriptor's
tokens can fetch their own evidence; what is compared is what both fetched.

What a model can do without looking: the answers of each form are equally likely (digits 1 to 9 for
the larger, 0 to 8 for the smaller, yes and no, sums 0 to 18), so a guess is right once in 9, 9, 2
and 19 times. Each of the two shapes has a twin of its colour or kind with another symbol, so both
words of a descriptor are needed; whether some letter occurs twice in the picture does not tell
"yes" from "no": in both cases two pairs of shapes carry the same letter.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from corelens.data.synthetic.drawing import (
    DIGITS,
    LETTERS,
    Figure,
    Number,
    Query,
    draw_centres,
    draw_figure,
    draw_number,
    smallest,
    traits_in_common,
)
from corelens.data.synthetic.refer import COLOURS, KINDS, draw_size, stream
from corelens.data.synthetic.refer_hard import SIZES, Scene, describe, paint, region
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample

FORMS = ("larger", "smaller", "same", "sum")
MINIMUM = {"objects": 6, "side": 256}
"""The documented minimum of difficulty: below it no number is published. (256 px a side are 64
visual tokens of 32.)"""
WORDINGS = {
    "larger": (
        "Which digit is larger, the one on the {a} or the one on the {b}?",
        "What is the larger digit, that of the {a} or that of the {b}?",
        "Compare the {a} and the {b}: which digit is greater?",
    ),
    "smaller": (
        "Which digit is smaller, the one on the {a} or the one on the {b}?",
        "What is the smaller digit, that of the {a} or that of the {b}?",
        "Compare the {a} and the {b}: which digit is less?",
    ),
    "same": (
        "Do the {a} and the {b} carry the same letter?",
        "Is the letter on the {a} the same as the letter on the {b}?",
        "Are the letters of the {a} and the {b} equal?",
    ),
    "sum": (
        "What is the sum of the digits on the {a} and the {b}?",
        "Add the digit on the {a} to the digit on the {b}. What is the result?",
        "How much do the digits of the {a} and the {b} add up to?",
    ),
}
"""By form; the first is the plain one."""

_WORLD = 1_000_005  # in the entropy of the random stream
_GAP = 4  # pixels between shapes
_TRIES = 200


def compare(
    n: int,
    seed: int = 0,
    *,
    objects: Number = (6, 8),
    sides: tuple[int, int] = (256, 320),
    forms: Sequence[str] = FORMS,
    wording: str = "plain",
    clutter: int = 6,
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: a scene, a question about two of its shapes, the answer, and the boxes around
    both, as asked.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        objects: shapes in a scene, 4 to 16, or (fewest, most). Published numbers need 6 or more.
        sides: smallest and largest side of the picture in pixels; width and height are drawn apart,
            in steps of 32. Published numbers need 256 or more.
        forms: the forms of question, of which each sample draws one: "larger" and "smaller" (of two
            digits, answered with the digit), "same" (of two letters: "yes" or "no"), "sum" (of two
            digits, as a number).
        wording: "plain", or "varied": one of three wordings a form.
        clutter: how many lines lie in the background (and half as many blotches and empty
            outlines).
        turn: the symbol of one of the two shapes is exchanged so that another answer is right, the
            `turn`th of those that are possible; all else stays as it is, to the pixel.
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
        scene, query, pair = draw_scene(
            rng, *size, objects, str(rng.choice(forms)), wording, clutter
        )
        if turn:
            scene, query = _turned(scene, query, pair, turn)
        published = smallest(objects) >= MINIMUM["objects"] and sides[0] >= MINIMUM["side"]
        sample = query.sample(
            "compare",
            f"compare-{seed}-{i:04d}",
            split=split,
            published=published,
            pair=list(pair),
            objects=describe(scene),
        )
        sample.images = [paint(scene)]
        samples.append(sample)
    return samples


def draw_scene(
    rng: np.random.Generator,
    width: int,
    height: int,
    objects: Number = (6, 8),
    form: str = "larger",
    wording: str = "plain",
    clutter: int = 6,
) -> tuple[Scene, Query, tuple[int, int]]:
    """A scene of `width` × `height` pixels, a question of a form that it answers, and the two
    shapes that it names."""
    count = draw_number(rng, objects, "objects", 4, 16)
    names = _names(rng, count)
    symbols = _letters(rng, count) if form == "same" else _digits(rng, count, form)
    order = rng.permutation(count)
    figures = draw_shapes(
        rng, [names[i] for i in order], [symbols[i] for i in order], width, height
    )
    places = order.argsort()
    pair = (int(places[0]), int(places[2]))
    scene = Scene(width, height, figures, "", int(rng.integers(2**32)), clutter)
    return scene, ask(scene, pair, form, rng, wording), pair


def ask(
    scene: Scene,
    pair: tuple[int, int],
    form: str,
    rng: np.random.Generator,
    wording: str = "plain",
) -> Query:
    """The question of a form about two shapes of a scene; its regions are both."""
    asked = [scene.figures[i] for i in pair]
    a, b = (f"{figure.colour} {figure.kind}" for figure in asked)
    question = WORDINGS[form][int(rng.integers(wordings(wording)))].format(a=a, b=b)
    answer = _answer(form, *(figure.symbol for figure in asked))
    return Query(question, answer, [region(figure) for figure in asked], form, pair[0])


def draw_shapes(
    rng: np.random.Generator,
    names: Sequence[tuple[str, str]],
    symbols: Sequence[str],
    width: int,
    height: int,
) -> tuple[Figure, ...]:
    """Large shapes of these names and symbols at free places.

    Raises:
        CorelensError: where they do not fit.
    """
    for _ in range(_TRIES):
        radii = [float(rng.uniform(26, SIZES["large"][0])) for _ in names]
        centres = draw_centres(rng, radii, width, height, _GAP)
        if centres is not None:
            parts = zip(names, symbols, centres, radii, strict=True)
            return tuple(
                draw_figure(rng, name, symbol, centre, radius)
                for name, symbol, centre, radius in parts
            )
    raise CorelensError(
        f"{len(names)} objects in a picture of {width} × {height} pixels",
        f"a scene that can be drawn: shapes of up to {2 * SIZES['large'][0]} px that do not "
        "overlap",
        "ask for fewer objects or for larger sides",
    )


def checked(forms: Sequence[str], known: Sequence[str]) -> list[str]:
    """Forms of question, all of which a world knows, or an error."""
    if isinstance(forms, str) or not forms or any(form not in known for form in forms):
        raise CorelensError(
            f"forms={forms!r}", f"one or more of {tuple(known)}", "give a list of these"
        )
    return list(forms)


def wordings(wording: str) -> int:
    """How many wordings a form has under this option."""
    if wording not in ("plain", "varied"):
        raise CorelensError(f"wording={wording!r}", "plain or varied", "name one of these")
    return 1 if wording == "plain" else 3


# --- inside


def _answer(form: str, a: str, b: str) -> str:
    if form == "same":
        return "yes" if a == b else "no"
    numbers = int(a), int(b)
    return str(
        max(numbers) if form == "larger" else min(numbers) if form == "smaller" else sum(numbers)
    )


def _names(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Unique names: a shape, its twin in colour or kind, another that shares neither with it, its
    twin, others."""
    pairs = [(colour, kind) for colour in COLOURS for kind in KINDS]
    order = [pairs[i] for i in rng.permutation(len(pairs))]
    first = order[0]
    second = next(pair for pair in order if not traits_in_common(pair, first))
    names = [first]
    for name in (first, second):
        names += [name] if name == second else []
        names.append(
            next(
                pair
                for pair in order
                if traits_in_common(pair, name) == 1 and pair not in (first, second, *names)
            )
        )
    return [*names, *(pair for pair in order if pair not in names)][:count]


def _digits(rng: np.random.Generator, count: int, form: str) -> list[str]:
    """Of the shape, its twin, the other shape, its twin, and the rest: the answer is drawn
    first."""
    if form == "sum":
        total = int(rng.integers(19))
        a = int(rng.integers(max(0, total - 9), min(9, total) + 1))
        b = total - a
    else:
        low, high = sorted(int(x) for x in rng.choice(10, 2, replace=False))
        if form == "larger":
            high = int(rng.integers(1, 10))
            low = int(rng.integers(high))
        else:
            low = int(rng.integers(9))
            high = int(rng.integers(low + 1, 10))
        a, b = (low, high) if rng.random() < 0.5 else (high, low)
    rest = [str(rng.integers(10)) for _ in range(count - 4)]
    twin_of_a, twin_of_b = _other_digit(rng, a), _other_digit(rng, b)
    return [str(a), twin_of_a, str(b), twin_of_b, *rest]


def _other_digit(rng: np.random.Generator, digit: int) -> str:
    return str(rng.choice([x for x in range(10) if x != digit]))


def _letters(rng: np.random.Generator, count: int) -> list[str]:
    """As `_digits`: two pairs of shapes carry the same letter, the two that are asked about ("yes")
    or the first one's twin and the second ("no"), and the second one's twin and a fifth shape (or,
    of four, none)."""
    letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))]
    a, b, twin, *rest = letters
    asked = [a, b, a, twin] if rng.random() < 0.5 else [a, b, b, twin]
    return [*asked, twin, *rest, *(LETTERS[i] for i in rng.integers(len(LETTERS), size=count))][
        :count
    ]


def _turned(scene: Scene, query: Query, pair: tuple[int, int], turn: int) -> tuple[Scene, Query]:
    """The same with another symbol on one of the two shapes, and another answer."""
    pool = LETTERS if query.form == "same" else DIGITS
    symbols = [scene.figures[i].symbol for i in pair]
    changes = []
    for place in (0, 1):
        begin = pool.index(symbols[place])
        for symbol in pool[begin + 1 :] + pool[:begin]:
            a, b = (symbol, symbols[1]) if place == 0 else (symbols[0], symbol)
            if _answer(query.form, a, b) != query.answer and (
                a != b or query.form in ("same", "sum")
            ):
                changes.append((pair[place], symbol, _answer(query.form, a, b)))
    index, symbol, answer = changes[(turn - 1) % len(changes)]
    figures = list(scene.figures)
    figures[index] = replace(figures[index], symbol=symbol)
    turned = replace(query, answer=answer, regions=[region(figures[i]) for i in pair])
    return replace(scene, figures=tuple(figures)), turned
