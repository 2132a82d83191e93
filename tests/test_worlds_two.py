"""The worlds compare and hop, whose questions take two shapes of a picture; and emoji, things on
photographs."""

import importlib
from collections import Counter

import numpy as np
import pytest

from corelens.data.synthetic import synthetic
from corelens.data.synthetic.drawing import DIGITS, LETTERS
from corelens.errors import CorelensError


def picture(sample):
    return np.asarray(sample.images[0])


def differs_within(a, b, boxes):
    """Whether two pictures differ, and within these boxes alone."""
    changed = (picture(a) != picture(b)).any(-1)
    inside = np.zeros(changed.shape, bool)
    for x0, y0, x1, y1 in boxes:
        inside[int(y0) : int(y1), int(x0) : int(x1)] = True
    return changed.any() and not changed[~inside].any()


def test_compare_asks_two_shapes_and_answers_from_both():
    forms = Counter()
    for sample in synthetic("compare", 200, seed=1):
        meta = sample.meta
        a, b = (meta["objects"][i] for i in meta["pair"])
        names = [(o["colour"], o["kind"]) for o in meta["objects"]]
        assert len(set(names)) == len(names) and meta["published"]
        assert [box.bounds for box in sample.regions] == [a["box"], b["box"]]
        assert [box.text for box in sample.regions] == [a["symbol"], b["symbol"]]
        first, second = (sample.question.index(f"{o['colour']} {o['kind']}") for o in (a, b))
        assert first < second and a["colour"] != b["colour"] and a["kind"] != b["kind"]
        for asked in (a, b):  # a twin by one trait with another symbol, so both words are needed
            twins = [
                o
                for o in meta["objects"]
                if (o["colour"] == asked["colour"]) != (o["kind"] == asked["kind"])
            ]
            assert any(o["symbol"] != asked["symbol"] for o in twins)
        x, y = a["symbol"], b["symbol"]
        answers = {"same": "yes" if x == y else "no"}
        if x in DIGITS:
            answers |= {"larger": max(x, y), "smaller": min(x, y), "sum": str(int(x) + int(y))}
        assert sample.answer == answers[meta["form"]]
        assert (x in LETTERS) == (meta["form"] == "same")
        forms[meta["form"]] += 1
    assert min(forms.values()) > 30 and len(forms) == 4


def test_no_answer_of_compare_is_likelier_than_another():
    for form, answers in (
        ("larger", "123456789"),
        ("smaller", "012345678"),
        ("same", ["yes", "no"]),
        ("sum", range(19)),
    ):
        counts = Counter(s.answer for s in synthetic("compare", 200, seed=2, forms=[form]))
        expected = 200 / len(answers)
        assert set(counts) == {str(answer) for answer in answers}
        assert max(abs(count - expected) for count in counts.values()) < 4 * expected**0.5


def test_repeated_letters_do_not_tell_yes_from_no():
    pairs = {"yes": Counter(), "no": Counter()}
    for sample in synthetic("compare", 100, seed=3, forms=["same"]):
        letters = Counter(o["symbol"] for o in sample.meta["objects"])
        pairs[sample.answer][sorted(letters.values())[-3:] == [1, 2, 2]] += 1
    assert pairs["yes"][False] == pairs["no"][False] == 0


def test_hop_takes_two_steps():
    for sample in synthetic("hop", 200, seed=1):
        meta = sample.meta
        objects, form = meta["objects"], meta["form"]
        asked, anchor = objects[meta["asked"]], objects[meta["anchor"]]
        name = "kind" if form == "colour" else "colour"
        assert anchor[name] in sample.question and anchor[form] not in sample.question
        assert [o[name] for o in objects].count(anchor[name]) == 1
        assert [o for o in objects if o[form] == anchor[form] and o is not anchor] == [asked]
        assert (
            len({(o["colour"], o["kind"]) for o in objects})
            == len(objects)
            == len({o["symbol"] for o in objects})
        )
        assert sample.answer == asked["symbol"]
        assert [box.bounds for box in sample.regions] == [asked["box"], anchor["box"]]


def test_without_its_first_step_hop_leaves_as_many_shapes_as_the_docs_say():
    for sample in synthetic("hop", 100, seed=2):
        objects, form = sample.meta["objects"], sample.meta["form"]
        seen = Counter(o[form] for i, o in enumerate(objects) if i != sample.meta["anchor"])
        alone = [
            o for o in objects if seen[o[form]] == 1 and o is not objects[sample.meta["anchor"]]
        ]
        assert objects[sample.meta["asked"]] in alone and len(alone) == len(objects) - 3


def test_hide_covers_the_first_step_and_nothing_else():
    for clear, hidden in zip(synthetic("hop", 10), synthetic("hop", 10, hide=True), strict=True):
        box = clear.meta["objects"][clear.meta["anchor"]]["box"]
        assert differs_within(clear, hidden, [box]) and hidden.answer == clear.answer
        inside = picture(hidden)[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])]
        assert (inside == 128).all() and not hidden.meta["published"]


@pytest.mark.parametrize("world", ["compare", "hop"])
def test_turned_scenes_have_another_answer_and_one_other_symbol(world):
    for turn in (1, 3):
        for sample, turned in zip(
            synthetic(world, 40), synthetic(world, 40, turn=turn), strict=True
        ):
            assert sample.question == turned.question and sample.answer != turned.answer
            boxes = [box.bounds for box in sample.regions]
            assert boxes == [box.bounds for box in turned.regions] and differs_within(
                sample, turned, boxes
            )
            assert (
                sum(a.text != b.text for a, b in zip(sample.regions, turned.regions, strict=True))
                == 1
            )


@pytest.mark.parametrize("world", ["compare", "hop"])
def test_varied_wording_changes_words_alone(world):
    plain, varied = (
        synthetic(world, 30, seed=4, wording=wording) for wording in ("plain", "varied")
    )
    assert len({a.question == b.question for a, b in zip(plain, varied, strict=True)}) == 2
    assert len({"the" in sample.question for sample in varied}) == 1
    openings = {" ".join(sample.question.split()[:2]) for sample in varied}
    assert len(openings) > len({" ".join(sample.question.split()[:2]) for sample in plain})


@pytest.mark.parametrize("world", ["compare", "hop"])
@pytest.mark.parametrize(
    "options",
    [
        {"objects": 3},
        {"objects": 40},
        {"forms": []},
        {"forms": "sum"},
        {"forms": ["mood"]},
        {"wording": "loud"},
        {"sides": (96, 96)},
        {"split": "exam"},
    ],
)
def test_impossible_scenes_and_options_say_what_to_do(world, options):
    with pytest.raises(CorelensError, match="to do"):
        synthetic(world, 1, **options)


@pytest.mark.parametrize("world", ["compare", "hop"])
@pytest.mark.parametrize("options", [{"objects": 5}, {"sides": (224, 256)}])
def test_below_the_minimum_nothing_is_published(world, options):
    assert not any(sample.meta["published"] for sample in synthetic(world, 3, **options))


# --- emoji

things = importlib.import_module("corelens.data.synthetic.emoji")


def test_emoji_has_one_answer_and_boxes_that_do_not_meet():
    names = set()
    for sample in synthetic("emoji", 60, seed=1):
        objects = sample.meta["objects"]
        (asked,) = [
            o for o in objects if sample.question == f"What digit is under the {o['name']}?"
        ]
        assert sample.answer == asked["symbol"] == sample.regions[0].text
        assert sample.regions[0].bounds == asked["box"] and sample.meta["published"]
        assert (
            len({o["symbol"] for o in objects}) == len({o["name"] for o in objects}) == len(objects)
        )
        width, height = sample.images[0].size
        for i, o in enumerate(objects):
            x0, y0, x1, y1 = o["box"]
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            assert all(
                x1 <= p["box"][0] or p["box"][2] <= x0 or y1 <= p["box"][1] or p["box"][3] <= y0
                for p in objects[:i]
            )
        names |= {o["name"] for o in objects}
    assert len(names) == len(things.NAMES) == 48


def test_the_region_of_emoji_holds_the_digit(monkeypatch):
    # JPEG spreads a change over its block
    monkeypatch.setattr(things, "_squeezed", lambda image, quality: image)
    for sample, turned in zip(synthetic("emoji", 20), synthetic("emoji", 20, turn=1), strict=True):
        assert sample.answer != turned.answer
        assert differs_within(sample, turned, [box.bounds for box in sample.regions])


def test_every_glyph_is_on_the_sheet():
    for name in things.NAMES:
        alpha = np.asarray(things._glyph(name))[..., 3]
        assert (
            0.15 < (alpha > 128).mean() < 0.95 and max(alpha.any(0).sum(), alpha.any(1).sum()) > 60
        )


def test_a_missing_picture_or_font_of_emoji_is_named(monkeypatch, tmp_path):
    for cached in (things._picture, things._font):
        cached.cache_clear()
    monkeypatch.setattr(things, "_PICTURES", tmp_path)
    with pytest.raises(CorelensError, match="install corelens again"):
        synthetic("emoji", 1)
    monkeypatch.undo()
    monkeypatch.setattr("matplotlib.get_data_path", lambda: str(tmp_path))
    with pytest.raises(CorelensError, match="matplotlib"):
        synthetic("emoji", 1)


@pytest.mark.parametrize(
    "options",
    [
        {"objects": 11},
        {"objects": 0},
        {"objects": 9, "sides": (128, 128)},
        {"quality": 0},
        {"sides": (64, 64)},
    ],
)
def test_impossible_scenes_of_emoji_say_what_to_do(options):
    with pytest.raises(CorelensError, match="to do"):
        synthetic("emoji", 1, **options)
