"""Several processes share a run: the same bytes as one, whatever ends; what does not fit is
refused."""

import os
import signal
import time

import numpy as np
import pytest

import corelens as cl
from corelens.findings import criteria
from corelens.findings import run as findings_run
from corelens.runs.processes import Claims, Piece, carry_out
from helpers.shared_runs import (
    alone,
    differing,
    files,
    finish,
    launch,
    parts,
    questions,
    run,
    tiny_model,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
QUICK = ("score", "evaluate", "patch")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def errors(folder):
    return [file.read_text() for file in folder.glob("error-*")]


def test_two_processes_and_a_killed_one_give_the_bytes_of_one(model, tmp_path):
    alone(model, tmp_path / "one", QUICK)
    started = launch(2, model, tmp_path / "two", QUICK, pause=0.02)
    while parts(tmp_path / "two") < 3:
        time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    codes = finish(started)
    assert codes == [0, -signal.SIGKILL], errors(tmp_path / "two")  # the other did what was left
    assert not differing(tmp_path / "two", tmp_path / "one")
    for file in list((tmp_path / "two").rglob("*-0*.*"))[::2]:
        file.unlink()
    assert finish(launch(3, model, tmp_path / "two", QUICK)) == [0, 0, 0], errors(tmp_path / "two")
    assert not differing(tmp_path / "two", tmp_path / "one")


def test_rows_and_a_study_of_two_processes_are_those_of_one(model, tmp_path, monkeypatch):
    # random weights answer nothing: let their world count
    monkeypatch.setattr(findings_run, "ACCURACY", criteria.Threshold("all", 0.0, ""))
    alone(model, tmp_path / "one", ("rows", "study"))
    assert finish(launch(2, model, tmp_path / "two", ("rows", "study"))) == [0, 0], errors(
        tmp_path / "two"
    )
    assert {"study/report.json", "study/report.html"} <= set(files(tmp_path / "one"))
    assert not differing(tmp_path / "two", tmp_path / "one")


def test_a_process_that_sees_other_data_is_refused_by_name(model, tmp_path):
    codes = finish(launch(2, model, tmp_path, ("score",), other=1))
    wrong = [rank for rank, code in enumerate(codes) if code]
    assert len(wrong) == 1  # the one that came second
    message = (tmp_path / f"error-{wrong[0]}").read_text()
    assert "another sample_hash" in message and f"process {wrong[0]} of 2" in message


def test_runs_under_other_hooks_or_without_a_folder_are_refused(model, tmp_path, monkeypatch):
    samples = questions(2)
    cl.evaluate(model, samples, cl.knockout([(0, 1)]), out=tmp_path)
    for hooks in (
        cl.knockout([(0, 2)]),
        cl.knockout([(0, 1)], rows="last"),
        cl.ablate([(0, 1)], "zero"),
    ):
        with pytest.raises(cl.CorelensError, match="another hooks"):
            cl.evaluate(model, samples, hooks, out=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for call in (
        lambda: cl.score_heads(model, samples),
        lambda: cl.evaluate(model, samples),
        lambda: cl.activation_patch(model, samples, samples, metric=cl.logit_diff(1, 2)),
        lambda: cl.attribution_patch(model, samples, samples, metric=cl.logit_diff(1, 2)),
    ):
        with pytest.raises(cl.CorelensError, match="without a run folder"):
            call()


def test_prepared_inputs_have_no_run_folder(model, tmp_path):
    inputs = model.prepare(questions(2), answer=True)
    with pytest.raises(cl.CorelensError, match="prepared inputs"):
        cl.evaluate(model, [inputs], out=tmp_path)
    with pytest.raises(cl.CorelensError, match="prepared inputs"):
        cl.activation_patch(model, inputs, inputs, metric=cl.logit_diff(1, 2), out=tmp_path)


def test_a_run_folder_changes_no_number(model, tmp_path):
    samples = questions(5)
    hooks = cl.knockout([(0, 1), (1, 2)])
    plain = cl.evaluate(model, samples, hooks, batch_size=2)
    shared = cl.evaluate(model, samples, hooks, batch_size=2, out=tmp_path / "evaluate")
    assert plain.per_sample == shared.per_sample
    plan = cl.SparseInference([(0, 1)], cl.Streaming(2, 8))
    plain = cl.evaluate(model, samples, batch_size=2, sparse=plan, rounds=0)
    shared = cl.evaluate(model, samples, batch_size=2, sparse=plan, rounds=0, out=tmp_path / "plan")
    assert plain.per_sample == shared.per_sample
    noised = [cl.counterfactual(sample, "noise") for sample in samples]
    pairs = {"clean": samples, "corrupted": noised, "metric": cl.logit_diff(1, 2), "hooks": hooks}
    plain = cl.attribution_patch(model, **pairs, steps=2)
    shared = cl.attribution_patch(model, **pairs, steps=2, batch_size=2, out=tmp_path / "patch")
    np.testing.assert_allclose(plain.values, shared.values, atol=1e-5)
    with pytest.raises(cl.CorelensError, match="another options"):
        cl.attribution_patch(model, **pairs, steps=3, batch_size=2, out=tmp_path / "patch")
    sweep = run(model, "ablation", tmp_path / "ablation", samples)
    scores = cl.HeadScores(np.random.default_rng(0).random((model.cfg.n_layers, model.cfg.n_heads)))
    wanted = cl.ablation_sweep(model, samples, scores, (0.1, 0.5), "zero", draws=2, batch_size=2)
    assert sweep.to_json() == wanted.to_json()


def test_claims_end_with_their_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        held = Claims(tmp_path)  # (its locks end with it, too)
        held.take("a")
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(1)
    try:
        os.read(reader, 1)
        other = Claims(tmp_path)
        assert not other.take("a") and other.take("b")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert other.take("a")


def test_work_that_is_there_is_not_done_again(tmp_path):
    done = []

    def piece(name):
        def make():
            done.append(name)
            (tmp_path / name).write_text(name)

        return Piece(tmp_path / name, 1, make)

    (tmp_path / "b").write_text("")
    carry_out(Claims(tmp_path), [piece(name) for name in "abc"])
    assert done == ["a", "c"]
