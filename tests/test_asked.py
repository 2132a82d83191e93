"""What training asks about `compare` and `hop`: every answer is worked out again from the scene."""

import re

import pytest

from corelens.data.synthetic.compare import draw_scene as compare_scene
from corelens.data.synthetic.hop import draw_scene as hop_scene
from corelens.data.synthetic.refer import COLOURS, KINDS
from training.batches import Plan, draw_batch
from training.build import build_processor

NAME = "qwen3vl-q"


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor(NAME).tokenizer


def asked(tokenizer, monkeypatch, world, form, seed=0):
    """For each scene of a training batch, the scene with its questions and answers."""
    scenes = []
    draw = compare_scene if world == "compare" else hop_scene

    def drawn(*args):
        scenes.append(draw(*args))
        return scenes[-1]

    monkeypatch.setattr(f"training.asked.{world}_scene", drawn)
    shown = {"batch": 4, "objects": 6, "sides": (256, 256)}
    batch = draw_batch(Plan(NAME, "questions", seed, 3, world=world, forms=(form,), **shown))
    for ids, (scene, *_) in zip(batch["input_ids"], scenes, strict=True):
        chat = tokenizer.decode(ids).split("<|im_start|>")
        turns = [turn.partition("\n")[2].split("<|im_end|>")[0] for turn in chat]
        turns = [turn.rpartition("<|vision_end|>")[2] for turn in turns]
        assert len(set(turns[1::2])) == len(turns[1::2]) > 0
        yield scene, list(zip(turns[1::2], turns[2::2], strict=True))


def right_of_two(form, symbols):
    """The answer of `compare`; "symbol" asks for that of one shape."""
    if form == "same":
        return "yes" if symbols[0] == symbols[1] else "no"
    if form == "sum":
        return str(sum(map(int, symbols)))
    return min(symbols) if form == "smaller" else max(symbols)


@pytest.mark.parametrize("form", ["larger", "smaller", "same", "sum", "symbol"])
def test_two_things_are_as_the_scene_has_them(tokenizer, form, monkeypatch):
    answers = []
    for scene, turns in asked(tokenizer, monkeypatch, "compare", form):
        symbols = {f"{figure.colour} {figure.kind}": figure.symbol for figure in scene.figures}
        for question, answer in turns:
            named = [name for name in symbols if re.search(rf"{name}\b", question)]
            assert len(named) == (1 if form == "symbol" else 2)
            assert answer == right_of_two(form, [symbols[name] for name in named])
            answers.append(answer)
    assert len(answers) >= 8 and len(set(answers)) > 1
    if form == "same":
        assert answers.count("yes") == answers.count("no")


@pytest.mark.parametrize("form", ["colour", "kind", "told", "trait", "alone", "symbol"])
def test_hops_are_as_the_scene_has_them(tokenizer, form, monkeypatch):
    asked_of = 0
    for seed in range(3):
        for scene, turns in asked(tokenizer, monkeypatch, "hop", form, seed):
            for question, answer in turns:
                named = [
                    figure
                    for figure in scene.figures
                    if re.search(rf"\b({figure.colour}|{figure.kind})\b", question)
                ]
                asked_of += 1
                if form == "symbol":
                    (figure,) = [f for f in named if f"{f.colour} {f.kind}" in question]
                    assert answer == figure.symbol
                    continue
                way = form
                if form == "told":  # both traits of the anchor stand there
                    named = [f for f in named if f"{f.colour} {f.kind}" in question]
                    way = "colour" if "colour" in question else "kind"
                (anchor,) = named  # its name is its alone
                if form == "trait":
                    assert answer == (anchor.colour if "colour" in question else anchor.kind)
                    continue
                if form == "alone":
                    assert answer == anchor.symbol
                    continue
                others = [f for f in scene.figures if f is not anchor]
                (other,) = [f for f in others if getattr(f, way) == getattr(anchor, way)]
                assert answer == other.symbol
    assert asked_of >= 12


def asked_in_blind_batches(tokenizer, world, form):
    """What counts as an answer: one token for each turn."""
    plan = Plan(NAME, "questions", 0, 3, batch=4, objects=6, sides=(256, 256), world=world,
                forms=(form,))  # fmt: skip
    batch = draw_batch(plan)
    turns = sum(tokenizer.decode(ids).count("<|im_start|>assistant") for ids in batch["input_ids"])
    assert batch["answers"].sum() == turns
    said = tokenizer.convert_ids_to_tokens(batch["input_ids"][batch["answers"]])
    return {word.strip("Ġ ▁") for word in said}


def test_a_blind_batch_asks_for_answers_that_are_words_too(tokenizer):
    words = asked_in_blind_batches(tokenizer, "hop", "trait")
    assert words <= {*COLOURS, *KINDS} and len(words) > 4


def test_a_blind_batch_asks_once_for_a_word_of_several_tokens(tokenizer):
    assert asked_in_blind_batches(tokenizer, "compare", "same") == {"y", "n"}


@pytest.mark.parametrize("form", ["colour", "kind", "trait"])
def test_what_the_first_step_finds_stands_at_the_word_that_names_its_shape(
    tokenizer, form, monkeypatch
):
    scenes = []

    def drawn(*args):
        scenes.append(hop_scene(*args)[0])
        return scenes[-1], None

    monkeypatch.setattr("training.asked.hop_scene", drawn)
    plan = Plan(NAME, "questions", 0, 3, batch=4, objects=6, sides=(256, 256), world="hop",
                forms=(form,))  # fmt: skip
    batch = draw_batch(plan)
    for ids, found, scene in zip(batch["input_ids"], batch["found"], scenes, strict=True):
        (places,) = (found >= 0).nonzero()
        assert len(places) == tokenizer.decode(ids).count("<|im_start|>user")
        for place in places:
            word = tokenizer.decode(ids[place]).strip()
            (anchor,) = [f for f in scene.figures if word in (f.colour, f.kind)]
            other = anchor.colour if word == anchor.kind else anchor.kind
            assert tokenizer.decode(found[place]) == other


@pytest.mark.parametrize("form", ["told", "alone", "symbol"])
def test_questions_of_one_step_have_nothing_to_find_first(form):
    plan = Plan(NAME, "questions", 0, 3, batch=2, objects=6, sides=(256, 256), world="hop",
                forms=(form,))  # fmt: skip
    assert "found" not in draw_batch(plan)
