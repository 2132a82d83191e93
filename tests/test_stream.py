"""Streams: the numbers of a list, in a window's memory; a stream that shows something else is
refused."""

import errno

import numpy as np
import pytest

import corelens as cl
from corelens.metrics import stream
from helpers.shared_runs import questions, tiny_model

METRICS = ["ram", "lift"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 3)


def flow(n=8):
    yield from questions(n)


def test_scores_of_a_stream_are_those_of_the_list(model, tmp_path):
    listed = cl.score_heads(model, questions(), METRICS, batch_size=2)
    plain = cl.score_heads(model, flow(), METRICS, batch_size=2)
    kept = cl.score_heads(model, flow(), METRICS, batch_size=2, out=tmp_path)
    for key in METRICS:
        np.testing.assert_allclose(plain[key].values, listed[key].values, atol=1e-6)
        np.testing.assert_array_equal(kept[key].values, plain[key].values)
    assert plain["ram"].per_sample is None
    mapped = kept["ram"].per_sample
    assert isinstance(mapped if isinstance(mapped, np.memmap) else mapped.base, np.memmap)
    np.testing.assert_allclose(mapped, listed["ram"].per_sample, atol=1e-6)
    parts = [
        stream.mapped(tmp_path / "per_sample/lift.safetensors", name)
        for name in ("numerator", "denominator")
    ]
    np.testing.assert_allclose(parts, listed["lift"].parts, atol=1e-6)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    next(tmp_path.glob("part-00000003*")).unlink()
    cl.score_heads(
        model, flow(), METRICS, batch_size=2, out=tmp_path
    )  # what is missing is computed
    assert {file: file.read_bytes() for file in before} == before


def test_a_disk_that_fills_up_while_a_stream_is_written_keeps_nothing_half(
    model, tmp_path, monkeypatch
):
    def half(file, shape, tensors):
        def full():
            yield next(iter(next(iter(tensors.values()))))
            raise OSError(errno.ENOSPC, "No space left on device")

        write(file, shape, {"per_sample": full()})

    write = stream._write
    monkeypatch.setattr(stream, "_write", half)
    with pytest.raises(cl.CorelensError, match="no room left"):
        cl.score_heads(model, flow(), ["ram"], batch_size=2, out=tmp_path)
    assert not list((tmp_path / "per_sample").iterdir())


def test_another_stream_is_refused(model, tmp_path):
    cl.score_heads(model, flow(), ["ram"], out=tmp_path)

    def other():
        for number, sample in enumerate(flow()):
            if number == 5:
                sample.question = "What is it?"
            yield sample

    with pytest.raises(cl.CorelensError, match="part-00000003.*other samples"):
        cl.score_heads(model, other(), ["ram"], out=tmp_path)
    with pytest.raises(cl.CorelensError, match="stream of 8 samples; 6 now"):
        cl.score_heads(model, flow(6), ["ram"], out=tmp_path)
    with pytest.raises(cl.CorelensError, match="another samples"):
        cl.score_heads(model, questions(), ["ram"], out=tmp_path)
    for needs_all in (cl.metric("ram", samples="median"), "localization"):
        with pytest.raises(cl.CorelensError, match="needs all numbers at once"):
            cl.score_heads(model, flow(), needs_all)
    with pytest.raises(cl.CorelensError, match="on_error='skip' with a stream"):
        cl.score_heads(model, flow(), on_error="skip")
    with pytest.raises(cl.CorelensError, match="empty stream"):
        cl.score_heads(model, flow(0))
