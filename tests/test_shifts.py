"""Distribution shifts: the same samples, other pictures or other words, exact regions."""

import numpy as np
import pytest
from PIL import Image

import corelens as cl
from corelens.data.synthetic.refer import COLOURS
from corelens.data.synthetic.shifts import PICTURES, SHIFTS, WORDS, shifted


@pytest.fixture(scope="module")
def samples():
    return cl.synthetic("refer", 6, seed=3)


@pytest.mark.parametrize("shift", PICTURES)
def test_a_shift_of_pictures_changes_pixels_alone(samples, shift):
    for before, after in zip(samples, shifted(samples, shift), strict=True):
        assert after.images[0].size == before.images[0].size
        assert (after.question, after.answer, after.id) == (
            before.question,
            before.answer,
            before.id,
        )
        assert (np.asarray(after.images[0]) != np.asarray(before.images[0])).mean() > 0.15


@pytest.mark.parametrize("shift", ["turned", "small"])
def test_a_region_moves_with_its_pixels(samples, shift):
    """On a white page whose region alone is black, the box goes around the black pixels."""
    for sample in samples:
        box = sample.regions[0]
        pixels = np.full((*np.asarray(sample.images[0]).shape[:2], 3), 255, np.uint8)
        pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = 0
        marked = cl.Sample(images=[Image.fromarray(pixels)], question="?", regions=[box])
        moved = shifted([marked], shift)[0]
        rows, columns = np.nonzero(np.asarray(moved.images[0]).max(-1) < 60)
        region = moved.regions[0]
        edges = np.array([region.x0, region.y0, region.x1, region.y1])
        black = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(edges - black).max() <= 2.5, (edges, black)


def test_the_background_changes_and_the_objects_stay(samples):
    for before, after in zip(samples, shifted(samples, "photograph"), strict=True):
        old, new = np.asarray(before.images[0]), np.asarray(after.images[0])
        outside = np.ones(old.shape[:2], bool)
        for thing in before.meta["objects"]:
            x0, y0, x1, y1 = (round(edge) for edge in thing["box"])
            assert (old[y0:y1, x0:x1] == new[y0:y1, x0:x1]).all()
            outside[y0:y1, x0:x1] = False
        assert (old[outside] != new[outside]).mean() > 0.8


def test_the_words_of_a_shift(samples):
    sample = samples[0]
    place = sample.question.removeprefix("What digit is ").removesuffix("?")
    assert shifted([sample], "which")[0].question == f"Which digit is {place}?"
    assert shifted([sample], "statement")[0].question == f"The digit {place} is"
    assert shifted([sample], "sentence")[0].answer == f"The digit {place} is {sample.answer}."


def test_half_of_the_named_objects_are_absent():
    samples = cl.synthetic("refer", 200, seed=5)
    answers = []
    for sample, after in zip(samples, shifted(samples, "named"), strict=True):
        words = after.question.removeprefix("Is there a ").removesuffix("?")
        shown = {f"{thing['colour']} {thing['kind']}" for thing in sample.meta["objects"]}
        assert (after.answer == "yes") == (words in shown) == bool(after.regions)
        answers.append(after.answer)
    assert 70 < answers.count("yes") < 130


def test_beside_a_single_object_something_else_is_absent():
    samples = cl.synthetic("refer", 40, seed=5, objects=1)
    answers = set()
    for sample, after in zip(samples, shifted(samples, "named"), strict=True):
        (thing,) = sample.meta["objects"]
        there = f"Is there a {thing['colour']} {thing['kind']}?" == after.question
        assert (after.answer == "yes") == there == bool(after.regions)
        answers.add(after.answer)
    assert answers == {"yes", "no"}


@pytest.mark.parametrize("shift", ["instruction", "question-first"])
def test_a_model_is_asked_in_the_new_order(samples, shift):
    """The question's tokens stay the question's; what is said besides is none of them."""
    model = cl.load_demo("qwen3vl-s")
    before = model.prepare(samples[:2]).token_maps
    after = model.prepare(shifted(samples[:2], shift)).token_maps
    for old, new in zip(before, after, strict=True):
        assert len(old.question) == len(new.question)
        assert len(old.region) == len(new.region)
        first = bool(new.question.max() < new.visual.min())
        assert first == (shift == "question-first")


def test_a_sample_keeps_its_shift_whatever_the_number(samples):
    for shift in SHIFTS:
        alone, many = shifted(samples[:1], shift)[0], shifted(samples, shift)[0]
        assert alone.question == many.question and alone.regions == many.regions
        assert np.array_equal(np.asarray(alone.images[0]), np.asarray(many.images[0]))


def test_what_cannot_be_shifted_is_refused(samples):
    with pytest.raises(cl.CorelensError, match="jpeg"):
        shifted(samples, "jpg")
    with pytest.raises(cl.CorelensError, match="one picture"):
        shifted(cl.synthetic("doc", 1), "noise")
    with pytest.raises(cl.CorelensError, match="objects"):
        shifted([cl.Sample(images=samples[0].images, question="What is it?")], "paper")
    with pytest.raises(cl.CorelensError, match="reads"):
        shifted([cl.Sample(images=samples[0].images, question="Is it red?")], "which")
    with pytest.raises(cl.CorelensError, match="colour"):
        shifted([cl.Sample(images=samples[0].images, question="Is it red?")], "named")
    assert set(PICTURES) | set(WORDS) == set(SHIFTS) and "red" in COLOURS
