"""CoreLens's own format: what is written is read back, and what is wrong is named by file, line and
field."""

import json

import numpy as np
import pytest
from PIL import Image

import corelens as cl
from corelens.data.folder import load_samples, save_samples
from helpers.samples import picture


@pytest.fixture
def folder(tmp_path):
    mask = np.zeros((64, 96), dtype=bool)
    mask[10:30, 20:50] = True
    samples = [
        cl.Sample(images=[picture(0), picture(1)], question="Größe?", answer="7", id="a", choices=["x", "y"], meta={"k": 1},
                  regions=[cl.Box(1, 2, 30.5, 40, image=1, text="7"), cl.Mask(mask)]),
        cl.Sample(video=[picture(2), picture(3)], question="When?", regions=[cl.Tube({1: cl.Box(1, 1, 9, 9)})], id="b"),
    ]  # fmt: skip
    save_samples(samples, tmp_path)
    return tmp_path


def test_round_trip(folder):
    first, two = load_samples(folder)
    assert (first.id, first.question, first.answer, first.choices, first.meta) == (
        "a",
        "Größe?",
        "7",
        ["x", "y"],
        {"k": 1},
    )
    assert first.regions[0] == cl.Box(1, 2, 30.5, 40, image=1, text="7")
    assert first.regions[1].mask.sum() == 20 * 30 and first.regions[1].mask.shape == (64, 96)
    assert (
        len(two.video) == 2
        and two.regions[0].boxes == {1: cl.Box(1, 1, 9, 9)}
        and two.answer is None
    )
    assert (np.asarray(Image.open(first.images[0])) == np.asarray(picture(0))).all()


WRONG = {
    "no JSON": ("{", "(all)"),
    "unknown field": ('{"images": ["p.png"], "question": "q", "regoins": []}', "regoins"),
    "no question": ('{"images": ["p.png"]}', "question"),
    "no picture": ('{"question": "q", "images": ["gone.png"]}', "images[0]"),
    "both": ('{"question": "q", "images": ["p.png"], "video": ["p.png"]}', "images"),
    "box of three": ('{"question": "q", "images": ["p.png"], "regions": [{"box": [1, 2, 3]}]}', "regions[0].box"),
    "box of text": ('{"question": "q", "images": ["p.png"], "regions": [{"box": ["1", 2, 3, 4]}]}', "regions[0].box"),
    "empty box": ('{"question": "q", "images": ["p.png"], "regions": [{"box": [5, 5, 1, 1]}]}', "regions[0]"),
    "no such image": ('{"question": "q", "images": ["p.png"], "regions": [{"box": [1, 1, 5, 5], "image": 1}]}', "regions[0].image"),
    "tube": ('{"question": "q", "images": ["p.png"], "regions": [{"tube": {"0": [1, 1, 5, 5]}}]}', "regions[0]"),
    "answer": ('{"question": "q", "images": ["p.png"], "answer": 7}', "answer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_line_is_named(tmp_path, kind):
    picture(0).save(tmp_path / "p.png")
    good = json.dumps({"images": ["p.png"], "question": "q"})
    line, field = WRONG[kind]
    (tmp_path / "samples.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(cl.CorelensError) as caught:
        load_samples(tmp_path)
    assert f"line 3, field {field!r}" in str(caught.value) and "samples.jsonl" in str(caught.value)


def test_folders_and_ids(tmp_path):
    with pytest.raises(cl.CorelensError, match=r"samples\.jsonl"):
        load_samples(tmp_path)
    picture(0).save(tmp_path / "p.png")
    line = json.dumps({"images": ["p.png"], "question": "q", "id": "x"})
    (tmp_path / "samples.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(cl.CorelensError, match="'x'"):
        load_samples(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", {"a": 1}), ("id", None), ("id", " "), ("id", True), ("id", 1.5),
        ("regions", [{"box": [0, 0, 1, 1], "text": 5}]),
    ],
)  # fmt: skip
def test_ids_and_texts_are_what_the_format_says(tmp_path, field, value):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    record = {"images": ["a.png"], "question": "What?", field: value}
    (tmp_path / "samples.jsonl").write_text(json.dumps(record))
    with pytest.raises(cl.CorelensError, match=rf"line 1, field '{field}"):
        load_samples(tmp_path)


def test_what_the_format_does_not_hold_is_refused_before_anything_is_written(tmp_path):
    picture = Image.new("RGB", (40, 30))
    for samples, words in (
        ([cl.Sample(picture, "a", id="x"), cl.Sample(picture, "b", id="x")], "two samples"),
        ([cl.Sample(picture, "a", meta={"f": print})], "meta is no JSON"),
        ([cl.Sample(question="a")], "without a picture"),
    ):
        with pytest.raises(cl.CorelensError, match=words):
            save_samples(samples, tmp_path)
        assert not (tmp_path / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"images": 3}, "images of type int"),
        ({"regions": 5}, "regions=5"),
    ],
)
def test_a_sample_of_wrong_types_is_refused_where_it_is_made(fields, words):
    with pytest.raises(cl.CorelensError, match=words):
        cl.Sample(**fields, id="x")
    assert cl.Sample(images=None).images == []
