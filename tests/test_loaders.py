"""Loaders of the public sets, on small made files in the published formats; what is broken or
missing is named."""

import json
import os
import pickle
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import corelens as cl
from corelens.cli.app import app
from corelens.data import files, video
from corelens.data.check import check
from corelens.data.mlvu import mlvu
from corelens.data.mm_niah import mm_niah
from corelens.data.mmdocir import mmdocir
from corelens.data.mmlongbench import PROMPTS, mmlongbench
from corelens.data.mmlongbench_doc import mmlongbench_doc
from corelens.data.public import SETS, recognise
from corelens.data.refcocog import refcocog
from corelens.data.scoring import RULES, score
from corelens.data.vidstg import vidstg
from corelens.inputs.pictures import Later, read_picture
from helpers import published
from helpers.families import tiny

MMLONGBENCH = ("infoseek", "vh_single", "retrieval-text", "retrieval-image", "counting-image", "cars196", "gov", "mmlongdoc", "slidevqa")  # fmt: skip


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    return {name: make(root / name) for name, make in published.MAKERS.items()}


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


def all_of(name, root) -> list[cl.Sample]:
    if name == "mmlongbench":
        return [sample for task in MMLONGBENCH for sample in cl.data.load_data(root, task=task)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cl.data.load_data(root)


def alike(a, b) -> float:
    return np.corrcoef(np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel())[0, 1]


# --- each set: what is read


def test_refcocog(copies):
    first, two = refcocog(copies["refcocog"])
    assert (
        first.question
        == "Please provide the bounding box of the region this sentence describes: the man in red"
    )
    assert first.images[0].endswith(
        "images/mscoco/images/train2014/COCO_train2014_000000000000.jpg"
    )
    assert first.regions == [cl.Box(12, 8, 60, 40.5)]
    assert first.answer == "[125, 125, 625, 633]" and two.meta["expression"] == "a man on the left"
    assert (first.id, two.id) == ("refcocog-umd-val-0", "refcocog-umd-val-1")
    assert (
        len(refcocog(copies["refcocog"], "test")) == 2
        and len(refcocog(copies["refcocog"], by="google")) == 4
    )
    masked = refcocog(
        copies["refcocog"], region="mask", units="pixels", prompt="Where is {expression}?", n=1
    )[0]
    mask = masked.regions[0].mask
    assert (
        mask.shape == (64, 96)
        and mask[10, 55]
        and not mask[38, 15]
        and abs(mask.sum() - 48 * 32.5 / 2) < 90
    )
    assert masked.answer == "[12, 8, 60, 40]" and masked.question == "Where is the man in red?"


def test_vidstg(copies):
    who, what = vidstg(copies["vidstg"], frames=6)
    numbers = [6, 10, 14, 18, 22, 26]  # the middles of six parts of frames 4 to 28
    assert who.meta["frames"] == numbers and who.meta["fps"] == pytest.approx(2.5)
    assert who.question == "who is watching the ball?" and (who.answer, what.answer) == (
        "child",
        "ball",
    )
    assert what.meta["answers"] == ["ball", "sports ball"]
    tube = who.regions[0].boxes
    # frames 14 and 18
    assert {i: (box.x0, box.x1) for i, box in tube.items()} == {2: (8, 28), 3: (16, 36)}
    levels = [np.asarray(read_picture(frame, "")).mean() for frame in who.video]
    np.testing.assert_allclose(levels, [8 * number for number in numbers], atol=3)
    stated = vidstg(copies["vidstg"], form="captions")[0]
    assert (
        stated.question
        == "Which object does this sentence describe? the child is watching the ball."
    )


def test_a_short_moment_of_a_video_gets_a_frame(copies):
    sample_ = vidstg(copies["vidstg"], frames=2)[
        0
    ]  # frames 10 and 22 miss the moment from 12 to 21
    assert sample_.meta["frames"] == [10, 16] or sample_.meta["frames"] == [16, 22]
    assert len(sample_.regions[0].boxes) == 1


def test_mmdocir(copies):
    total, which, where = mmdocir(copies["mmdocir"])
    # points, twice as many pixels
    assert total.regions == [cl.Box(20, 40, 60, 81, image=4, text="Total 42")]
    # clipped to its page; the empty one is left out
    assert which.regions == [cl.Box(10, 10, 100, 160, image=1)]
    assert where.regions == [cl.Box(0, 0, 120, 160, image=2)] and len(where.images) == 3
    # rows 3 to 8 are the pages of b.pdf; JPEG changes them a little
    for page, seed in enumerate(range(3, 9)):
        shown = read_picture(total.images[page], "")
        assert alike(shown, published.picture(seed, (120, 160))) > 0.4
        assert alike(shown, published.picture(seed + 1, (120, 160))) < 0.1
    near = mmdocir(copies["mmdocir"], "page", pages=3)
    assert near[0].meta["pages"] == [3, 4, 5] and near[0].regions == [
        cl.Box(0, 0, 120, 160, image=1)
    ]
    assert near[1].meta["pages"] == [0, 1, 2] and [box.image for box in near[1].regions] == [1, 2]


def test_mmlongbench_doc(copies):
    many, which, colour, when = mmlongbench_doc(copies["mmlongbench_doc"])
    # pages count from 1
    assert [(box.image, box.x1, box.y1) for box in many.regions] == [(1, 100, 141), (3, 100, 141)]
    assert which.regions[0].image == 0 and not colour.regions and not when.regions
    page = read_picture(many.images[3], "")
    assert page.size == (100, 141) and alike(page, published.picture(3, (100, 141))) > 0.4
    assert mmlongbench_doc(copies["mmlongbench_doc"], n=1, pages=2, dpi=72)[0].images[0].size == (
        50,
        71,
    )


def test_mmlongbench(copies):
    root = copies["mmlongbench"]
    sample_ = mmlongbench(root)[0]
    assert sample_.question == "About document abc: What range?" and sample_.answer == "0-375 miles"
    assert sample_.regions == [cl.Box(0, 0, 64, 64, image=1)]  # page 4 of abc, not of xyz
    kinds = [part["type"] for part in sample_.messages[0]["content"]]
    assert kinds == ["text", "image"] * 3 + ["text", "text"] and len(sample_.images) == 3
    assert mmlongbench(root, "slidevqa")[0].regions[0].image == 1  # page 1 is the file of slide 2
    assert [box.image for box in mmlongbench(root, "retrieval-image")[0].regions] == [1]
    assert mmlongbench(root, "retrieval-image")[0].answer == "B"
    counted = mmlongbench(root, "counting-image")[0]
    assert counted.answer == "[1, 0]" and len(counted.images) == 3
    assert mmlongbench(root, "infoseek")[0].meta["answers"] == ["Gaudí", "Antoni Gaudí"]
    assert mmlongbench(root, "gov")[0].answer == "Why:\nIt was due."
    shots = mmlongbench(root, "cars196")[0]
    assert len(shots.images) == 3 and shots.images[2].endswith("cars/3.jpg") and shots.answer == "1"
    assert (
        mmlongbench(root, prompt="{question} {context}")[0].messages[0]["content"][0]["text"]
        == sample_.question
    )
    assert set(PROMPTS) == {"vrag", "NIAH", "ICL", "summ", "documentQA"}


def test_mlvu(copies):
    with pytest.warns(UserWarning, match="1 questions left out"):
        (sample_,) = mlvu(copies["mlvu"], frames=5)
    assert sample_.choices[2] == "Takes" and sample_.answer == "C" and not sample_.regions
    levels = [np.asarray(read_picture(frame, "")).mean() for frame in sample_.video]
    # seconds 0.3, 0.9, …
    np.testing.assert_allclose(levels, [8 * number for number in (3, 9, 15, 21, 27)], atol=3)
    assert mlvu(copies["mlvu"], "9_summary")[0].meta["scoring"] == "gpt-4"


def test_mm_niah(copies):
    root = copies["mm_niah"]
    (words,) = mm_niah(root, "retrieval-text")
    assert words.answer == "kitchen" and not words.regions
    assert [score(words, text) for text in ("In the kitchen.", "the kitchenette")] == [1, 0]
    (count,) = mm_niah(root, "counting-text")
    assert [
        score(count, text) for text in ("[2, 4]", "[2, 5]", "```json\n[2, 4]```", "2 and 4")
    ] == [1, 0.5, 1, 0]
    (image,) = mm_niah(root, "retrieval-image")
    (region,) = image.regions
    assert (region.image, image.answer) == (1, "B")
    shown = [part.get("text", "<image>") for part in image.messages[0]["content"]]
    assert shown[:3] == ["Once ", "<image>", " and "] and "\nB. a dog\nAnswer with" in shown[-1]
    (pictured,) = mm_niah(root, "reasoning-image")
    assert [Path(picture).name for picture in pictured.images] == [
        "cat.jpg",
        "needle.jpg",
        "dog.jpg",
        "cat.jpg",
    ]
    assert pictured.answer == "A" and [score(pictured, text) for text in ("A", "B")] == [1, 0]
    assert not list(SETS["mm_niah"].stream(root, "reasoning-image", longest=8000))


def test_videomme(copies):
    short, long = SETS["videomme"].videomme(copies["videomme"], frames=5)
    assert short.choices == ["Four.", "Three.", "Five.", "None."] and short.answer == "C"
    assert score(short, "C. Five.") == 1 and score(long, "C") == 0
    levels = [np.asarray(read_picture(frame, "")).mean() for frame in short.video]
    # seconds 0.3, 0.9, … of 3
    np.testing.assert_allclose(levels, [8 * number for number in (3, 9, 15, 21, 27)], atol=3)
    (only,) = SETS["videomme"].videomme(copies["videomme"], "long", frames=2)
    assert only.id == "videomme-001-2"


# --- through a model


@pytest.mark.parametrize("name", published.MAKERS)
def test_every_set_runs_through_a_model(model, copies, name):
    samples = all_of(name, copies[name])
    for kind, metric in (("marked", "ram"), ("unmarked", "visual_mass")):
        of_kind = [sample for sample in samples if bool(sample.regions) == (kind == "marked")]
        if of_kind:
            scores = cl.score_heads(model, of_kind, [metric], batch_size=2)[metric]
            assert scores.per_sample.shape == (len(of_kind), model.cfg.n_layers, model.cfg.n_heads)
            assert (scores.per_sample > 0).all() and (scores.per_sample < 1).all()
    short = [sample for sample in samples if sample.answer and sample.meta["scoring"] in RULES]
    assert len(cl.evaluate(model, short, batch_size=4).per_sample) == len(short)


def test_nothing_is_decoded_before_a_model_reads_it(copies, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    monkeypatch.setattr(Later, "read", refuse)
    assert all(all_of(name, root) for name, root in copies.items())


def test_n_and_seed(copies):
    root = copies["refcocog"]
    every = [sample.id for sample in refcocog(root, by="google")]
    assert [sample.id for sample in cl.data.load_data(root, n=3, by="google")] == every[:3]
    drawn = [
        [sample.id for sample in refcocog(root, by="google", n=2, seed=seed)] for seed in range(20)
    ]
    assert drawn[0] == [sample.id for sample in refcocog(root, by="google", n=2, seed=0)]
    assert {name for names in drawn for name in names} == set(every) and all(
        names == sorted(names, key=every.index) for names in drawn
    )


def test_samples_can_be_kept_in_our_own_format(copies, tmp_path):
    samples = vidstg(copies["vidstg"], n=1, frames=3)
    cl.data.save_samples(samples, tmp_path)
    (back,) = cl.data.load_data(tmp_path)
    assert (
        back.question == samples[0].question
        and back.regions[0].boxes.keys() == samples[0].regions[0].boxes.keys()
    )
    assert (
        np.asarray(Image.open(back.video[1])) == np.asarray(read_picture(samples[0].video[1], ""))
    ).all()


# --- what is missing or broken

NEEDED = {
    "refcocog": (
        "refcocog/instances.json",
        "refcocog/refs(umd).p",
        "images/mscoco/images/train2014",
    ),
    "vidstg": ("vidor/training", "video"),
    "mmdocir": ("MMDocIR_annotations.jsonl", "MMDocIR_pages.parquet"),
    "mmlongbench_doc": ("samples.json", "documents"),
    "mmlongbench": ("mmlb_data/documentQA/mmlongdoc_K8.jsonl", "mmlb_image"),
    "mlvu": ("video/2_needle",),
    "mm_niah": ("mm_niah_val/annotations/retrieval-image.jsonl", "mm_niah_val/images"),
    "videomme": ("data",),
}


@pytest.mark.parametrize(
    ("name", "gone"), [(name, gone) for name, needed in NEEDED.items() for gone in needed]
)
def test_a_missing_file_is_named_with_its_place(copies, tmp_path, name, gone):
    root = shutil.copytree(copies[name], tmp_path / name)
    shutil.rmtree(root / gone) if (root / gone).is_dir() else (root / gone).unlink()
    with pytest.raises(cl.CorelensError) as caught:
        cl.data.load_data(root)
    assert str(root / gone) in str(caught.value) and "docs/data.md" in str(caught.value)
    report = check(root)
    # then other parts are whole
    if gone not in (
        *("refcocog/refs(umd).p", "mmlb_data/documentQA/mmlongdoc_K8.jsonl"),
        "mm_niah_val/annotations/retrieval-image.jsonl",
    ):
        assert any(str(root / gone) in (part.missing or "") for part in report.parts)
    else:
        assert report.usable


def test_check_says_what_is_there(copies):
    report = check(copies["vidstg"])
    assert report.set == "vidstg" and report.usable and report.pictures == 1 and not report.broken
    assert [(part.name, part.samples, part.regions, part.missing) for part in report.parts] == [
        ("val", 2, 2, None)
    ]
    report = check(copies["mmlongbench"])
    assert [part.name for part in report.parts if part.samples] == [
        f"{task} K8" for task in MMLONGBENCH
    ]
    assert "left out" in check(copies["mlvu"]).parts[0].notes[0]


def test_the_command(copies, tmp_path):
    run = CliRunner().invoke(app, ["data", "check", str(copies["mmdocir"])])
    assert (
        run.exit_code == 0
        and "mmdocir" in run.output
        and "0 of 9 pictures cannot be read" in run.output
    )
    root = shutil.copytree(copies["mmlongbench_doc"], tmp_path / "doc")
    (root / "documents/report.pdf").write_bytes(b"%PDF-1.4 cut off")
    run = CliRunner().invoke(app, ["data", "check", str(root), "--json"])
    report = json.loads(run.output)
    assert (
        run.exit_code == 1 and not report["usable"] and "report.pdf" in next(iter(report["broken"]))
    )
    with pytest.raises(cl.CorelensError, match="cannot be read"):
        mmlongbench_doc(root)


@pytest.mark.parametrize("how", ["gone", "no picture", "cut off"])
def test_few_broken_pictures_are_left_out_and_many_are_an_error(tmp_path, how):
    root = published.refcocog(tmp_path / "many", count=103)
    pictures = root / "images/mscoco/images/train2014"

    def spoil(number: int) -> str:
        file = pictures / f"COCO_train2014_{number:012d}.jpg"
        whole = file.read_bytes()
        file.unlink() if how == "gone" else file.write_bytes(
            b"text" if how == "no picture" else whole[: len(whole) // 2]
        )
        return file.name

    name = spoil(7)
    with pytest.warns(
        UserWarning, match=f"1 of 102 pictures cannot be read: .*{name} .*2 samples are left out"
    ):
        assert len(refcocog(root)) == 202
    report = check(root)
    assert report.usable and len(report.broken) == 1 and name in next(iter(report.broken))
    spoil(8)
    with pytest.raises(cl.CorelensError, match="2 of 102 pictures"):
        refcocog(root)
    assert not check(root).usable


def test_a_pickle_with_code_in_it_is_refused_and_not_run(copies, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hurt"),)

    root = shutil.copytree(copies["refcocog"], tmp_path / "bad")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (root / "refcocog/refs(umd).p").write_bytes(pickle.dumps([Bomb()], protocol=protocol))
        with pytest.raises(cl.CorelensError, match="mkdir"):
            refcocog(root)
    (root / "refcocog/refs(umd).p").write_bytes(b"cposix\nsystem\n(S'touch hurt'\ntR.")
    with pytest.raises(cl.CorelensError, match=r"posix\.system"):
        refcocog(root)
    assert not (tmp_path / "hurt").exists()


WRONG = {
    "another format": ("vidstg", "annotations/val_annotations.json", '[{"video": "1"}]', "without vid"),
    "no JSON": ("mlvu", "json/2_needle.json", "{", "cannot be read"),
    "no JSON in a line": ("mmdocir", "MMDocIR_annotations.jsonl", "\n{", "line 2"),
    "no table": ("mmdocir", "MMDocIR_pages.parquet", "text", "cannot be opened"),
    "no refs": ("refcocog", "refcocog/refs(umd).json", "{}", "a list of refs"),
    "no list": ("mmlongbench_doc", "samples.json", "{}", "a list of questions"),
    "too few pictures": ("mmlongbench", "mmlb_data/documentQA/mmlongdoc_K8.jsonl", '{"question": "<image>", "answer": "", "doc_name": "", "page_list": [], "answer_format": ""}', "1 places for pictures and 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_file_of_another_format_is_named(copies, tmp_path, kind):
    name, file, content, message = WRONG[kind]
    root = shutil.copytree(copies[name], tmp_path / name)
    (root / file).write_text(content)
    with pytest.raises(cl.CorelensError, match=message):
        cl.data.load_data(root)


def test_videos_that_are_cut_off_or_none(copies, tmp_path):
    root = shutil.copytree(copies["vidstg"], tmp_path / "vidstg")
    file = root / "video/0000/2401075277.mp4"
    published.write_video(file, 10)
    with pytest.raises(cl.CorelensError, match="10 frames, asked for frame 10"):
        read_picture(vidstg(root, frames=6)[0].video[2], "frame")
    assert "asked for frame" in next(iter(check(root).broken.values()))
    published.write_video(file, 30, size=(32, 48))
    video._decoded_by_number.cache_clear()
    with pytest.raises(cl.CorelensError, match="32 × 48 pixels"):
        read_picture(vidstg(root, frames=5)[0].video[2], "frame")
    file.write_bytes(b"text")
    with pytest.raises(cl.CorelensError, match="cannot be opened"):
        read_picture(vidstg(root, frames=4)[0].video[2], "frame")


@pytest.mark.parametrize(
    ("package", "name"),
    [("av", "vidstg"), ("pypdfium2", "mmlongbench_doc"), ("pyarrow.parquet", "mmdocir")],
)
def test_a_missing_library_is_named(copies, tmp_path, monkeypatch, package, name):
    # another path, so that nothing is remembered of it
    root = shutil.copytree(copies[name], tmp_path / name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(cl.CorelensError, match=r"corelens\[data\]"):
        for sample in cl.data.load_data(root):
            for picture in files.pictures(sample):
                read_picture(picture, "")


def test_folders_that_hold_none_or_two(copies, tmp_path):
    assert {name: recognise(root) for name, root in copies.items()} == {name: name for name in SETS}
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(cl.CorelensError, match=r"notes\.txt.*\n.*refcocog"):
        cl.data.load_data(tmp_path)
    both = shutil.copytree(copies["mlvu"], tmp_path / "both")
    shutil.copytree(copies["mmdocir"], both, dirs_exist_ok=True)
    with pytest.raises(cl.CorelensError, match="mmdocir and mlvu"):
        cl.data.load_data(both)
    for folder_name, advice in (("refcoco", "did you mean"), (tmp_path / "gone", "check the name")):
        with pytest.raises(cl.CorelensError, match=advice):
            cl.data.load_data(folder_name)
    assert len(cl.data.load_data("refer", n=2)) == 2


def test_options_may_follow_a_name(copies):
    (sample,) = cl.data.load_data("refer:sides=[320,384],objects=8", n=1, seed=3)
    (same,) = cl.synthetic("refer", 1, seed=3, sides=(320, 384), objects=8)
    assert (sample.question, sample.regions) == (same.question, same.regions)
    root = copies["refcocog"]
    google = [sample.id for sample in cl.data.load_data(root, by="google")]
    assert (
        google
        == [sample.id for sample in cl.data.load_data(f"{root}:by=google")]
        != [s.id for s in cl.data.load_data(root)]
    )
    with pytest.raises(cl.CorelensError, match="wheels"):
        cl.data.load_data("video:wheels=4", n=1)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("refcocog", {"split": "test", "by": "google"}), ("vidstg", {"split": "val", "frames": 0}), ("mmdocir", {"level": "word"}),
     ("mmlongbench", {"task": "mmlu"}), ("mlvu", {"task": "count"}),
     ("mm_niah", {"task": "find"}), ("videomme", {"duration": "hours"})],
)  # fmt: skip
def test_wrong_options_name_the_right_ones(copies, name, wrong):
    with pytest.raises(cl.CorelensError, match="choose"):
        next(SETS[name].stream(copies[name], **wrong))
