"""Scoring runs that are killed, resumed, shared between processes, and refused where they do not fit."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import corelens as cl
from families import tiny
from test_score import mixed

METRICS = ["ram", "lift", "calibrated_ram", "value_mass", "visual_head"]
TESTS = Path(__file__).parent

# A process that scores slowly enough to be killed in the middle.
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_runs import METRICS, many
from families import tiny
import corelens as cl
import corelens.metrics.score
slow = sys.modules["corelens.metrics.score"]
before = slow._score_batch
def after(*arguments):
    time.sleep({pause})
    return before(*arguments)
slow._score_batch = after
cl.score_heads(cl.HookedMLLM(*tiny("qwen3_vl")), many(), METRICS, batch_size=2, out={out!r})
"""


def many() -> list[cl.Sample]:
    samples = []
    for i in range(4):
        for one in mixed():
            one.id = f"{i}-{one.id}"
            one.question = f"{one.question} {i}"
            one.regions = [cl.Box(r.x0, r.y0, r.x1, r.y1, image=r.image, text="a 7 b") for r in one.regions]
            samples.append(one)
    return samples


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def whole(model):
    return cl.score_heads(model, many(), METRICS, batch_size=2)


def equal(a, b):
    for key in a:
        np.testing.assert_allclose(a[key].per_sample, b[key].per_sample, atol=1e-6, equal_nan=True)
        np.testing.assert_allclose(a[key].values, b[key].values, atol=1e-6)


def start(out: Path, pause: float, **environment: str) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(TESTS), out=str(out), pause=pause)
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **environment})


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(model, whole, tmp_path, how):
    process = start(tmp_path, pause=0.5)
    deadline = time.time() + 120
    while len(list(tmp_path.glob("part-*.safetensors"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.safetensors")}
    assert 2 <= len(parts) < 6 and not (tmp_path / "scores").exists()
    again = cl.score_heads(model, many(), METRICS, batch_size=2, out=tmp_path)
    equal(again, whole)
    assert all(path.stat().st_mtime_ns == time for path, time in parts.items())  # what was there was not done again
    saved = cl.HeadScores.load(tmp_path / "scores" / "ram.safetensors")
    np.testing.assert_array_equal(saved.values, again["ram"].values)


def test_two_processes_share_a_run(model, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [start(tmp_path, 0.0, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("part-*.safetensors"))) == 6
    equal({key: cl.HeadScores.load(tmp_path / "scores" / f"{key}.safetensors") for key in whole}, whole)


def test_another_run_is_refused(model, tmp_path):
    samples = many()[:4]
    cl.score_heads(model, samples, ["ram"], out=tmp_path)
    for changed, word in (
        ({"metrics": ["lift"]}, "metrics"),
        ({"samples": samples[:3]}, "sample_hash"),
        ({"batch_size": 3}, "batch_size"),
    ):
        given = {"samples": samples, "metrics": ["ram"]} | changed
        with pytest.raises(cl.CorelensError, match=word):
            cl.score_heads(model, given.pop("samples"), out=tmp_path, **given)
    weight = model.layout.decoder(model.hf).layers[0].self_attn.o_proj.weight
    before = weight.detach().clone()
    weight.data[0, 0] += 1
    try:
        with pytest.raises(cl.CorelensError, match="weight_hash"):
            cl.score_heads(model, samples, ["ram"], out=tmp_path)
    finally:
        weight.data.copy_(before)
    next(tmp_path.glob("part-*")).write_bytes(b"torn")
    with pytest.raises(cl.CorelensError, match="delete it"):
        cl.score_heads(model, samples, ["ram"], out=tmp_path)
