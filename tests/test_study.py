"""The study on the bundled model, and the command line as its user meets it."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import corelens as cl
from corelens.study import CONTROLLED, KINDS, RANKINGS


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


@pytest.fixture(scope="module")
def result(model, tmp_path_factory):
    samples = cl.synthetic("refer", 48, seed=11)
    samples[20].question = "What digit is on the <script>alert(1)</script> circle?"
    out = tmp_path_factory.mktemp("study")
    options = {"draws": 2, "fractions": (0.05, 0.1), "score_share": 20 / 48, "progress": False}
    return cl.study(model, {"refer": samples}, out=out, **options)


def test_the_numbers_are_those_of_the_tools_it_is_made_of(model, result):
    samples = cl.synthetic("refer", 48, seed=11)
    world = result.worlds[0]
    assert (world.scored, world.evaluated) == (20, 28)
    ram = cl.score_heads(model, samples[:20], ["ram"])["ram"]
    np.testing.assert_allclose(world.ram.values, ram.values, atol=1e-6)
    top = world.selection("top", CONTROLLED[0])
    assert top.points["zero"].draws == [ram.top(0.05).to_json()]
    by_hand = cl.evaluate(model, samples[21:], cl.ablate(ram.top(0.05), "zero"))
    assert top.points["zero"].accuracy.value == pytest.approx(by_hand.accuracy, abs=1.01 / 28)  # one question is edited
    roles = ["top"] * len(RANKINGS) + ["bottom"] * 2 + ["random"] + ["layer-matched"] * 2
    assert [s.role for s in world.selections] == roles
    tops = {tuple(head) for s in world.selections if s.role == "top" for head in s.points["zero"].draws[0]}
    assert not tops & {tuple(head) for draw in world.selection("random").points["zero"].draws for head in draw}
    cut = cl.evaluate(model, samples[21:], cl.knockout(None, rows="question", columns="region"))
    assert world.readers["question"].accuracy.value == pytest.approx(cut.accuracy, abs=1.01 / 28)
    for selection in world.selections:
        assert set(selection.points) == set(KINDS)
        for point in selection.points.values():
            assert point.accuracy.low <= point.accuracy.value <= point.accuracy.high
            assert point.drop.value == pytest.approx(world.clean.accuracy - point.accuracy.value)
    at5 = {name: points[0].accuracy for name, points in world.sweeps[0].curves.items()}
    assert at5[f"top, {CONTROLLED[0]}"] == top.points["mean"].accuracy


def test_the_report_is_one_offline_file_that_escapes_what_it_shows(result):
    page = result.report.read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("data:", "#"))]
    assert links == []
    assert page.count("<figure") >= 4 and len(page) < 5_000_000
    written = json.loads((result.report.parent / "report.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert sorted(path.name for path in result.report.parent.iterdir()) == ["report.html", "report.json"]
    assert "<table" in result._repr_html_()


def test_mistakes_are_named(model, tmp_path):
    samples = cl.synthetic("refer", 12, seed=3)
    with pytest.raises(cl.CorelensError, match="10 or more"):
        cl.study(model, samples[:5], out=None)
    for sample in samples:
        sample.answer = "a giraffe"
    with pytest.raises(cl.CorelensError, match="answers none"):
        cl.study(model, samples, out=tmp_path / "report", progress=False)
    assert not (tmp_path / "report").exists()  # nothing half-written


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "corelens", *arguments], capture_output=True, text=True, timeout=300)


def test_command_line_mistakes_are_one_message_without_a_trace():
    done = run("demo", "--model", "qwen3vl-xxl")
    assert done.returncode == 2 and "qwen3vl-s" in done.stderr and "Traceback" not in done.stderr
    done = run("--help")
    assert done.returncode == 0 and "demo" in done.stdout and "train-demo" in done.stdout


def test_models_are_listed():
    cards = json.loads(run("models", "--json").stdout)
    assert "qwen3vl-s" in cards
