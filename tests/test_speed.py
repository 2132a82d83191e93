"""Sparse inference measured: answers as generation gives them, reports that add up, settings
chosen, heads contrasted."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import corelens as cl
from corelens import testbed
from corelens.cli.app import app
from corelens.evaluation.answers import CI, Difference, Interval
from corelens.evaluation.contrast import budget_contrast, sparse_contrast
from corelens.evaluation.evaluate import batches
from corelens.evaluation.sparse_account import left_pairs, remarks
from corelens.evaluation.speed_report import PHASES, Side, SpeedReport
from corelens.evaluation.timing import kv_bytes, time_in_turns
from corelens.evaluation.tuning import tune_sparse
from corelens.hooks.rows import Call
from corelens.sparse import KVBudget, Pruned, SparseInference, Streaming
from helpers.families import tiny
from helpers.samples import sample

CIRCUIT = cl.HeadSet([(0, 0), (2, 2)])  # the testbed's where and copy heads


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def speaking(model):
    """Questions with answers of one to three digits, a hook under which the random model speaks in
    digits alone, and one digit that ends its answers."""
    digits = torch.tensor([model.to_single_token(str(i)) for i in range(10)])

    def digits_only(logits, hook):
        logits[..., digits] += 100.0

    samples = [sample(i, (64 + 32 * (i % 3), 64)) for i in range(6)]
    for i, sample_ in enumerate(samples):
        sample_.id = str(i)
    before = model.hf.generation_config.eos_token_id
    model.hf.generation_config.eos_token_id = None
    yield samples, [("hook_logits", digits_only)]
    model.hf.generation_config.eos_token_id = before


@pytest.fixture(scope="module")
def circuit():
    return testbed.circuit_model()


@pytest.fixture(scope="module")
def boards():
    return testbed.samples(12)


@pytest.fixture(scope="module")
def ranked():
    """Scores whose top two heads are the circuit."""
    values = np.random.default_rng(0).random((3, 4)).astype(np.float32)
    for head in CIRCUIT:
        values[head] = 2.0
    return cl.HeadScores(values)


def plans(model):
    scores = cl.HeadScores(
        np.random.default_rng(1).random((model.cfg.n_layers, model.cfg.n_heads)).astype(np.float32)
    )
    top_heads = scores.top(k=3)
    return {
        "full": SparseInference(top_heads, Streaming(sink=1, window=3)),
        "streaming": SparseInference(top_heads, Streaming(sink=1, window=3), decode="streaming"),
        "budget": SparseInference(kv_budget=KVBudget(scores, budget=6, window=2)),
    }


@pytest.mark.parametrize("which", ["full", "streaming", "budget"])
def test_answers_are_those_of_generation(model, speaking, which):
    """Exact match under a plan is what `generate` writes under it, in a padded batch; hooks run
    along."""
    samples, speak = speaking
    sparse = plans(model)[which]
    spoken = []
    for sample_ in samples:
        with model.sparse(sparse), model.hooks(fwd_hooks=speak):
            spoken.append(
                model.generate(model.prepare(sample_), max_new_tokens=4, do_sample=False)[
                    0
                ].tolist()
            )
    end = model.hf.generation_config.eos_token_id = spoken[0][2]
    try:
        for i, (sample_, tokens) in enumerate(zip(samples, spoken, strict=True)):
            wanted_tokens = tokens[: tokens.index(end)] if end in tokens else tokens[:3]
            sample_.answer = (
                model.tokenizer.decode(wanted_tokens if i % 3 else wanted_tokens[::-1]) or "7"
            )
        ev = cl.evaluate(model, samples, speak, batch_size=4, sparse=sparse, rounds=0)
        for sample_, tokens, answer in zip(samples, spoken, ev.per_sample, strict=True):
            gold = model.tokenizer(sample_.answer, add_special_tokens=False)["input_ids"]
            assert answer.correct == ([*gold, end] == tokens[: len(gold) + 1]), sample_.answer
        assert ev.speed is None
        dense = cl.evaluate(model, samples, speak)
        assert (
            max(
                abs(a.logprob - b.logprob)
                for a, b in zip(ev.per_sample, dense.per_sample, strict=True)
            )
            > 1e-3
        )
    finally:
        model.hf.generation_config.eos_token_id = None


@torch.no_grad()
def test_answer_rows_attend_fully_when_decoding_is_full(model, speaking):
    """Log-probability against one dense forward in which only the prompt's rows are masked, head by
    head."""
    samples, _ = speaking
    samples[0].answer = "731"
    sparse, window = plans(model)["full"], 3
    ev = cl.evaluate(model, samples[:1], sparse=sparse, rounds=0)
    inputs = model.prepare(samples[0], answer=True)
    token_map = inputs.token_maps[0]

    def hide(layer):
        def fn(scores, hook):
            rows, keys = torch.arange(scores.shape[2])[:, None], torch.arange(scores.shape[3])
            far = (keys > 0) & (rows - keys >= window) & (rows <= int(token_map.last))
            for head in range(scores.shape[1]):
                if (layer, head) not in sparse.heads:
                    scores[:, head].masked_fill_(far, -torch.inf)

        return fn

    hooks = [
        (f"blocks.{layer}.attn.hook_attn_scores", hide(layer))
        for layer in range(model.cfg.n_layers)
    ]
    rows = model.run_with_hooks(inputs, fwd_hooks=hooks)[0, token_map.answer - 1].log_softmax(-1)
    gold = inputs.tensors["input_ids"][0, token_map.answer]
    wanted = float(rows.gather(1, gold[:, None]).sum())
    assert len(gold) == 3 and ev.per_sample[0].logprob == pytest.approx(wanted, abs=1e-4)


def test_all_heads_full_is_dense(circuit, boards):
    every = [(layer, head) for layer in range(3) for head in range(4)]
    report = cl.evaluate(
        circuit, boards[:4], sparse=SparseInference(every, Streaming(1, 4)), rounds=2
    ).speed
    assert report.agreement.value == 1 and report.kl.value < 1e-6 and report.pairs == 1
    assert (
        report.difference.difference == 0
        and report.dense.accuracy.value == report.sparse.accuracy.value == 1
    )
    assert any("All heads are full" in note for note in report.notes)
    assert report.limit("attention") == report.limit("prefill") == 1
    assert set(report.phases) == set(PHASES) and all(
        len(report.dense.seconds[p]) == 8 for p in report.phases
    )
    seconds = {phase: np.array(report.dense.seconds[phase]) for phase in report.phases}
    assert (seconds["attention"] < seconds["prefill"]).all()
    assert (seconds["prefill"] + seconds["decode"] < seconds["end_to_end"]).all()
    cfg = circuit.cfg
    per_token = 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * 4
    # 8 new tokens, the last not stored
    assert report.dense.kv_bytes == per_token * (report.tokens["prompt"][-1] + 7)


def test_what_must_be_said_is_said(circuit, boards):
    with pytest.warns(UserWarning, match="cover question tokens in 1 of 1"):
        ev = cl.evaluate(
            circuit, boards[:1], sparse=SparseInference((), Streaming(1, 4, last=30)), rounds=1
        )
    assert any("No head is full" in note for note in ev.speed.notes)
    whole = cl.evaluate(
        circuit, boards[:1], sparse=SparseInference(CIRCUIT, Streaming(1, 500)), rounds=1
    ).speed
    assert any("cover the longest prompt" in note for note in whole.notes) and whole.kl.value < 1e-6
    slow = cl.evaluate(
        circuit,
        boards[:1],
        sparse=SparseInference(CIRCUIT, Streaming(1, 4), engine="reference"),
        rounds=1,
    ).speed
    assert any("reference engine" in note for note in slow.notes)
    budget = SparseInference(kv_budget=KVBudget(budget=8, window=4))
    short = cl.evaluate(circuit, boards[:1], sparse=budget, rounds=1).speed
    assert any("before anything is evicted" in note for note in short.notes)
    assert (
        short.sparse.kv_bytes != short.dense.kv_bytes
        and short.engine == "none: the prefill is dense"
    )
    # decoding is what a budget changes
    assert short.limit("prefill") == 1 and short.limit("end_to_end") is None
    assert (whole.engine, slow.engine) == ("split", "reference")
    assert not any("nothing is evicted" in note for note in short.notes)
    roomy = SparseInference(kv_budget=KVBudget(budget=500))
    assert any(
        "nothing is evicted" in note
        for note in remarks(roomy, circuit.cfg, [circuit.prepare(boards[:1])])
    )


def made(ratio=0.5, **options) -> SpeedReport:
    """A report of invented times: attention is half of the prefill; sparse takes `1 / ratio` of
    dense."""
    dense = {"vision": 1.0, "prefill": 2.0, "attention": 1.0, "decode": 0.1, "end_to_end": 4.0}
    rng = np.random.default_rng(0)

    def side(scale):
        runs = {
            phase: list(seconds * scale * rng.uniform(0.99, 1.01, 20))
            for phase, seconds in dense.items()
        }
        return Side(runs, 2 * 10**9, 10**6, Interval(0.9, 0.8, 1.0), -0.1)

    fields = {
        "pairs": 0.1,
        "tokens": {"prompt": [100, 120], "visual": [80, 80]},
        "samples": 20,
        "engine": "split",
    }
    fields |= {
        "plan": {"heads": [[0, 1]]},
        "notes": ["<b>not</b> escaped?"],
        "meta": {"machine": "invented"},
    } | options
    return SpeedReport(
        side(1.0), side(1 / ratio), Difference(-0.05, CI(-0.1, 0.0)), Interval(0.95, 0.9, 1.0),
        Interval(0.01, 0.0, 0.02), **fields,
    )  # fmt: skip


def test_slower_is_said_plainly_and_faster_only_beyond_the_spread():
    assert made(0.5).verdict.startswith("Sparse is slower than dense: end to end 0.50x")
    assert made(2.0).verdict.startswith("Sparse is faster than dense")
    assert made(1.0).verdict.startswith("Sparse is neither faster nor slower")


def test_limits_are_amdahls():
    report = made(1.5)
    assert report.limit("attention") == pytest.approx(10)
    assert report.limit("prefill") == pytest.approx(1 / (0.5 + 0.5 * 0.1), rel=0.02)
    assert report.limit("end_to_end") == pytest.approx(1 / (0.75 + 0.25 * 0.1), rel=0.02)
    assert report.limit("decode") is report.limit("vision") is None
    assert report.reached("attention") == pytest.approx(0.15, rel=0.02)
    assert made(pairs=None).limit("prefill") is None
    half = made()
    with pytest.raises(cl.CorelensError, match="as many of both"):
        replace(half, sparse=Side({"prefill": [1.0]}, None, None, half.kl, 0.0))


def test_reports_are_read_back_and_shown(tmp_path, capsys):
    report = made()
    report.save(tmp_path / "deep" / "speed.json")
    again = SpeedReport.load(tmp_path / "deep" / "speed.json")
    assert again == report and again.to_json() == json.loads(
        (tmp_path / "deep" / "speed.json").read_text()
    )
    assert report.show() is not None
    shown = capsys.readouterr().out
    assert "full heads: L0H1; 10% of the (query, key) pairs left" in shown
    assert (
        "slower than dense" in shown and "decoder prefill" in shown and "Note: <b>not</b>" in shown
    )
    report.save(tmp_path / "speed.html")
    page = (tmp_path / "speed.html").read_text()
    assert "<b>not</b>" not in page and "<svg" in page and "slower than dense" in page
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(cl.CorelensError, match="corelens-speed/1"):
        SpeedReport.load(tmp_path / "bad.json")
    with pytest.raises(cl.CorelensError, match="could not be read"):
        SpeedReport.load(tmp_path / "none.json")


def test_pairs_are_counted_as_the_plan_masks():
    """Against the plan's own mask, over patterns, layers and lengths."""
    cfg = SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2, heads=(4, 4, 4))

    def odd(b, h, q, k):
        return (q - k) % (h + 2) == 0

    heads = [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]
    call = Call(torch.nn.Module(), None, 1.0, True, None, None, None)
    for pattern in (
        Streaming(2, 5),
        Streaming(0, 1),
        Streaming(3, 4, last=6),
        Streaming(1, 90),
        Pruned(),
        odd,
    ):
        sparse = SparseInference(heads, pattern, layers={2: Streaming(1, 2)})
        seen = whole = 0
        for length in (37, 5):
            plan = sparse.plan(cfg)
            plan.begin(None, 0, length, 1, torch.device("cpu"), None)
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            query, key = torch.zeros(1, 4, length, 1), torch.zeros(1, 2, length, 1)
            for layer in range(3):
                visible = plan._visible(plan.pattern(layer), layer, query, key, call)
                seen += int((visible(None, None).expand(1, 4, length, length) & causal).sum())
                whole += 4 * int(causal.sum())
        assert left_pairs(sparse, cfg, (37, 5)) == pytest.approx(seen / whole)


def test_timing_undoes_itself_and_takes_turns(circuit, boards):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    runs = []

    def seen(z, hook):
        runs.append(circuit._sparse is not None)

    def breaks(z, hook):
        raise ZeroDivisionError

    sparse = SparseInference(CIRCUIT, Streaming(1, 4))
    prefill = [("blocks.0.attn.hook_z", lambda z, hook: seen(z, hook) if z.shape[1] > 1 else None)]
    dense, other, prompts = time_in_turns(
        circuit, boards[:1], sparse, prefill, rounds=3, new_tokens=2
    )
    assert runs[:8] == [False, True, True, False, False, True, True, False] and len(prompts) == 1
    assert all(len(seconds) == 3 for side in (dense, other) for seconds in side.seconds.values())
    with pytest.raises(ZeroDivisionError):
        time_in_turns(circuit, boards[:1], sparse, [("blocks.0.attn.hook_z", breaks)])
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before and circuit._sparse is None
    assert not circuit.layout.decoder(circuit.hf)._forward_pre_hooks
    assert kv_bytes(None) is None


def test_the_fastest_setting_within_the_tolerance_is_chosen_and_checked(circuit, boards, ranked):
    """The circuit's two heads suffice at any window; with the first alone nothing is right."""
    tuned = tune_sparse(
        circuit, boards, ranked, target=0.0, fractions=(1 / 12, 2 / 12), windows=(4, 16), rounds=0
    )
    assert [round(setting.accuracy.value, 2) for setting in tuned.curve[2:]] == [1.0, 1.0]
    assert tuned.curve[0].accuracy.value < 1
    assert tuned.best.heads == CIRCUIT and tuned.best.pattern.window == 4
    assert (
        len(tuned.checked.per_sample) == 6
        and tuned.checked.accuracy == 1
        and "held" in tuned.verdict
    )
    assert json.loads(json.dumps(tuned.to_json()))["chosen"]["window"] == 4
    assert tuned.plot() is not None and "Accuracy" in tuned._repr_html_()
    timed = tune_sparse(circuit, boards[:4], ranked, fractions=(2 / 12,), windows=(4,), rounds=1)
    assert timed.chosen.speedup.median > 0 and timed.chosen.pace == timed.chosen.speedup.median
    none = tune_sparse(
        circuit, boards[:4], ranked, 0.0, fractions=(1 / 12,), windows=(4,), rounds=0
    )
    assert (
        none.best is None
        and none.checked is None
        and none.verdict.startswith("No setting stays within")
    )
    for options, words in (
        ({"target": 1.5}, "target"),
        ({"calibration": 0.01}, "calibration"),
        ({"windows": ()}, "no settings"),
    ):
        with pytest.raises(cl.CorelensError, match=words):
            tune_sparse(circuit, boards, ranked, **options)


def test_contrast_finds_the_circuit(circuit, boards, ranked):
    contrast = sparse_contrast(
        circuit, boards, ranked, fractions=(2 / 12,), windows=(4,), sink=1, draws=2
    )
    assert {p.line for p in contrast.points} == {
        "no full head",
        "top",
        "bottom",
        "random",
        "layer-matched",
    }
    top, bottom = (contrast.point(line, 4, 2 / 12) for line in ("top", "bottom"))
    assert (
        top.accuracy.value == contrast.dense.accuracy == 1 and cl.HeadSet(top.heads[0]) == CIRCUIT
    )
    assert bottom.accuracy.value < 0.7
    against = next(d for d in contrast.differences() if d["control"] == "bottom" and d["x"] == 4)
    assert (
        against["accuracy"]["value"] == pytest.approx(1 - bottom.accuracy.value)
        and against["accuracy"]["low"] > 0
    )
    assert len(contrast.to_json()["points"]) == 5 and contrast.plot() is not None
    with pytest.raises(cl.CorelensError, match="lines"):
        contrast.point("top", 5)
    with pytest.raises(cl.CorelensError, match="one token"):
        budget_contrast(circuit, boards, ranked, budgets=(8,), window=4)


def test_budgets_are_contrasted_at_equal_keys(model, speaking):
    samples, _ = speaking
    for sample_ in samples:
        sample_.answer = "731"
    scores = cl.HeadScores(
        np.random.default_rng(2).random((model.cfg.n_layers, model.cfg.n_heads)).astype(np.float32)
    )
    contrast = budget_contrast(model, samples[:3], {"a": scores}, budgets=(6, 9), window=2, draws=2)
    assert {p.line for p in contrast.points} == {"by score, a", "uniform", "dealt at random, a"}
    for key, keys in contrast.meta["keys_kept"].items():
        assert keys == pytest.approx(int(key.split()[-1]), abs=0.5)
    by_hand = cl.evaluate(
        model,
        batches(model, samples[:3]),
        sparse=SparseInference(kv_budget=KVBudget(scores, 6, window=2)),
        rounds=0,
    )
    assert contrast.point("by score, a", 6).logprob == pytest.approx(
        [a.logprob for a in by_hand.per_sample], abs=1e-5
    )
    assert contrast.plot("answer_logprob") is not None


def test_mistakes_are_named(circuit, boards, ranked):
    with pytest.raises(cl.CorelensError, match="another model"):
        cl.evaluate(circuit, boards, sparse=SparseInference([(7, 0)], Streaming(1, 4)))
    with pytest.raises(cl.CorelensError, match="SparseInference"):
        cl.evaluate(circuit, boards, sparse=Streaming(1, 4))
    with pytest.raises(cl.CorelensError, match="rounds=-1"):
        cl.evaluate(circuit, boards, sparse=SparseInference(CIRCUIT, Streaming(1, 4)), rounds=-1)
    with pytest.raises(cl.CorelensError, match="another model"):
        tune_sparse(circuit, boards, cl.HeadScores(np.ones((9, 9), dtype=np.float32)))
    inputs = circuit.inputs(**circuit.prepare(boards[0]).tensors)
    with pytest.raises(cl.CorelensError, match="made of tensors"):
        cl.evaluate(circuit, [inputs], sparse=SparseInference(CIRCUIT, Streaming(1, 4)))


def test_command_speed(tmp_path):
    scores = cl.HeadScores(np.random.default_rng(0).random((8, 12)).astype(np.float32))
    scores.save(tmp_path / "ram.safetensors")
    other = cl.HeadScores(np.ones((9, 12), dtype=np.float32))
    other.save(tmp_path / "other.safetensors")
    start = [
        "speed",
        "qwen3vl-s",
        "refer",
        "--heads",
        str(tmp_path / "ram.safetensors"),
        "--n",
        "1",
        "--rounds",
        "1",
    ]
    run = CliRunner().invoke(
        app, [*start, "--sink", "1", "--window", "8", "--out", str(tmp_path / "out"), "--json"]
    )
    assert run.exit_code == 0, run.output
    printed = json.loads(run.stdout)
    assert (
        printed["plan"]["pattern"] == "Streaming(sink=1, window=8, last=0)"
        and len(printed["plan"]["heads"]) == 5
    )
    assert SpeedReport.load(tmp_path / "out" / "speed.json").to_json() == printed
    assert (tmp_path / "out" / "speed.html").is_file()
    run = CliRunner().invoke(app, [*start, "--top", "0", "--window", "8", "--n", "1"])
    assert run.exit_code == 0 and "No head is full" in run.stdout
    run = CliRunner().invoke(app, [*start, "--kv-budget", "40"])
    assert (
        run.exit_code == 0
        and "KV cache" in run.stdout
        and "before anything is evicted" in " ".join(run.stdout.split())
    )
    for wrong, words in (
        (["--window", "0"], "window=0"),
        (["--engine", "fastest"], "engine"),
        (["--heads", str(tmp_path / "other.safetensors")], "another model"),
    ):
        run = CliRunner().invoke(app, [*start, *wrong])
        assert isinstance(run.exception, cl.CorelensError) and words in str(run.exception)
