"""CoreLens's own format: what is written is read back, and what is wrong is named by file, line and
field."""

import json

import numpy as np
import pytest

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
    from PIL import Image

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
