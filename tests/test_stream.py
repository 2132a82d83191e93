"""Streams: the numbers of a list, in a window's memory; a stream that shows something else is
refused."""

import errno
import inspect
import io

import numpy as np
import pytest

import corelens as cl
from corelens.disk.checksum import open_sealed
from corelens.evaluation.causal import causal_scores
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
    lift, _ = open_sealed(tmp_path / "per_sample/lift.safetensors")
    parts = [lift[name] for name in ("numerator", "denominator")]
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
    def half(file, shape, tensors, metadata):
        def full():
            yield next(iter(next(iter(tensors.values()))))
            raise OSError(errno.ENOSPC, "No space left on device")

        write(file, shape, {"per_sample": full()}, metadata)

    write = stream.write_sealed
    monkeypatch.setattr(stream, "write_sealed", half)
    with pytest.raises(cl.CorelensError, match="no room left"):
        cl.score_heads(model, flow(), ["ram"], batch_size=2, out=tmp_path)
    assert not list((tmp_path / "per_sample").iterdir())


def test_files_of_a_stream_that_are_not_what_was_written_are_refused_by_name(model, tmp_path):
    for folder, metrics in (("run", METRICS), ("other", ["ram"])):
        cl.score_heads(model, flow(), metrics, out=tmp_path / folder)
    for key in METRICS:
        file = tmp_path / f"run/per_sample/{key}.safetensors"
        whole = file.read_bytes()
        size = 8 + int.from_bytes(whole[:8], "little")
        for place in (0, 9, size // 2, size, len(whole) // 2, len(whole) - 1):
            flipped = bytes([whole[place] ^ 1])
            file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            with pytest.raises(cl.CorelensError, match=rf"per_sample/{key}.safetensors.*cannot be"):
                cl.score_heads(model, flow(), METRICS, out=tmp_path / "run")
        for words in (whole[:-1], whole + b"0", b"", whole[:20]):
            file.write_bytes(words)
            with pytest.raises(cl.CorelensError, match=rf"per_sample/{key}.safetensors"):
                cl.score_heads(model, flow(), METRICS, out=tmp_path / "run")
        file.write_bytes(whole)
    for part in ("per_sample", "scores"):
        file = tmp_path / f"run/{part}/ram.safetensors"
        whole = file.read_bytes()
        file.write_bytes((tmp_path / f"other/{part}/ram.safetensors").read_bytes())
        with pytest.raises(cl.CorelensError, match=rf"{part}/ram.*belongs to another run"):
            cl.score_heads(model, flow(), METRICS, out=tmp_path / "run")
        file.write_bytes(whole)
    file = tmp_path / "run/per_sample/ram.safetensors"
    file.unlink()
    with pytest.raises(cl.CorelensError, match="per_sample/ram.safetensors.*No such file"):
        cl.score_heads(model, flow(), METRICS, out=tmp_path / "run")


def test_a_streaming_data_set_is_scored_and_its_rows_are_no_samples(model, tmp_path):
    datasets = pytest.importorskip("datasets")

    table = []
    for sample in questions():
        buffer = io.BytesIO()
        sample.images[0].save(buffer, "png")
        box = list(sample.regions[0].bounds)
        table.append(
            {"image": {"bytes": buffer.getvalue()}, "question": sample.question, "box": box}
        )

    def rows():
        yield from table

    features = datasets.Features(
        image=datasets.Image(),
        question=datasets.Value("string"),
        box=datasets.List(datasets.Value("float32")),
    )
    data = datasets.IterableDataset.from_generator(rows, features=features)
    stream = (
        cl.Sample(images=[row["image"]], question=row["question"], regions=[row["box"]])
        for row in data
    )
    listed = cl.score_heads(model, questions(), METRICS, batch_size=2)
    for scores in (
        cl.score_heads(model, stream, METRICS, batch_size=2),
        cl.score_heads(model, (s for s in questions()), METRICS, batch_size=2, out=tmp_path),
    ):
        for key in METRICS:
            np.testing.assert_allclose(scores[key].values, listed[key].values, atol=1e-6)
    refused = "a dict in place of a sample: image, question, box"
    with pytest.raises(cl.CorelensError, match=refused):
        cl.score_heads(model, data)
    # (the tests' own checker of types would say no before it)
    with pytest.raises(cl.CorelensError, match=refused):
        inspect.unwrap(cl.score_heads)(model, list(data))


def test_runners_that_need_all_samples_refuse_a_stream(model):
    scores = cl.HeadScores(np.ones((model.cfg.n_layers, model.cfg.n_heads)))
    runners = {cl.evaluate: (), cl.where_read: (), cl.ablation_sweep: (scores,), causal_scores: ()}
    for runner, more in runners.items():
        words = rf"{runner.__name__} over a stream \(a generator\)"
        with pytest.raises(cl.CorelensError, match=words):
            inspect.unwrap(runner)(model, flow(), *more)
    with pytest.raises(cl.CorelensError, match="a dict in place of a sample"):
        inspect.unwrap(cl.evaluate)(model, [{"question": "What?"}])


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
