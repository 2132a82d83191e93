"""What is asked in training about the scenes of `compare` and `hop`.

Beside each world's own questions there are the steps that they are made of: "symbol" names one
shape and asks for what is on it; in `hop`, "trait" asks for what the first step has to find, and
"alone" for the digit of a shape that one trait names; "told" says what the first step would find
("the colour of the red star"), and leaves the second.
Questions of several of these forms never share a chat: an answer could be read off an earlier one.
"""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np

from corelens.data.synthetic.compare import ask as ask_pair
from corelens.data.synthetic.compare import draw_scene as compare_scene
from corelens.data.synthetic.drawing import Figure, Query
from corelens.data.synthetic.hop import FORMS as HOPS
from corelens.data.synthetic.hop import ask as ask_hop
from corelens.data.synthetic.hop import draw_scene as hop_scene
from corelens.data.synthetic.refer_hard import Scene


def ask_compare(
    form: str, rng: np.random.Generator, width: int, height: int, objects: int
) -> tuple[Scene, list[Query]]:
    """A scene of `compare` and questions of a form: all about digits, or all about letters."""
    letters = form == "same" or (form == "symbol" and rng.random() < 0.3)
    scene, _, _ = compare_scene(rng, width, height, objects, "same" if letters else "sum", "varied")
    if form == "symbol":
        return scene, _symbols(scene, "letter" if letters else "digit", rng)
    pairs = _two_shapes(scene, form, rng)
    return scene, [ask_pair(scene, pair, form, rng, "varied") for pair in pairs]


def ask_hops(
    form: str, rng: np.random.Generator, width: int, height: int, objects: int
) -> tuple[Scene, list[Query]]:
    """A scene of `hop` and all questions of a form that it answers, in random order."""
    way = form if form in HOPS else str(rng.choice(HOPS))
    scene, _ = hop_scene(rng, width, height, objects, way, "varied")
    if form == "symbol":
        return scene, _symbols(scene, "digit", rng)
    if form == "trait":
        return scene, _traits(scene, way, rng)
    if form == "alone":
        return scene, _named_by_one(scene, rng)
    hops = _hops(scene, way)
    hops = [hops[i] for i in rng.permutation(len(hops))]
    queries = [ask_hop(scene, *hop, way, rng, "varied") for hop in hops]
    if form == "told":
        anchors = [scene.figures[anchor] for _, anchor in hops]
        queries = [_told(*pair) for pair in zip(queries, anchors, strict=True)]
    return scene, queries


def _symbols(scene: Scene, word: str, rng: np.random.Generator) -> list[Query]:
    asked = [scene.figures[i] for i in rng.permutation(len(scene.figures))]
    return [
        Query(f"What {word} is on the {f.colour} {f.kind}?", f.symbol, [], "symbol", 0)
        for f in asked
    ]


def _traits(scene: Scene, way: str, rng: np.random.Generator) -> list[Query]:
    """The colour of each shape whose kind is its alone, or the kind of each of a colour of its
    own."""
    queries = []
    for i in rng.permutation(len(scene.figures)):
        figure = scene.figures[i]
        if way == "colour" and _alone(scene, "kind", figure.kind):
            question = f"What colour is the {figure.kind}?"
            queries.append(Query(question, figure.colour, [], way, int(i), int(i)))
        if way == "kind" and _alone(scene, "colour", figure.colour):
            question = f"What kind is the {figure.colour} shape?"
            queries.append(Query(question, figure.kind, [], way, int(i), int(i)))
    return queries


def _named_by_one(scene: Scene, rng: np.random.Generator) -> list[Query]:
    """The digit of each shape whose kind or colour is its alone, by that trait."""
    queries = []
    for i in rng.permutation(len(scene.figures)):
        figure = scene.figures[i]
        names = [figure.kind] if _alone(scene, "kind", figure.kind) else []
        names += [f"{figure.colour} shape"] if _alone(scene, "colour", figure.colour) else []
        if names:
            question = f"What digit is on the {rng.choice(names)}?"
            queries.append(Query(question, figure.symbol, [], "", 0))
    return queries


def _told(query: Query, anchor: Figure) -> Query:
    """The same question, with both traits of the shape by whose way it goes."""
    name = anchor.kind if query.form == "colour" else anchor.colour
    question = re.sub(rf"\b{name}\b", f"{anchor.colour} {anchor.kind}", query.question)
    return replace(query, question=question, anchor=None)


def first_step(scene: Scene, query: Query) -> tuple[str, str] | None:
    """The word that names the shape by whose way a question goes, and what has to be found there:
    ("star", "red") for "the other shape that has the colour of the star"."""
    if query.anchor is None:
        return None
    anchor = scene.figures[query.anchor]
    return (anchor.kind, anchor.colour) if query.form == "colour" else (anchor.colour, anchor.kind)


def _alone(scene: Scene, trait: str, value: str) -> bool:
    return [getattr(figure, trait) for figure in scene.figures].count(value) == 1


def _hops(scene: Scene, way: str) -> list[tuple[int, int]]:
    """(asked, anchor): two shapes that alone share the trait `way`, the second of which can be
    named by its other trait."""
    name = "kind" if way == "colour" else "colour"
    shared = [getattr(figure, way) for figure in scene.figures]
    return [
        (asked, anchor)
        for pair in combinations(range(len(shared)), 2)
        for asked, anchor in (pair, pair[::-1])
        if shared[asked] == shared[anchor]
        and shared.count(shared[anchor]) == 2
        and _alone(scene, name, getattr(scene.figures[anchor], name))
    ]


def _two_shapes(scene: Scene, form: str, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The pairs of shapes that a question of this form can name, each once, in random order. For
    "same", as many pairs carry the same letter as do not."""
    symbols = [figure.symbol for figure in scene.figures]
    pairs = list(combinations(rng.permutation(len(symbols)).tolist(), 2))
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    if form == "sum":
        return pairs
    unlike = [(a, b) for a, b in pairs if symbols[a] != symbols[b]]
    if form != "same":
        return unlike
    alike = [(a, b) for a, b in pairs if symbols[a] == symbols[b]]
    both = alike + unlike[: len(alike)]
    return [both[i] for i in rng.permutation(len(both))]
