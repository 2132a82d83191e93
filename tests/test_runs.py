"""Scoring runs that are killed, resumed, shared between processes, and refused where they do not
fit."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import corelens as cl
from corelens.disk import write
from corelens.runs.folder import RunFolder
from helpers.families import tiny
from helpers.samples import many, mixed

METRICS = ["ram", "lift", "calibrated_ram", "value_mass", "visual_head"]
TESTS = Path(__file__).parent
score_module = import_module("corelens.metrics.score")

# Two processes of one launch find each other as accelerate does it, so each is a process of its own.
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from helpers.samples import many
from helpers.families import tiny
import corelens as cl
cl.score_heads(cl.HookedMLLM(*tiny("qwen3_vl")), many(), {metrics!r}, batch_size=2, out={out!r})
"""


def score(out: Path, pause: float) -> None:
    """The run of these tests, in a process of its own: slow enough to be killed in the middle."""
    torch.set_num_threads(1)
    # (a shell's background jobs are born deaf to it)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    score_batch = score_module._score_batch

    def slow(*arguments):
        time.sleep(pause)
        return score_batch(*arguments)

    score_module._score_batch = slow
    model = cl.HookedMLLM(*tiny.__wrapped__("qwen3_vl"))
    cl.score_heads(model, many(), METRICS, batch_size=2, out=out)


def start(out: Path, pause: float = 0.0) -> ForkProcess:
    # (forked: what is imported here is not imported again)
    process = ForkProcess(target=score, args=(out, pause))
    process.start()
    return process


def until(process: ForkProcess, out: Path, parts: int) -> None:
    """Wait until the process has written so many parts."""
    deadline = time.time() + 120
    while len(list(out.glob("part-*.safetensors"))) < parts:
        assert process.is_alive() and time.time() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model():
    # as another process builds it: nothing of other tests is on it
    return cl.HookedMLLM(*tiny.__wrapped__("qwen3_vl"))


@pytest.fixture(scope="module")
def whole(model):
    return cl.score_heads(model, many(), METRICS, batch_size=2)


def equal(a, b):
    for key in a:
        np.testing.assert_allclose(a[key].per_sample, b[key].per_sample, atol=1e-6, equal_nan=True)
        np.testing.assert_allclose(a[key].values, b[key].values, atol=1e-6)


def test_a_run_that_was_stopped_goes_on(model, whole, tmp_path):  # (kills: below)
    process = start(tmp_path, pause=0.5)
    until(process, tmp_path, parts=2)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    parts = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*.safetensors")}
    assert 2 <= len(parts) < 6 and not (tmp_path / "scores").exists()
    again = cl.score_heads(model, many(), METRICS, batch_size=2, out=tmp_path)
    equal(again, whole)
    # what was there was not done again
    assert all(path.stat().st_mtime_ns == time for path, time in parts.items())
    saved = cl.HeadScores.load(tmp_path / "scores" / "ram.safetensors")
    np.testing.assert_array_equal(saved.values, again["ram"].values)


def test_two_processes_share_a_run(model, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    script = SCRIPT.format(tests=str(TESTS), metrics=METRICS, out=str(tmp_path))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), **shared},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("part-*.safetensors"))) == 6
    equal(
        {key: cl.HeadScores.load(tmp_path / "scores" / f"{key}.safetensors") for key in whole},
        whole,
    )


def test_another_run_is_refused(model, tmp_path):
    samples = many()[:4]
    cl.score_heads(model, samples, ["ram"], out=tmp_path)
    for changed, word in (
        ({"metrics": ["lift"]}, "metrics"),
        ({"samples": samples[:3]}, "sample_hash"),
        ({"batch_size": 3}, "batch_size"),
    ):
        arguments = {"samples": samples, "metrics": ["ram"]} | changed
        with pytest.raises(cl.CorelensError, match=word):
            cl.score_heads(model, arguments.pop("samples"), out=tmp_path, **arguments)
    weight = model.layout.decoder(model.hf).layers[0].self_attn.o_proj.weight
    before = weight.detach().clone()
    weight.data[3, 5] += 1  # (any one of all weights)
    try:
        with pytest.raises(cl.CorelensError, match="weight_hash"):
            cl.score_heads(model, samples, ["ram"], out=tmp_path)
    finally:
        weight.data.copy_(before)
    next(tmp_path.glob("part-*")).write_bytes(b"torn")
    with pytest.raises(cl.CorelensError, match="delete it"):
        cl.score_heads(model, samples, ["ram"], out=tmp_path)


def base() -> cl.Sample:
    return mixed()[0]


def masked(row: int) -> list[cl.Sample]:
    mask = np.zeros(base().images[0].size[::-1], bool)
    mask[row : row + 20, row : row + 20] = True
    return [replace(base(), regions=[cl.Mask(mask)])]


def opened(folder: Path, drawn: bool) -> list[cl.Sample]:
    base().images[0].save(folder / "a.png")
    image = Image.open(folder / "a.png")
    image.load()
    if drawn:
        ImageDraw.Draw(image).rectangle((0, 0, 40, 40), fill=0)
    return [replace(base(), images=[image])]


def at_path(folder: Path, color: str | None) -> list[cl.Sample]:
    image = base().images[0] if color is None else Image.new("RGB", base().images[0].size, color)
    image.save(folder / "a.png")
    return [replace(base(), images=[str(folder / "a.png")])]


def chat(text: str) -> list[cl.Sample]:
    content = [{"type": "image", "image": base().images[0]}, {"type": "text", "text": text}]
    return [
        replace(base(), images=[], question=None, messages=[{"role": "user", "content": content}])
    ]


@pytest.mark.parametrize("kind", ["mask", "drawn", "file", "chat", "fps", "answer"])
def test_other_samples_are_refused_whatever_makes_them_so(model, tmp_path, kind):
    first, second = {
        "mask": lambda: (masked(2), lambda: masked(12)),
        "drawn": lambda: (opened(tmp_path, False), lambda: opened(tmp_path, True)),
        "file": lambda: (at_path(tmp_path, None), lambda: at_path(tmp_path, "red")),
        "chat": lambda: (chat("What digit is it?"), lambda: chat("What color is it?")),
        "fps": lambda: ([base()], lambda: [replace(base(), meta={"fps": 1.0})]),
        "answer": lambda: ([base()], lambda: [replace(base(), answer="8")]),
    }[kind]()
    cl.score_heads(model, first, ["ram"], out=tmp_path / "run")
    cl.score_heads(model, first, ["ram"], out=tmp_path / "run")  # its own it takes
    with pytest.raises(cl.CorelensError, match="another sample_hash"):
        cl.score_heads(model, second(), ["ram"], out=tmp_path / "run")


def test_another_processor_is_refused(tmp_path):
    # its own: other tests share the cached one
    model = cl.HookedMLLM(*tiny.__wrapped__("qwen3_vl"))
    cl.score_heads(model, [base()], ["ram"], out=tmp_path)
    model.processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    with pytest.raises(cl.CorelensError, match="another processor"):
        cl.score_heads(model, [base()], ["ram"], out=tmp_path)


def own(body):
    def own_metric(pattern, token_map):
        return body(pattern)

    return own_metric


def test_another_body_of_an_own_metric_is_refused(model, tmp_path):
    def scored(function):
        return cl.score_heads(model, [base()], [function], out=tmp_path)["own_metric"].values

    # of one line, so of one source
    bodies = (lambda p: p.amax((-1, -2)), lambda p: p[..., 0].mean(-1))
    largest = scored(own(bodies[0]))
    np.testing.assert_array_equal(scored(own(bodies[0])), largest)
    with pytest.raises(cl.CorelensError, match="another metrics"):
        scored(own(bodies[1]))
    lost: dict = {}
    exec("def own_metric(pattern, token_map): return pattern.amax((-1, -2))", lost)
    with pytest.raises(cl.CorelensError, match="without source"):
        scored(lost["own_metric"])
    assert (
        cl.score_heads(model, [base()], [lost["own_metric"]])["own_metric"].values.shape
        == largest.shape
    )
    with pytest.raises(cl.CorelensError, match="two metrics called 'own_metric'"):
        cl.score_heads(model, [base()], [own(len), own(max)])


def test_hooks_rows_and_plans_that_are_active_are_refused(model, tmp_path):
    hook = ("blocks.0.attn.hook_z", lambda z, hook: z * 0)
    streaming = cl.SparseInference(pattern=cl.Streaming(1, 4))
    for name, context in (
        ("hook_z", model.hooks(fwd_hooks=[hook])),
        ("sparse", model.sparse(streaming)),
        ("pattern_rows", model.pattern_rows("last")),
    ):
        with context, pytest.raises(cl.CorelensError, match=name):
            cl.score_heads(model, [base()], ["ram"], out=tmp_path)
    model.add_hook(*hook)
    try:
        with pytest.raises(cl.CorelensError, match="hook_z"):
            cl.score_heads(model, [base()], ["ram"], out=tmp_path)
    finally:
        model.reset_hooks()
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_run_and_a_changed_part_are_refused(model, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    cl.score_heads(model, [base()], ["ram"], out=first)
    cl.score_heads(model, [replace(base(), question="Which letter?")], ["ram"], out=second)
    part = next(first.glob("part-*"))
    whole = part.read_bytes()
    part.write_bytes((second / part.name).read_bytes())
    with pytest.raises(cl.CorelensError, match=r"part-00000000.*another run"):
        cl.score_heads(model, [base()], ["ram"], out=first)
    for place in range(0, len(whole), 37):
        changed = bytearray(whole)
        changed[place] ^= 1
        part.write_bytes(changed)
        with pytest.raises(cl.CorelensError, match="part-00000000"):
            cl.score_heads(model, [base()], ["ram"], out=first)


def test_keys_never_become_paths(model, tmp_path):
    def own_metric(pattern, token_map):
        return pattern.amax((-1, -2))

    for name in (
        "../../../evil",
        "..",
        ".",
        "/evil",
        "a/b",
        "x" * 400,
        "C:\\evil",
        "a\0b",
        "",
        "ram",
    ):
        own_metric.__name__ = name
        out = tmp_path / "run" / str(abs(hash(name)))
        cl.score_heads(model, [base()], [own_metric], out=out)
        files = list((out / "scores").iterdir())
        assert len(files) == 1 and cl.HeadScores.load(files[0]).values.shape == (
            model.cfg.n_layers,
            model.cfg.n_heads,
        )
    assert {path.name for path in tmp_path.rglob("*") if "evil" in path.name} == {
        "%2E.%2F..%2F..%2Fevil.safetensors", "%2Fevil.safetensors", "C%3A%5Cevil.safetensors",
    }  # fmt: skip


def test_two_writers_one_is_refused(model, tmp_path):
    process = start(tmp_path, pause=0.5)
    until(process, tmp_path, parts=1)
    with pytest.raises(cl.CorelensError, match=f"another launch is writing.*process {process.pid}"):
        cl.score_heads(model, many(), METRICS, batch_size=2, out=tmp_path)
    process.kill()
    process.join()
    # the lock ended with its process
    cl.score_heads(model, many(), METRICS, batch_size=2, out=tmp_path)


def test_kills_change_no_byte_of_the_result(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(whole).join()
    for parts in (1, 3):
        process = start(killed, pause=0.3)
        until(process, killed, parts)
        process.kill()
        process.join()
    again = start(killed)
    again.join()
    assert again.exitcode == 0
    for file in sorted(file for file in whole.rglob("*.*") if file.name != ".lock"):
        assert (killed / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


def test_a_full_disk_is_said(model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write.os, "fsync", full)
    for save in (
        lambda: cl.score_heads(model, [base()], ["ram"], out=tmp_path / "run"),
        lambda: cl.HeadScores(np.ones((2, 2))).save(tmp_path / "s"),
        lambda: cl.data.save_samples([base()], tmp_path / "samples"),
        lambda: write.append_line(tmp_path / "l", "x"),
    ):
        with pytest.raises(cl.CorelensError, match="no room left"):
            save()
    assert not list(tmp_path.rglob("*.safetensors")) and not (tmp_path / "s").exists()
    monkeypatch.undo()
    (tmp_path / "file").write_text("x")
    with pytest.raises(cl.CorelensError, match="cannot be written"):
        cl.score_heads(model, [base()], ["ram"], out=tmp_path / "file" / "run")


# --- results that are made once


def test_what_is_made_once_is_kept_and_checked(tmp_path):
    def folder(**identity):
        return RunFolder(tmp_path, {"a": 1, **identity})

    made = []

    def make():
        made.append(1)
        return {"x": [1.5, None, "é"]}

    assert (
        folder().saved("F1 ../x", make)
        == folder().saved("F1 ../x", make)
        == {"x": [1.5, None, "é"]}
        and len(made) == 1
    )
    file = tmp_path / "F1 ..%2Fx.json"
    words = file.read_text()
    file.write_text(words.replace("1.5", "2.5"))
    with pytest.raises(cl.CorelensError, match="checksum"):
        folder().saved("F1 ../x", make)
    other = RunFolder(tmp_path / "other", {"a": 2})
    (other.path / file.name).write_text(words)
    with pytest.raises(cl.CorelensError, match="another run"):
        other.saved("F1 ../x", make)
    with pytest.raises(cl.CorelensError, match="another a"):
        RunFolder(tmp_path, {"a": 2})
