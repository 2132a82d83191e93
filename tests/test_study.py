"""The study on the bundled model: its numbers are those of the tools it is made of, and it survives what happens."""

import errno
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import corelens as cl
import published
from corelens.cli.app import app
from corelens.cli.study import default_worlds
from corelens.findings import setting
from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.zoo import zoo
from corelens.heads import disk
from families import tiny

OPTIONS = {
    "draws": 2,
    "kinds": ("zero", "knockout"),
    "fractions": (0.05,),
    "sweep_kinds": ("knockout",),
    "kept": (0.05,),
    "score_share": 20 / 44,
    "scenes": 2,
    "windows": 1,
    "sparse_samples": 8,
    "progress": False,
}


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


def scenes():
    samples = cl.synthetic("refer", 44, seed=11)
    samples[20].question = "What digit is on the <script>alert(1)</script> circle?"
    return samples


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def result(model, out):
    return cl.study(model, {"refer": scenes()}, out=out, command="corelens study <me>", **OPTIONS)


def test_the_numbers_are_those_of_the_tools_it_is_made_of(model, result):
    samples, numbers = scenes(), result.measured["refer"]
    mine = result.settings[0]
    assert (len(mine.to_score), len(mine.to_test)) == (20, 24)
    scores = cl.score_heads(model, samples[:20], list(RANKINGS.values()))
    for key in RANKINGS.values():
        np.testing.assert_allclose(mine.scores[key].values, scores[key].values, atol=1e-6)
    top = scores["ram[rows=last]"].top(0.05)
    line = next(x for x in numbers["table"] if (x["role"], x["ranking"]) == ("top", CONTROLLED[1]))
    assert line["ablations"]["zero"]["heads"] == [top.to_json()]
    clean = cl.evaluate(model, samples[20:])
    assert mine.clean.accuracy == clean.accuracy
    for kind, hooks in (("zero", cl.ablate(top, "zero")), ("knockout", cl.knockout(top))):
        by_hand = cl.evaluate(model, samples[20:], hooks)
        assert line["ablations"][kind]["accuracy"]["value"] == pytest.approx(by_hand.accuracy)
        assert line["ablations"][kind]["drop"]["value"] == pytest.approx(clean.accuracy - by_hand.accuracy)
    cut = cl.evaluate(model, samples[20:], cl.knockout(None, rows="last+answer", columns="region"))
    assert numbers["readers"]["last+answer"]["accuracy"]["value"] == pytest.approx(cut.accuracy)
    others = cl.HeadSet([(i, j) for i in range(8) for j in range(12)]) - top
    blind = cl.evaluate(model, samples[20:], cl.knockout(others, rows="text", columns="visual"))
    kept = numbers["sufficiency"]["lines"][f"top, {CONTROLLED[1]}"][0]
    assert kept["accuracy"]["value"] == pytest.approx(blind.accuracy)
    tops = {tuple(head) for x in numbers["table"] if x["role"] == "top" for head in x["ablations"]["zero"]["heads"][0]}
    random = next(x for x in numbers["table"] if x["role"] == "random")["ablations"]["zero"]["heads"]
    assert len(random) == 2 and not tops & {tuple(head) for draw in random for head in draw}


def test_every_finding_is_there_with_claim_criterion_and_verdict(result):
    assert [finding.id for finding in result.findings] == [f"F{i}" for i in range(1, 9)]
    for finding in result.findings:
        assert finding.claim.criterion and finding.claim.source and finding.measured
        assert finding.verdict in ("reproduced", "not reproduced", "not judged")
    assert result.finding("F2").verdict == "not judged"  # one world alone
    assert result.finding("F5").verdict == "reproduced" and "last row" in result.finding("F5").scope
    what = [row[0] for row in result.beside]
    assert "cost of the top 5%" in what and "speed-up with the top heads full" in what


def test_the_report_is_one_offline_file_that_escapes_what_it_shows(result, out):
    page = result.report.read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page and "study &lt;me&gt;" in page
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("data:", "#"))]
    assert links == []
    anchors = set(re.findall(r'id="([^"]*)"', page))
    assert {link[1:] for link in re.findall(r'href="(#f\d[^"]*)"', page)} <= anchors
    assert page.count("<figure") >= 8 and len(page) < 5_000_000
    written = json.loads((out / "report.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    drawn = {path.name for path in (out / "figures").iterdir()}
    assert {"F5-ablation-refer-knockout.svg", "F5-ablation-refer-knockout.png"} <= drawn
    assert result._repr_html_().count("<tr>") == 9


def test_a_finished_study_is_not_run_again_and_another_one_is_refused(model, result, out, monkeypatch):
    monkeypatch.setattr(setting, "evaluate", None)
    monkeypatch.setattr(setting, "batches", None)
    again = cl.study(model, {"refer": scenes()}, out=out, **OPTIONS)
    assert [f.verdict for f in again.findings] == [f.verdict for f in result.findings]
    with pytest.raises(cl.CorelensError, match="another study|other options"):
        cl.study(model, {"refer": scenes()}, out=out, **OPTIONS | {"draws": 3})


def test_a_stopped_study_goes_on_where_it_stood(model, tmp_path, monkeypatch):
    samples = {"refer": scenes()[:24]}
    calls, real = [], setting.Setting.correct

    def dies(self, key, hooks):
        if len(self._runs) == 3:
            raise KeyboardInterrupt
        return real(self, key, hooks)

    monkeypatch.setattr(setting.Setting, "correct", dies)
    options = OPTIONS | {"findings": ["F1", "F5"], "score_share": 0.5}
    with pytest.raises(KeyboardInterrupt):
        cl.study(model, samples, out=tmp_path, **options)
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "work" / "refer" / "runs.jsonl").open("a").write('{"key": "torn')

    def counts(self, key, hooks):
        calls.append(key not in self._runs)
        return real(self, key, hooks)

    monkeypatch.setattr(setting.Setting, "correct", counts)
    cl.study(model, samples, out=tmp_path, **options)
    assert calls[:4] == [False, False, False, True]


def test_a_full_disk_is_said_and_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    real = disk.os.replace

    def full(a, b):
        if str(b).endswith("F1.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(a, b)

    monkeypatch.setattr(disk.os, "replace", full)
    with pytest.raises(cl.CorelensError, match="no room left"):
        cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, findings=["F1"], **OPTIONS)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith((".", "report", "F1"))]
    monkeypatch.undo()  # there is room again: it goes on from there
    again = cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, findings=["F1"], **OPTIONS)
    assert again.report.exists()


def test_a_model_that_answers_nothing_right_is_not_ablated(model, tmp_path):
    samples = cl.synthetic("refer", 12, seed=3)
    for sample in samples:
        sample.answer = "a giraffe"
    found = cl.study(model, samples, out=tmp_path, **OPTIONS)
    assert {f.id: f.verdict for f in found.findings}["F5"] == "not judged"
    assert "no ablation can cost" in found.finding("F5").skipped["samples"]
    assert "Ablation cannot be judged" in found.report.read_text()
    assert "concentration" in found.measured["samples"] and "table" not in found.measured["samples"]


def test_samples_without_regions_or_pictures(model, tmp_path):
    samples = cl.synthetic("refer", 24, seed=3)
    for sample in samples:
        sample.regions = []
    found = cl.study(model, {"plain": samples}, out=None, **OPTIONS)
    assert {f.verdict for f in found.findings} == {"not judged"} and found.report is None
    assert found.finding("F1").skipped == {"plain": "the samples have no regions"}
    samples = cl.synthetic("refer", 24, seed=3)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples[0].images = [tmp_path / "broken.png"]
    with pytest.raises(cl.CorelensError, match="pictures of 1 of 24 samples cannot be read"):
        cl.study(model, samples, out=None, **OPTIONS)
    with pytest.raises(cl.CorelensError, match="10 or more"):
        cl.study(model, samples[:5], out=None)
    with pytest.raises(cl.CorelensError, match="knockout among them"):
        cl.study(model, samples, out=None, kinds=("zero",))
    with pytest.raises(cl.CorelensError, match="F1, F2"):
        cl.study(model, samples, out=None, findings=["F9"])


def test_a_few_pictures_that_cannot_be_read_are_left_out_counted_and_listed(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples = [
        cl.Sample(
            images=[tmp_path / "plain.png"], question="What?", answer="7", regions=[cl.Box(0, 0, 9, 9)], id=str(i)
        )
        for i in range(101)
    ]
    samples[7].images = [tmp_path / "broken.png"]
    tiny_model = cl.HookedMLLM(*tiny("qwen3_vl"))
    found = cl.study(tiny_model, {"own": samples}, out=tmp_path / "out", findings=["F1"], **OPTIONS)
    assert len(found.settings[0].samples) == 100 and len(found.unreadable["own"]) == 1
    assert "1 samples of own were left out" in found.report.read_text() and "broken.png" in found.report.read_text()


def test_half_a_data_folder_and_a_wrong_one_are_named_before_a_model_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("corelens.demo.load_demo", None)
    half = published.vidstg(tmp_path / "half")
    shutil.rmtree(half / "video")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "notes.txt").write_text("")
    for folder, said in ((half, str(half / "video")), (tmp_path / "wrong", "notes.txt")):
        done = CliRunner().invoke(app, ["study", "qwen3vl-s", "--data", str(folder)])
        assert isinstance(done.exception, cl.CorelensError) and said in str(done.exception)


def test_the_zoo_gives_each_model_a_folder_and_long_prompts_fewer_samples(tmp_path):
    calls = []

    def study(models, worlds, out, **settings):
        calls.append((list(models), {world: len(samples) for world, samples in worlds.items()}, out))
        assert settings["command"] == f"corelens study {'folder/' * (out.name == 'b')}{out.name} --zoo --n 9 --seed 3"

    class Model:
        def prepare(self, samples):
            return SimpleNamespace(token_maps=[SimpleNamespace(all=range(int(one.question))) for one in samples])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["corelens.findings"], "study", study)
        lengths = {"short": "100", "longer": "512", "long": "4000"}
        worlds = {name: [cl.Sample(images=["a.png"], question=said)] * 240 for name, said in lengths.items()}
        list(zoo(["a", "folder/b"], lambda name: Model(), lambda name: worlds, tmp_path, " --n 9", seed=3))
    counts = {"short": 240, "longer": 120, "long": 40}
    assert calls == [(["a"], counts, tmp_path / "a"), (["b"], counts, tmp_path / "b")]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "corelens", *arguments], capture_output=True, text=True, timeout=300)


def test_command_line_mistakes_are_one_message_without_a_trace():
    done = run("demo", "--model", "qwen3vl-xxl")
    assert done.returncode == 2 and "qwen3vl-s" in done.stderr and "Traceback" not in done.stderr
    done = run("--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("demo", "study"))


def test_models_are_listed():
    cards = json.loads(run("models", "--json").stdout)
    assert "qwen3vl-s" in cards


def test_bundled_models_are_studied_on_what_their_cards_measured():
    assert default_worlds(["qwen3vl-m"]) == [
        "refer",
        "refer:jitter=8",
        "refer-hard",
        "video",
        "doc",
        "refer:sides=[960,1024],objects=24,jitter=8",
        "captions",
    ]
    assert default_worlds(["qwen3vl-s"]) == ["refer", "captions"]
    with pytest.raises(cl.CorelensError, match="no data for my/model"):
        default_worlds(["my/model"])
