"""The commands that test heads causally say what the library says, write what they are asked for,
and explain mistakes."""

import json
import os
import shlex
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import corelens as cl
from corelens.cli import app as cli
from corelens.interventions.result import PatchResult

HEADS = cl.HeadSet(["L1H5", "L1H4"])
COMMANDS = ("ablate", "app", "doctor", "eval", "explore", "patch", "rows", "show", "speed", "study")


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


@pytest.fixture
def corelens(model, tmp_path, monkeypatch):
    """Runs a line of the command line in an empty folder; the model is loaded once."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        monkeypatch.setattr(
            f"corelens.cli.{command}.open_model", lambda name, dtype="auto", device=None: model
        )

    def run(line, fails=False):
        done = CliRunner().invoke(cli.app, shlex.split(line))
        assert fails or done.exit_code == 0, (done.output, done.exception)
        return done.exception if fails else done.stdout

    return run


def scores(folder, heads=HEADS):
    values = np.random.default_rng(0).random((8, 12)).astype(np.float32)
    for rank, head in enumerate(heads):
        values[head] = 3.0 - rank
    meta = {
        "key": "ram",
        "metric": "ram",
        "data": "refer",
        "samples": [s.id for s in cl.synthetic("refer", 3, seed=2)],
    }
    cl.HeadScores(values, meta=meta).save(folder / "ram.safetensors")


def test_ablate_says_what_evaluate_says(corelens, model, tmp_path):
    printed = json.loads(
        corelens("ablate qwen3vl-s refer --heads L1H5,L1H4 --kind knockout --n 8 --draws 2 --json")
    )
    samples = cl.synthetic("refer", 8, seed=2)
    clean, cut = cl.evaluate(model, samples), cl.evaluate(model, samples, hooks=cl.knockout(HEADS))
    point = printed["curves"]["given"][0]
    assert (
        point["heads"] == [HEADS.to_json()]
        and point["k"] == 2
        and printed["clean"]["value"] == clean.accuracy
    )
    assert point["accuracy"]["value"] == cut.accuracy < clean.accuracy
    lost = cl.paired(clean, cut)
    assert [*point["drop"].values()] == pytest.approx([lost.difference, *lost.ci])
    assert list(printed["curves"]) == ["given", "random", "layer-matched"]
    for name, controls in printed["curves"].items():
        drawn = [cl.HeadSet(heads) for heads in controls[0]["heads"]]
        assert len(drawn) == (1 if name == "given" else 2) and all(
            len(heads) == 2 for heads in drawn
        )
        assert name == "given" or not any(heads & HEADS for heads in drawn)
        assert name != "layer-matched" or all(set(heads.by_layer()) == {1} for heads in drawn)


def test_ablate_takes_the_top_of_scores_and_writes(corelens, model, tmp_path):
    scores(tmp_path)
    start = "ablate qwen3vl-s refer --scores ram.safetensors --n 3 --draws 1"
    text = corelens(f"{start} --top 0.02 --top 0.05 --kind zero --out made/cut.html")
    assert (
        "zero ablation (their output set to zero), top by ram; 3 samples" in text
        and "layer-matched" in text
    )
    assert "2.0% of the heads: L1H5, L1H4\n" in text and "scored on 3 of these samples" in " ".join(
        text.split()
    )
    page = (tmp_path / "made/cut.html").read_text(encoding="utf-8")
    assert (
        "<h1>Without the top heads</h1>" in page
        and page.count("<tr class=") == 8
        and "<svg role" in page
    )
    corelens(f"{start} --top 0.02 --kind resample --out cut.json")
    resampled = json.loads((tmp_path / "cut.json").read_text())
    others = model.prepare(cl.synthetic("refer", 8, seed=3))
    _, cache = model.run_with_cache(others, names_filter=lambda name: name.endswith("attn.hook_z"))
    hooks = cl.ablate(HEADS, "resample", reference=(cache, others))
    wanted = cl.evaluate(model, cl.synthetic("refer", 3, seed=2), hooks=hooks)
    assert resampled["curves"]["top"][0]["accuracy"]["value"] == wanted.accuracy
    for name in ("first.json", "again.json"):
        corelens(f"{start} --top 0.02 --kind zero --run kept --out {name}")
    assert list((tmp_path / "kept").glob("batch-*.json"))
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    both = corelens("ablate qwen3vl-s refer --heads L1H5 --run kept", fails=True)
    assert "it keeps a sweep" in str(both)


def test_score_and_ablate_say_when_a_ranking_is_read_where_a_cut_costs_nothing(corelens, tmp_path):
    text = " ".join(
        corelens(
            "score qwen3vl-s refer --n 8 --metric ram --metric 'ram[rows=last]' --out run"
        ).split()
    )
    assert "costs: question 0 points, template 0 points, last 100 points (n=8" in text
    assert (
        "note: ram: these heads look, and the answer does not need it (cutting rows=question off "
        "from it" in text
    )
    assert "rows=last costs 100 points: try 'ram[rows=last]'" in text and text.count("note:") == 1
    cut = "ablate qwen3vl-s refer --scores run --n 3 --draws 1 --kind zero"
    text = " ".join(corelens(cut).split())
    assert (
        "ram: these heads look, and the answer does not need it" in text
        and "last 100 points" in text
    )
    printed = json.loads(corelens(f"{cut} --metric 'ram[rows=last]' --json"))
    assert "note" not in printed and printed["row_costs"]["last"][0] == 1
    corelens("score qwen3vl-s refer --n 4 --no-rows --out bare")
    assert not (tmp_path / "bare" / "rows.json").exists() and "row_costs" not in json.loads(
        corelens("ablate qwen3vl-s refer --scores bare --n 3 --draws 1 --kind zero --json")
    )


def test_rows_says_what_where_read_says(corelens, model, tmp_path):
    printed = json.loads(
        corelens("rows qwen3vl-s refer --n 4 --no-tokens --out made/rows.json --json")
    )
    wanted = cl.where_read(model, cl.synthetic("refer", 4, seed=1), tokens=False)
    assert printed["rows"] == wanted.rows == "last" and list(printed["groups"]) == list(
        wanted.costs
    )
    assert printed["groups"]["last"]["cost"][0] == wanted.costs["last"].difference
    assert cl.evaluation.RowCosts.load(tmp_path / "made/rows.json").costs == wanted.costs
    shown = corelens("rows qwen3vl-s refer --n 9 --limit 2 --out rows.html")
    assert "question[0]" in shown and "the answer hangs on rows=last" in shown
    last = next(line for line in shown.splitlines() if line.startswith("  last"))
    assert "n=2" in shown and last.count("]") == 2  # 80 columns hold both intervals
    page = (tmp_path / "rows.html").read_text(encoding="utf-8")
    assert "<svg" in page and "question[0]" in page and "<script" not in page


def test_patch_says_what_activation_patch_says(corelens, model, tmp_path):
    printed = json.loads(
        corelens(
            "patch qwen3vl-s refer --n 2 --batch-size 1 --top 2 --out heads.safetensors --json"
        )
    )
    clean, twins = (cl.synthetic("refer", 2, seed=2, turn=turn) for turn in (0, 3))
    wanted = cl.activation_patch(model, clean, twins, site="z", metric=cl.logit_diff())
    assert np.allclose(printed["effect"], wanted.effect.mean(0), atol=1e-3)
    assert printed["twin"] == "refer, turn=3" and printed["metric"] == "logit difference"
    assert [f"L{row['layer']}H{row['head']}" for row in printed["top"]] == ["L1H4", "L1H5"]
    saved = PatchResult.load(tmp_path / "heads.safetensors")
    assert np.allclose(saved.values, wanted.values, atol=1e-3) and saved.samples == [
        sample.id for sample in clean
    ]


def test_patch_goes_on_where_it_was_stopped(corelens, tmp_path, monkeypatch):
    whole = json.loads(corelens("patch qwen3vl-s refer --n 2 --batch-size 1 --json"))
    patch_pairs, left = cl.activation_patch, [1]

    def stops(*arguments, **options):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return patch_pairs(*arguments, **options)

    monkeypatch.setattr("corelens.interventions.activation_patch", stops)
    line = "patch qwen3vl-s refer --n 2 --batch-size 1 --json --run kept"
    assert corelens(line, fails=True).code == 130
    assert [file.name for file in (tmp_path / "kept").glob("pairs-*")] == [
        "pairs-00000000.safetensors"
    ]
    left.append(1)  # the second pair, and no more
    assert json.loads(corelens(line)) == whole
    other = corelens(f"{line} --site v", fails=True)
    assert "which holds a run with another options" in str(other)


def test_patch_draws_heads_positions_and_roles(corelens, tmp_path):
    text = corelens("patch qwen3vl-s refer --n 2 --attribution --out heads.html")
    assert (
        "L1H4" in text
        and "attribution patching, denoising, z; logit difference: corrupted run -" in text
    )
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    assert (
        page.count("<rect") > 96
        and page.count("<img") == 4
        and "effect of denoising z (logit difference)" in page
    )
    text = corelens("patch qwen3vl-s refer --n 1 --site resid_post --twin blur --out where.png")
    assert (
        "(1 pair, twin: blur)" in text
        and "(patch)" in text
        and "log-probability of the answer (nats)" in text
    )
    assert Image.open(tmp_path / "where.png").width > 600
    text = corelens(
        "patch qwen3vl-s refer --n 2 --site resid_post --per role --twin replace --metric kl "
        "--direction noising"
    )
    assert "region" in text and "twin: replace" in text and "KL from the clean run" in text


def test_patch_takes_twins_from_a_folder(corelens, tmp_path):
    samples = cl.synthetic("refer", 2, seed=5)
    cl.data.save_samples(samples, tmp_path / "mine")
    cl.data.save_samples(
        cl.interventions.counterfactual_pairs(samples, "noise")[0][1:]
        + cl.interventions.counterfactual_pairs(samples, "noise")[1][1:],
        tmp_path / "twins",
    )
    printed = json.loads(
        corelens("patch qwen3vl-s mine --twin twins --site v --per kv_head --json")
    )
    assert (
        printed["axes"].keys() == {"kv_head"}
        and printed["samples"] == 2
        and printed["metric"].startswith("log-probability")
    )
    assert printed["base"] < printed["other"]


MODEL_LESS = """
import sys
from corelens.cli.app import app
from typer.testing import CliRunner
done = CliRunner().invoke(app, {line!r})
assert done.exit_code in (0, 2) or done.exception is None, (done.output, done.exception)
print(done.output, sorted({{"torch", "transformers", "scipy.stats", "matplotlib"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("line", ["--help", "--version", "heads ram.safetensors", "compare ram.safetensors ram.safetensors",
                                  "data check own", "score --help"])  # fmt: skip
def test_what_needs_no_model_waits_for_none(tmp_path, line):
    """A second is for torch and transformers alone; without them these answer in a third of it."""
    scores(tmp_path)
    cl.data.save_samples(cl.synthetic("refer", 2, seed=1), tmp_path / "own")
    done = subprocess.run(
        [sys.executable, "-c", MODEL_LESS.format(line=shlex.split(line))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("[]"), (
        done.stdout,
        done.stderr[-2000:],
    )
    assert line != "--version" or done.stdout.startswith(f"corelens {cl.__version__}")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("score qwen3vl-x refer", "did you mean 'qwen3vl-s'"),
        ("score qwen3vl-s reffer", "did you mean 'refer'"),
        ("score qwen3vl-s refer --metric rma", "did you mean 'ram'"),
        ("score qwen3vl-s refer --metric 'ram[row=last]'", "did you mean 'rows'? options: rows, "),
        ("score qwen3vl-s nothing_there", "the data 'nothing_there'"),
        ("score nowhere/at/all own --limit 0", "nowhere"),
        ("ablate qwen3vl-s refer --heads L99H0", "heads of another model"),
        ("speed qwen3vl-s refer --scores nowhere", "nowhere"),
        ("heads run", "a finished run"),
        ("compare run ram.safetensors --metrics ram", "a finished run"),
        ("rows qwen3vl-s reffer", "did you mean 'refer'"),
        ("rows qwen3vl-x refer", "did you mean 'qwen3vl-s'"),
        ("rows qwen3vl-s refer --out rows.gif", ".html, .json"),
        ("patch qwen3vl-s refer --twin blurr", "did you mean 'blur'"),
        ("patch qwen3vl-s refer --site resid_pst", "did you mean 'resid_post'"),
        ("patch qwen3vl-s refer --per laier", "did you mean 'layer'"),
        ("patch qwen3vl-s refer --direction denoise", "did you mean 'denoising'"),
        ("patch qwen3vl-s refer --metric logit", "did you mean 'logit_diff'"),
        ("ablate qwen3vl-s refer --heads L0H0 --kind knock", "did you mean 'knockout'"),
        ("ablate folder refer --heads L9H0", "a model of 2 layers × 4 heads"),
        ("speed qwen3vl-s refer --scores ram.safetensors --decode streem", "did you mean 'streaming'"),
        ("speed qwen3vl-s refer --scores ram.safetensors --engine splitt", "did you mean 'split'"),
        ("show a.png What? --rows questoin", "did you mean 'question'"),
        ("show a.png What? --model qwen3vl-s --heads L9H0", "heads of another model"),
        ("show a.png What? --model qwen3vl-s --scores other.safetensors", "heads of another model"),
        ("explore qwen3vl-s refer --scores other.safetensors", "heads of another model"),
        ("study", "--zoo, which takes"),
        ("study qwen3vl-x", "did you mean 'qwen3vl-s'"),
        ("study qwen3vl-s --data reffer", "did you mean 'refer'"),
        ("study qwen3vl-s --only F9", "one of F1, F2"),
        ("study qwen3vl-s qwen3vl-s", "two models called"),
        ("demo --model qwen3vl-x", "did you mean 'qwen3vl-s'"),
        ("doctor qwen3vl-x", "did you mean 'qwen3vl-s'"),
        ("doctor ram.safetensors", "which is a file"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_a_model_is_loaded(tmp_path, monkeypatch, line, words):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        monkeypatch.setattr(f"corelens.cli.{command}.open_model", load)
    scores(tmp_path)
    cl.HeadScores(np.eye(9)).save(tmp_path / "other.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    config = {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4}}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run").mkdir()
    done = CliRunner().invoke(cli.app, shlex.split(line))
    # (typer's own: a range)
    if done.exit_code == 2 and not isinstance(done.exception, cl.CorelensError):
        return
    assert isinstance(done.exception, cl.CorelensError) and words in str(done.exception), (
        done.exception
    )


def test_score_takes_part_of_a_folder_and_runs_are_compared(corelens, tmp_path):
    cl.data.save_samples(cl.synthetic("refer", 5, seed=1), tmp_path / "own")
    for out in ("one", "two"):
        corelens(f"score qwen3vl-s own --limit 3 --metric ram --metric lift --out {out} --json")
    assert (
        len(cl.HeadScores.load(tmp_path / "one" / "scores" / "ram.safetensors").meta["samples"])
        == 3
    )
    for line in ("compare one two --metrics ram,lift --json", "compare one two --json"):
        printed = json.loads(corelens(line))
        assert (
            printed.keys() == {"ram", "lift"}
            and printed["ram"]["spearman"] == 1 == printed["lift"]["jaccard"]
        )
    assert json.loads(corelens("compare one two --metric lift --json"))["rbo"] == pytest.approx(1)
    assert "did you mean 'ram'" in str(corelens("compare one two --metrics rma", fails=True))


def test_a_warning_is_one_line(monkeypatch, capsys):
    def warn(**_):
        warnings.warn("[these] heads look", stacklevel=1)

    monkeypatch.setattr(cli, "app", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "note: [these] heads look\n"


def test_speed_takes_its_window_from_the_prompts_and_refuses_what_leaves_nothing_out(
    corelens, tmp_path, monkeypatch
):
    scores(tmp_path)
    line = "speed qwen3vl-s refer --scores ram.safetensors --n 2 --rounds 1 --json"
    printed = json.loads(corelens(line))
    assert 0 < printed["pairs"] < 1

    def timed(*_, **__):
        raise AssertionError("it was timed")

    monkeypatch.setattr("corelens.evaluation.sparse_run.decoded", timed)
    for more in ("--window 4096", "--sink 4096 --window 1", "--top 1.0", "--kv-budget 4096"):
        assert "nothing is left out" in str(corelens(f"{line} {more}", fails=True))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ablate qwen3vl-s refer", "neither --scores nor --heads"),
        ("ablate qwen3vl-s refer --scores ram.safetensors --heads L0H0", "--scores and --heads"),
        ("ablate qwen3vl-s refer --heads L0H0 --kind halve", "one of zero, mean"),
        ("ablate qwen3vl-s refer --heads L0H0 --out cut.gif", ".html, .json"),
        ("ablate qwen3vl-s refer --heads , --n 1", "one head or more"),
        ("ablate qwen3vl-s refer --heads L8H0 --n 1", "heads of another model"),
        ("ablate qwen3vl-s refer --heads first --n 1", "a name like \"L3H5\""),
        ("ablate qwen3vl-s nowhere --heads L0H0", "the data 'nowhere'"),
        ("ablate qwen3vl-s refer --scores nowhere.safetensors", "nowhere.safetensors"),
        ("ablate qwen3vl-s refer --scores ram.safetensors --top 0.8 --n 1", "half of a model has no control"),
        ("patch qwen3vl-s refer --metric loss", "one of logit_diff"),
        ("patch qwen3vl-s refer --per layer,position", "--n 1"),
        ("patch qwen3vl-s refer --n 1 --site heads", "one of resid_pre"),
        ("patch qwen3vl-s refer --n 1 --direction both", "one of denoising, noising"),
        ("patch qwen3vl-s refer --n 1 --twin replace", "raise --n"),
        ("patch qwen3vl-s refer --n 1 --twin sharpen", "the data 'sharpen'"),
        ("patch qwen3vl-s refer --n 2 --twin doc", "twin"),
        ("patch qwen3vl-s refer --n 1 --per layer,head,role --out a.png", "--per layer,head"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained(corelens, tmp_path, line, words):
    scores(tmp_path)
    error = corelens(line, fails=True)
    assert isinstance(error, cl.CorelensError) and words in str(error), error


def test_every_command_shows_an_example_and_loses_no_brackets():
    """Help is set as Markdown: as rich markup, "[rows=last]" and "[default: …]" would vanish from
    it."""
    commands = [["--help"]]
    for group, app in (([], cli.app), (["data"], cli.data_app)):
        commands += [
            [*group, command.name or command.callback.__name__.replace("_", "-"), "--help"]
            for command in app.registered_commands
        ]
    assert {line[0] for line in commands} >= {"ablate", "patch", "speed", "study", "show", "data"}
    for line in commands:
        text = " ".join(CliRunner().invoke(cli.app, line, env={"COLUMNS": "200"}).stdout.split())
        assert line == ["--help"] or "Example:" in text, line
        if line[0] in ("speed", "ablate"):
            assert "'ram[rows=last]'" in text and "[default: 0.05]" in text


def test_a_mistake_is_one_message_and_exit_code_two(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["corelens", "patch", "qwen3vl-s", "refer", "--metric", "loss"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    text = capsys.readouterr().err
    assert stopped.value.code == 2 and "--metric loss" in text and "Traceback" not in text


def test_threads_wait_asleep_and_torch_is_not_loaded_before_that_is_said():
    """Spinning threads make a small model crawl beside other work."""
    script = (
        "import os, sys, corelens.cli.app as app; early = 'torch' in sys.modules\n"
        "sys.argv = ['corelens', 'models', '--json']\n"
        "try: app.main()\n"
        "except SystemExit: print(early, os.environ['OMP_WAIT_POLICY'], file=sys.stderr)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.stderr.split()[-2:] == ["False", "passive"], done.stderr
