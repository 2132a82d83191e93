"""What smol-vlm is asked in training: captions and chats of several questions about the worlds'
pictures."""

from dataclasses import dataclass

import numpy as np

from corelens.data.synthetic.compare import FORMS as COMPARED
from corelens.data.synthetic.compare import draw_scene as draw_compare
from corelens.data.synthetic.hop import FORMS as HOPS
from corelens.data.synthetic.hop import draw_scene as draw_hop
from corelens.data.synthetic.refer import Scene, draw_scene, stream
from corelens.data.synthetic.refer_hard import draw_scene as draw_hard
from corelens.data.synthetic.refer_hard import paint, questions
from training.smol.see import squeeze

_STREAM = 1_000_009  # in the entropy of the random stream
_SIDES = (256, 288, 320)
CAPTION = "List every object."
_ASKED = (
    "Which {word} is on the {name}?",
    "What {word} does the {name} carry?",
    "Name the {word} on the {name}.",
    "Read the {word} on the {name}.",
    "The {word} on the {name} is",
)
_TAILS = (
    " Answer with one word.",
    " Answer briefly.",
    " Look at the picture and give the answer only.",
    " Be short.",
)


@dataclass
class Chat:
    """One picture, uint8 [SIDE, SIDE, 3], and (user, assistant) turns about it; `world`: what the
    first one is of."""

    image: np.ndarray
    turns: list[tuple[str, str]]
    world: str


def draw_chat(seed: int, step: int, row: int, level: int) -> Chat:
    """A chat of training: of `refer` while few objects are known (`level`), then of all worlds. Of
    two objects only one is asked for: the other's digit could be had by leaving out the first."""
    rng = stream("train", _STREAM, seed, step, row)
    width = height = 256
    if rng.random() < 0.5:
        width, height = (int(x) for x in rng.choice(_SIDES, 2))
    worlds = ["caption", "refer", "refer"]
    if level >= 5:
        worlds += ["hard"]
    if level >= 6:
        worlds += ["compare", "compare", "hop", "hop"]
    world = worlds[(step + row) % len(worlds)]
    objects = level if rng.random() < 0.75 else int(rng.integers(1, level + 1))
    jitter = float(rng.choice([0, 8]))
    if world in ("caption", "refer"):
        colours = 8 if level < 5 or rng.random() < 0.5 else int(rng.integers(2, 4))
        scene = draw_scene(rng, width, height, objects, jitter, colours=colours)
        turns = (
            _caption(scene, rng)
            if world == "caption"
            else _digits(scene, rng, max(1, min(4, level - 1)))
        )
        return Chat(squeeze(scene.image), turns, world)
    wording = "plain" if rng.random() < 0.5 else "varied"
    if world == "hard":
        word = str(rng.choice(["symbol", "digit", "letter"]))
        hard, _ = draw_hard(rng, width, height, (4, max(4, level)), word)
        queries = [query for query in questions(hard) if query.form != "relation"]
        turns = [
            (queries[i].question, queries[i].answer) for i in rng.permutation(len(queries))[:3]
        ]
        return Chat(squeeze(paint(hard)), _tail(turns, rng), world)
    if world == "compare":
        form = str(rng.choice(COMPARED))
        drawn, query, _ = draw_compare(rng, width, height, (4, min(level + 1, 8)), form, wording)
        word = "letter" if form == "same" else "digit"
    else:
        drawn, query = draw_hop(
            rng, width, height, (5, min(level + 1, 8)), str(rng.choice(HOPS)), wording
        )
        word = "digit"
    more = [
        (
            _ask(word, f"{drawn.figures[i].colour} {drawn.figures[i].kind}", rng),
            drawn.figures[i].symbol,
        )
        for i in rng.permutation(len(drawn.figures))[:2]
    ]
    turns = _tail([(query.question, query.answer), *more], rng)
    return Chat(squeeze(paint(drawn)), turns, world)


def _caption(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    shapes = [scene.shapes[i] for i in rng.permutation(len(scene.shapes))]
    return [(CAPTION, ", ".join(f"{s.colour} {s.kind} {s.digit}" for s in shapes) + ".")]


def _digits(scene: Scene, rng: np.random.Generator, most: int) -> list[tuple[str, str]]:
    """Questions about different shapes, the one with a twin first."""
    order = [
        scene.asked,
        *(int(i) for i in rng.permutation(len(scene.shapes)) if i != scene.asked),
    ][:most]
    shapes = [scene.shapes[i] for i in order]
    return _tail([(_ask("digit", f"{s.colour} {s.kind}", rng), str(s.digit)) for s in shapes], rng)


def _ask(word: str, name: str, rng: np.random.Generator) -> str:
    if rng.random() < 0.6:
        return f"What {word} is on the {name}?"
    return _ASKED[int(rng.integers(len(_ASKED)))].format(word=word, name=name)


def _tail(turns: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    """In a quarter of the chats an instruction stands behind the first question."""
    if rng.random() < 0.75 or not turns[0][0].endswith("?"):
        return turns
    return [(turns[0][0] + _TAILS[int(rng.integers(len(_TAILS)))], turns[0][1]), *turns[1:]]
