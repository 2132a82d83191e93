"""The study on the bundled model and on hand-built ones: its rules, its numbers, and what happens
when it is stopped."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import corelens as cl
from corelens import testbed
from corelens.cli.app import app
from corelens.cli.study import default_worlds
from corelens.cli.study_tables import show_study
from corelens.disk import write
from corelens.disk.write import write_whole
from corelens.findings import f7_acceleration, world
from corelens.findings.faithfulness import known_circuit
from corelens.findings.feeders import feeders
from corelens.findings.options import BESIDE, LAST, Options
from corelens.findings.result import FINDINGS, Study
from corelens.findings.verdict import CANNOT, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED
from corelens.heads.head_set import HeadSet
from corelens.runs.lock import locked
from corelens.sparse import Streaming
from corelens.viz.study_beside import left_out
from helpers import published
from helpers.families import tiny

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "draws": 2, "curve_draws": 1, "kinds": ("zero", "knockout"), "shares": (0.05,), "score_share": 20 / 44,
    "effect_samples": 2, "sparse_samples": 4, "progress": False,
}  # fmt: skip
RULES = OPTIONS | {
    "draws": 20,
    "curve_draws": 1,
    "kinds": ("zero",),
    "effect_samples": 0,
    "without": BESIDE,
}
JUDGED = ["F1", "F2", "F4", "F5", "F6"]


# --- the test of the rules: models whose mechanism is known


def hand_built(model, findings=JUDGED, worlds=1, n=110):  # (fewer cannot exclude a cost of 5%)
    samples = {f"boards {seed}": testbed.samples(n, seed=seed) for seed in range(worlds)}
    rules = RULES | {"score_share": 10 / n}
    study = cl.study({"hand-built": model}, samples, out=None, findings=findings, **rules)
    return study, {finding.id: finding.verdict for finding in study.findings}


def test_an_ideal_core_model_passes():
    # F2 compares worlds; the others need no second
    _, verdicts = hand_built(testbed.core_model(), ["F2"], worlds=2, n=40)
    assert verdicts == {"F2": REPRODUCED}
    others = [finding for finding in JUDGED if finding != "F2"]
    study, verdicts = hand_built(testbed.core_model(), others)
    assert verdicts == dict.fromkeys(others, REPRODUCED)
    assert study.data["models"]["hand-built"]["reading"]["published"]
    (k,) = {
        part["numbers"]["F5"]["ram"]["k"]
        for part in study.data["models"]["hand-built"]["worlds"].values()
    }
    assert k == 2


def test_a_model_with_retrieval_spread_evenly_over_its_heads_fails():
    _, verdicts = hand_built(testbed.spread_model(), ["F1", "F5", "F6"], n=60)
    assert verdicts == dict.fromkeys(["F1", "F5", "F6"], NOT_REPRODUCED)


def test_nothing_is_reproduced_for_a_model_that_never_looks():
    study, verdicts = hand_built(testbed.blind_model(), n=40)
    assert verdicts == dict.fromkeys(JUDGED, CANNOT)
    assert "answers 0%" in study.finding("F5").overall.reason


def test_a_right_answer_that_does_not_hang_on_the_evidence_reproduces_nothing():
    """A model that is right without looking: every answer is the one that it always gives."""
    model, samples = testbed.blind_model(), testbed.samples(20, seed=3)
    answer = cl.evaluate(model, samples[:1]).per_sample[0].given.rstrip("…")
    for sample in samples:
        sample.answer = answer or "0"
    study = cl.study(model, samples, out=None, findings=JUDGED, **RULES)
    assert not {finding.verdict for finding in study.findings} & {REPRODUCED}


def test_published_ram_finds_the_known_circuit_and_visual_mass_does_not():
    readers = cl.HeadSet([(0, 0), (0, 1)])
    keys = [cl.metric("ram", reduce="mean"), cl.metric("visual_mass", reduce="mean")]
    ram, visual_mass = list(
        known_circuit(testbed.core_model(), testbed.samples(6, seed=1), readers, keys).values()
    )
    assert ram == 1.0 > visual_mass


# --- the bundled model


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
    return cl.study(
        model, {"<script>alert(2)": scenes()}, out=out, command="corelens study <me>", **OPTIONS
    )


def part(study):
    return next(iter(next(iter(study.data["models"].values()))["worlds"].values()))


def test_the_numbers_are_those_of_the_tools_it_is_made_of(model, result):
    samples, measured = scenes(), part(result)
    assert (measured["scored"], measured["tested"]) == (20, 24)
    scores = cl.score_heads(model, samples[:20], [cl.metric("ram", reduce="mean", rows="last")])
    (last,) = scores.values()
    np.testing.assert_allclose(measured["scores"][LAST], last.values, atol=2e-6)
    necessity, top = measured["numbers"]["F5"], last.top(0.05)
    assert necessity["judged"] == LAST and necessity[LAST]["top"]["heads"] == top.to_json()
    clean = cl.evaluate(model, samples[20:])
    assert measured["clean"]["value"] == clean.accuracy
    for kind, hooks in (("zero", cl.ablate(top, "zero")), ("knockout", cl.knockout(top))):
        by_hand = cl.evaluate(model, samples[20:], hooks)
        assert necessity[LAST]["top"][kind]["accuracy"] == pytest.approx(by_hand.accuracy)
        assert necessity[LAST]["top"][kind]["value"] == pytest.approx(
            clean.accuracy - by_hand.accuracy
        )
    others = cl.HeadSet([(i, j) for i in range(8) for j in range(12)]) - top
    blind = cl.evaluate(model, samples[20:], cl.knockout(others, rows="text", columns="visual"))
    assert measured["numbers"]["F6"]["alone"]["value"] == pytest.approx(blind.accuracy)
    scored = cl.evaluate(model, samples[:20])
    cut = cl.evaluate(model, samples[:20], cl.knockout(None, rows="last", columns="region"))
    assert measured["row_costs"]["last"]["value"] == pytest.approx(scored.accuracy - cut.accuracy)


def test_feeders_are_the_heads_that_path_patching_is_known_to_find(model, tmp_path):
    """As benchmarks/core_paths.py finds them: L0H6 and L0H4 tell the heads of layer 1 where to
    look."""
    samples = cl.synthetic("refer", 40, seed=21)
    of_model = world.World("refer", model, samples, Options(score_share=0.6), tmp_path)
    assert set(feeders(of_model, of_model.top(LAST, 0.05))) == set(cl.HeadSet([(0, 6), (0, 4)]))


def test_every_finding_has_a_verdict_in_the_words_of_the_study(result):
    assert [finding.id for finding in result.findings] == list(FINDINGS)
    for finding in result.findings:
        assert finding.verdict in (REPRODUCED, NOT_REPRODUCED, CANNOT, NOT_JUDGED)
    assert result.finding("F2").verdict == CANNOT  # one world alone
    # two random sets have no 95% quantile
    assert str(result.finding("F5").overall) == "not judged (n = 24)"
    assert "too short" in result.finding("F7").overall.reason
    assert "one token" in result.finding("F8").overall.reason
    with pytest.raises(cl.CorelensError, match="F9"):
        result.finding("F9")


def test_the_report_opens_with_the_mechanism_and_the_result_in_few_words(result):
    page = result.report.read_text()
    words = re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL)
    assert len(words.split()) < 1500
    first = page.index("does not read the evidence as the paper has it")
    assert first < page.index("F1 Functional sparsity") < page.index("<details>")
    assert page.count("<details>") >= 5 and page.count('class="small ink"><svg') >= 4


def test_the_opening_of_many_models_says_once_what_several_do(tmp_path):
    committed = Study.load(ROOT / "docs/study")
    assert len(committed.data["models"]) > 3
    committed.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("not read the evidence as the paper has it") == 1
    assert "qwen3vl-hop-l and qwen3vl-hop-control read the evidence at the question's tokens" in (
        page.replace("&#39;", "'")
    )


def test_what_was_left_out_is_told_by_worlds_that_lack_the_same():
    missing = ["F6 Sufficiency, doc", "F4 They localise, others spread, doc", "F8 Budgets, video"]
    report = {"models": {"a": {"left_out": missing}, "b": {"left_out": []}}}
    assert left_out(report) == [
        "Of a was left out, at the limit of its core-hours: F4, F6 on doc; F8 on video."
    ]


def test_the_report_is_one_offline_file_that_escapes_what_it_shows(result):
    page = result.report.read_text()
    assert (
        "<script>alert" not in page
        and "&lt;script&gt;alert(2)" in page
        and "study &lt;me&gt;" in page
    )
    links = [
        link
        for link in re.findall(r'(?:src|href)="([^"]*)"', page)
        if not link.startswith(("data:", "#"))
    ]
    assert links == [] and len(page) < 500_000
    assert result._repr_html_().count("<tr>") == 9 and result.plot("F1").axes


def test_an_old_report_is_judged_and_drawn_again_from_its_json_alone(result, out, tmp_path):
    again = Study.load(out)
    assert [f.overall for f in again.findings] == [f.overall for f in result.findings]
    again.write(tmp_path)
    assert (tmp_path / "report.html").read_text() == result.report.read_text()
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
        (out / "report.json").read_text()
    )
    with pytest.raises(cl.CorelensError, match="twice"):
        Study.join([again, result])
    other = Study(json.loads(json.dumps(again.data)))
    other.data["models"] = {"second": next(iter(other.data["models"].values()))}
    joint = Study.join([again, other])
    joint.write(tmp_path / "joint")
    assert joint.finding("F1").verdicts.keys() == {"qwen3vl-s", "second"}
    assert "Details of second" in joint.report.read_text()


def test_a_finished_study_is_not_run_again_and_another_one_is_refused(
    model, result, out, monkeypatch
):
    monkeypatch.setattr(world, "evaluate", None)
    monkeypatch.setattr(world, "batches", None)
    again = cl.study(
        model, {"<script>alert(2)": scenes()}, out=out, command="corelens study <me>", **OPTIONS
    )
    assert [f.overall for f in again.findings] == [f.overall for f in result.findings]
    with pytest.raises(cl.CorelensError, match="another study|other options"):
        cl.study(model, {"<script>alert(2)": scenes()}, out=out, **OPTIONS | {"draws": 3})


def test_a_folder_of_an_older_version_is_named_and_kept(model, tmp_path):
    (tmp_path / "a" / "work").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "work" / "study.json").write_text('{"models": {}}')
    (tmp_path / "b" / "report.json").write_text('{"format": "corelens-study/2"}')
    for folder in ("a", "b"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(cl.CorelensError, match="corelens-study/2"):
            cl.study(model, {"refer": scenes()}, out=tmp_path / folder, **OPTIONS)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(cl.CorelensError, match="corelens-study/2"):
        Study.load(tmp_path / "b")
    with pytest.raises(cl.CorelensError, match="not there"):
        Study.load(tmp_path / "a")


def test_a_stopped_study_goes_on_where_it_stood(model, tmp_path, monkeypatch):
    samples = {"refer": scenes()[:16]}
    calls, real = [], world.World.correct

    def dies(self, key, hooks):
        if len(self._runs) == 3:
            raise KeyboardInterrupt
        return real(self, key, hooks)

    monkeypatch.setattr(world.World, "correct", dies)
    options = OPTIONS | {"findings": ["F1", "F5"], "score_share": 0.5, "effect_samples": 0}
    with pytest.raises(KeyboardInterrupt):
        cl.study(model, samples, out=tmp_path, **options)
    assert not (tmp_path / "report.html").exists()
    (runs,) = (tmp_path / "work").rglob("runs.jsonl")
    with runs.open("a") as file:
        file.write('{"key": "torn')

    def counts(self, key, hooks):
        calls.append(key not in self._runs)
        return real(self, key, hooks)

    monkeypatch.setattr(world.World, "correct", counts)
    cl.study(model, samples, out=tmp_path, **options)
    assert calls[:4] == [False, False, False, True]


def test_f7_is_the_loss_by_hand_and_keeps_every_run(model, tmp_path, monkeypatch):
    monkeypatch.setattr(f7_acceleration, "SINK", 4)
    monkeypatch.setattr(f7_acceleration, "WINDOWS", (8, 24))
    samples = cl.synthetic("refer", 10, seed=5, sides=(128, 192), objects=2)
    of_model = world.World("refer", model, samples, Options(score_share=0.4), tmp_path)
    finding = f7_acceleration.Acceleration(allowed=1.0)
    measured = finding.measure(of_model, [of_model], LAST)

    def lost(heads, window):
        sparse = cl.SparseInference(heads, Streaming(sink=4, window=window))
        dense = cl.evaluate(model, samples[4:]).accuracy
        return dense - cl.evaluate(model, samples[4:], sparse=sparse, rounds=0).accuracy

    top = of_model.top(LAST, 0.05)
    random_set = of_model.random_sets(LAST, len(top), 20)[0]
    for plan in measured["plans"]:
        assert plan["value"] == pytest.approx(lost(top, plan["window"]))
        assert plan["random"][0] == pytest.approx(lost(random_set, plan["window"]))
        assert len(plan["random"]) == 20
    narrow, wide = measured["plans"]
    assert (narrow["value"], narrow["random"]) != (wide["value"], wide["random"])
    monkeypatch.setattr(world, "answered_under", None)  # nothing is answered a second time
    again = world.World("refer", model, samples, Options(score_share=0.4), tmp_path)
    assert finding.measure(again, [again], LAST)["plans"] == measured["plans"]


def test_work_of_another_study_or_changed_on_the_disk_is_refused_by_name(
    model, result, out, tmp_path
):
    shutil.copytree(out, tmp_path / "out")
    (kept,) = (tmp_path / "out/work").rglob("F1.json")
    whole = kept.read_bytes()
    for words, why in (
        (whole.replace(b'"run": "', b'"run": "0', 1), "another run"),
        (whole.replace(b"0.", b"1.", 1), "checksum"),
        (whole[:40], "cannot be read"),
    ):
        kept.write_bytes(words)
        with pytest.raises(cl.CorelensError, match=f"F1.json.*{why}"):
            cl.study(model, {"<script>alert(2)": scenes()}, out=tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize("words", ["", "{", "[1]", "3"])
def test_a_broken_header_of_a_study_is_named(model, tmp_path, words):
    write_whole(tmp_path / "work" / "study.json", words)
    with pytest.raises(cl.CorelensError, match="study.json, which cannot be read"):
        cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, **OPTIONS)


def test_two_studies_do_not_write_one_folder(model, tmp_path):
    with (
        locked(write.make_folder(tmp_path / "work")),
        pytest.raises(cl.CorelensError, match="another launch"),
    ):
        cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, **OPTIONS)


def test_a_study_out_of_hours_says_what_it_left_out_and_goes_on_with_more(model, tmp_path):
    samples = {"refer": scenes()[:16]}
    options = OPTIONS | {"findings": ["F1", "F5"], "score_share": 0.5, "effect_samples": 0}
    short = cl.study(model, samples, out=tmp_path, **options, hours=1e-9)
    (of_model,) = short.data["models"].values()
    assert of_model["left_out"] == ["refer"] and "core-hours" in short.finding("F5").overall.reason
    assert "Of qwen3vl-s was left out" in short.report.read_text()
    seconds = next((tmp_path / "work").rglob("seconds.json"))
    seconds.write_text("3600")
    world_folder = seconds.parent / "refer"
    longer = cl.study(model, samples, out=tmp_path, **options, hours=2, without=["curves"])
    (of_model,) = longer.data["models"].values()
    assert of_model["left_out"] == [] and (world_folder / "F5.json").exists()
    assert json.loads(seconds.read_text()) > 3600
    # what is there is not run again, and what is not is left out: the curves
    last = cl.study(model, samples, out=tmp_path, **options, hours=1)
    (of_model,) = last.data["models"].values()
    assert of_model["left_out"] == ["Curves, refer"] and last.finding("F5").verdict == NOT_JUDGED


def test_what_stands_beside_the_findings(model, result):
    measured = part(result)
    design = measured["design"]
    keys = [point["key"] for point in design["points"]]
    assert len(keys) == len(set(keys)) == 48 + 2 and {"ram", LAST, "causal_knockout"} <= set(keys)
    top = HeadSet(next(point["heads"] for point in design["points"] if point["key"] == LAST))
    assert top == cl.HeadScores(np.array(measured["scores"][LAST])).top(0.05)
    few = scenes()[20:22]
    by_hand = cl.evaluate(model, few, cl.ablate(top, "zero")).accuracy
    (point,) = (point for point in design["points"] if point["key"] == LAST)
    assert point["zero"]["accuracy"] == pytest.approx(by_hand) and design["n"] == 2
    assert {"causal_knockout", "causal_attribution"} <= set(measured["faithfulness"])
    others = cl.score_heads(model, scenes()[20:], [LAST])[LAST]
    agreement = others.agreement(cl.score_heads(model, scenes()[:20], [LAST])[LAST])
    repeats = measured["repeats"]
    assert repeats["other samples"][LAST]["spearman"] == pytest.approx(agreement.spearman, abs=1e-6)
    assert len(repeats["wordings"]) == 2
    for role in ("top", "bottom"):
        cuts = measured["numbers"]["F5"][LAST][role]["knockout at"]
        assert set(cuts) == {"question", "last"}
    assert len(measured["numbers"]["F5"]["random at"]["last"]) == 1


def test_a_full_disk_is_said_and_leaves_nothing_half_written(model, tmp_path, monkeypatch):
    real = write.os.replace

    def full(a, b):
        if str(b).endswith("F1.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(a, b)

    options = OPTIONS | {"effect_samples": 0, "findings": ["F1"]}
    monkeypatch.setattr(write.os, "replace", full)
    with pytest.raises(cl.CorelensError, match="no room left"):
        cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, **options)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not [name for name in left if name != ".lock" and name.startswith((".", "report", "F1"))]
    monkeypatch.undo()  # there is room again: it goes on from there
    again = cl.study(model, {"refer": scenes()[:12]}, out=tmp_path, **options)
    assert again.report.exists()


def test_samples_without_regions_or_pictures(model, tmp_path):
    samples = cl.synthetic("refer", 24, seed=3)
    for sample in samples:
        sample.regions = []
    study = cl.study(model, {"plain": samples}, out=None, **OPTIONS)
    assert {finding.verdict for finding in study.findings} == {CANNOT} and study.report is None
    assert "the samples have no regions" in study.finding("F1").overall.reason
    samples = cl.synthetic("refer", 24, seed=3)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples[0].images = [tmp_path / "broken.png"]
    with pytest.raises(cl.CorelensError, match="pictures of 1 of 24 samples cannot be read"):
        cl.study(model, samples, out=None, **OPTIONS)
    with pytest.raises(cl.CorelensError, match="10 or more"):
        cl.study(model, samples[:5], out=None)
    with pytest.raises(cl.CorelensError, match="zero among them"):
        cl.study(model, samples, out=None, kinds=("knockout",))
    with pytest.raises(cl.CorelensError, match="F1, F2"):
        cl.study(model, samples, out=None, findings=["F9"])


def test_a_few_pictures_that_cannot_be_read_are_left_out_counted_and_listed(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    samples = []
    for i in range(101):
        box = cl.Box(0, 0, 9, 9)
        samples.append(
            cl.Sample(
                images=[tmp_path / "plain.png"],
                question="What?",
                answer="7",
                regions=[box],
                id=str(i),
            )
        )
    samples[7].images = [tmp_path / "broken.png"]
    study = cl.study(
        cl.HookedMLLM(*tiny("qwen3_vl")),
        {"own": samples},
        out=tmp_path / "out",
        findings=["F1"],
        **OPTIONS,
    )
    assert (
        part(study)["scored"] + part(study)["tested"] == 100
        and len(study.data["unreadable"]["own"]) == 1
    )
    page = study.report.read_text()
    assert "1 samples of own were left out" in page and "broken.png" in page


def test_half_a_data_folder_and_a_wrong_one_are_named_before_a_model_is_opened(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("corelens.demo.load_demo", None)
    half = published.vidstg(tmp_path / "half")
    shutil.rmtree(half / "video")
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "notes.txt").write_text("")
    for folder, message in ((half, str(half / "video")), (tmp_path / "wrong", "notes.txt")):
        done = CliRunner().invoke(app, ["study", "qwen3vl-s", "--data", str(folder)])
        assert isinstance(done.exception, cl.CorelensError) and message in str(done.exception)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "corelens", *arguments], capture_output=True, text=True, timeout=300
    )


def test_the_zoo_gives_each_model_its_own_folder_and_worlds_and_one_joint_report(tmp_path):
    options = ["--zoo", "--quick", "--n", "12", "--only", "F3", "--out", str(tmp_path), "--json"]
    options += [word for part in BESIDE for word in ("--without", part)]
    done = CliRunner().invoke(app, ["study", "qwen3vl-s", "internvl-q", *options])
    report = json.loads(done.stdout)
    assert list(report["models"]) == ["qwen3vl-s", "internvl-q"]
    assert report["command"].startswith("corelens study qwen3vl-s internvl-q --zoo --n 12")
    assert {name: next(iter(model["worlds"])) for name, model in report["models"].items()} == {
        "qwen3vl-s": "refer", "internvl-q": default_worlds(["internvl-q"])[0]
    }  # fmt: skip
    folders = [tmp_path / name for name in ("qwen3vl-s", "internvl-q")]
    assert all((folder / "report.html").exists() for folder in (tmp_path, *folders))


def test_the_printed_study_ends_with_three_numbers_and_the_reports_place(tmp_path, capsys):
    report = json.loads((ROOT / "docs/study/report.json").read_text())
    report["models"] = {"qwen3vl-s": report["models"]["qwen3vl-s"]}
    study = Study(report)
    study.write(tmp_path)
    show_study(study, json=False)
    *_, title, clean, top, random, place = capsys.readouterr().out.splitlines()
    part = report["models"]["qwen3vl-s"]["worlds"]["refer"]
    numbers = part["numbers"]["F5"]
    right = part["clean"]["value"]
    left = numbers[numbers["judged"]]["top"]["knockout"]["accuracy"]
    lowest = right * (1 - max(numbers["random"]["knockout"]))
    assert title.strip() == "Right answers, qwen3vl-s, refer, the evidence hidden from"
    assert clean.split()[0] == f"{100 * right:.0f}%" and "no head (of 200 samples)" in clean
    assert top.split()[0] == f"{100 * left:.0f}%" and "the top 5 of 96 heads" in top
    assert random.split()[0] == f"{100 * lowest:.0f}" and "5 random heads (20 draws)" in random
    assert place == f"The report: {tmp_path / 'report.html'}"


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
