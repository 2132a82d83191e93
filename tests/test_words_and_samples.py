"""What a caller may say in a shorter way, and the nearest name for what is written wrong."""

import inspect

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.runs.provenance import all_weights, weight_hash


@pytest.fixture(scope="module")
def model():
    return cl.load_demo("qwen3vl-s")


@pytest.fixture(scope="module")
def sample():
    return cl.synthetic("refer", 1, seed=1)[0]


def test_runs_prepare_a_sample(model, sample):
    inputs = model.prepare(sample)
    with torch.no_grad():
        wanted, cache = model.run_with_cache(inputs)
        logits, ours = model.run_with_cache(sample)
        assert torch.equal(logits, wanted) and torch.equal(ours["z", 3], cache["z", 3])
        assert torch.equal(model(sample), wanted) and torch.equal(model([sample]), wanted)
        assert torch.equal(model.run_with_hooks(sample, fwd_hooks=[]), wanted)
    assert torch.equal(
        model.generate(sample, max_new_tokens=2), model.generate(inputs, max_new_tokens=2)
    )
    with pytest.raises(cl.CorelensError, match="one sample"):
        model.run_with_cache([sample, sample], remove_batch_dim=True)


def test_a_worlds_name_stands_for_its_samples(model, monkeypatch):
    monkeypatch.setattr(
        "corelens.metrics.score.load_data", lambda name: cl.synthetic(name, 2, seed=1)
    )
    by_name = cl.score_heads(model, "refer", "ram")["ram"]
    np.testing.assert_array_equal(
        by_name.values, cl.score_heads(model, cl.synthetic("refer", 2, seed=1), "ram")["ram"].values
    )
    assert by_name.meta["data"] == "refer" and by_name.meta["samples"] == [
        "refer-1-0000",
        "refer-1-0001",
    ]


def test_nearest_names(model, sample):
    _, cache = model.run_with_cache(
        sample, names_filter=["blocks.3.attn.hook_z", "blocks.3.hook_resid_post"]
    )
    for call, words in (
        (lambda: cache["blocks.3.attn.hook_zz"], "nearest: blocks.3.attn.hook_z"),
        (lambda: cache["resid_pst", 3], "blocks.3.hook_resid_post"),
        (lambda: cl.load_demo("qwen3vl"), "did you mean 'qwen3vl-"),
        (lambda: cl.data.load_data("reffer"), "did you mean 'refer'"),
        (lambda: cl.synthetic("reffer", 1), "did you mean 'refer'"),
        (lambda: cl.metric("rma"), "did you mean 'ram'"),
        (lambda: cl.metric("ram[row=last]"), "did you mean 'rows'? options: rows, "),
        (lambda: cl.metric("ram", reduc="max"), "did you mean 'reduce'"),
        (lambda: cl.metric(lambda pattern: pattern.sum(-1)), "token_map as the second argument"),
        (
            lambda: model.run_with_hooks(sample, fwd_hooks=[("L5H6", print)]),
            "nearest: blocks.5.attn.head.6.hook_z",
        ),
        (lambda: model.generate(sample, fwd_hooks=[]), "with model.hooks(fwd_hooks="),
    ):
        with pytest.raises(cl.CorelensError) as error:
            call()
        assert words in str(error.value), error.value


def test_what_stands_in_the_place_of_another_thing_is_named(model, sample):
    """Inputs for samples, all scores for one ranking, a ranking for some heads."""
    inputs = model.prepare(sample)
    scores = cl.HeadScores(np.ones((8, 12)))
    for runner, given, words in (
        (cl.score_heads, (inputs,), "inputs.samples"),
        (cl.score_heads, ([inputs],), "inputs.samples"),
        (cl.score_heads, (5,), "a int in place of a sample"),
        (cl.where_read, (inputs,), "inputs.samples"),
        (cl.ablation_sweep, ([sample], {"ram": scores}), 'scores["ram"]'),
    ):
        call = inspect.unwrap(runner)  # (the tests' own checker of types would say no before it)
        with pytest.raises(cl.CorelensError) as error:
            call(model, *given)
        assert words in str(error.value), error.value
    with pytest.raises(cl.CorelensError, match=r"scores.top\(0.05\)"):
        inspect.unwrap(cl.HeadSet.__init__)(cl.HeadSet(), scores)


def test_a_whole_number_of_heads_is_a_count():
    scores = cl.HeadScores(np.arange(40.0).reshape(5, 8))
    assert len(scores.top(1)) == 1 and len(scores.top(3)) == 3 and len(scores.top(1.0)) == 40
    assert len(scores.top(0.05)) == 2 and scores.top(2) == scores.top(k=2)


def test_remote_code_is_refused_without_a_question(model, tmp_path, monkeypatch):
    import transformers

    asked = []

    def load(name, **options):
        asked.append(options.get("trust_remote_code"))
        raise OSError("stop here")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
    for more in ({}, {"trust_remote_code": True}):
        with pytest.raises(cl.CorelensError, match="stop here"):
            cl.HookedMLLM.from_pretrained("some/model", **more)
    assert asked == [False, True]


def test_offloaded_weights_are_read_from_where_they_lie(model, tmp_path):
    model.hf.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    inner = {"visual": "cpu", "language_model.embed_tokens": "cpu", "language_model.norm": "cpu",
             "language_model.rotary_emb": "cpu"}  # fmt: skip
    places = {f"model.{name}": place for name, place in inner.items()} | {"lm_head": "cpu"}
    places |= {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(8)}
    options = {"dtype": "float32", "device_map": places, "offload_folder": tmp_path / "offload"}
    offloaded = cl.HookedMLLM.from_pretrained(tmp_path / "model", **options)
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert weight_hash(all_weights(offloaded.hf)) == weight_hash(all_weights(model.hf))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
