"""Scores from rows against the same numbers computed from `output_attentions=True` on eager
attention."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.runs.provenance import (
    all_weights,
    images_and_frames,
    pixels,
    sample_hash,
    weight_hash,
)
from helpers.families import tiny
from helpers.samples import mixed, picture, video


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def eager(model):
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    return hf


SETS = {"images": mixed, "video": lambda: [video(0), video(5)]}


def slow(eager, inputs, rows: str, reduce: str) -> np.ndarray:
    """max or mean over rows of the summed attention on the region, from full attention matrices."""
    with torch.no_grad():
        attentions = eager(**inputs.tensors, output_attentions=True, use_cache=False).attentions
    out = []
    for i, tm in enumerate(inputs.token_maps):
        row_sets = {
            "question": tm.question,
            "last": tm.last,
            "answer": tm.answer - 1 if "answer" in tm.parts else None,
        }[rows]
        # [layer, head, row]
        mass = torch.stack([a[i][:, row_sets][:, :, tm.region].sum(-1) for a in attentions])
        out.append(mass.amax(-1) if reduce == "max" else mass.mean(-1))
    return torch.stack(out).numpy()


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_ram_is_the_number_from_output_attentions(model, eager, kind, batch_size):
    samples = SETS[kind]()
    keys = {("question", "mean"): "ram", ("question", "max"): "ram[reduce=max]", ("last", "mean"): "ram[rows=last]",
            ("answer", "mean"): "ram[rows=answer]", ("answer", "max"): "ram[rows=answer,reduce=max]"}  # fmt: skip
    scores = cl.score_heads(model, samples, list(keys.values()), batch_size=batch_size)
    for (rows, reduce), key in keys.items():
        wanted = np.concatenate(
            [slow(eager, model.prepare(s, answer=rows == "answer"), rows, reduce) for s in samples]
        )
        np.testing.assert_allclose(scores[key].per_sample, wanted, atol=1e-6)
        np.testing.assert_allclose(scores[key].values, wanted.mean(0), atol=1e-6)
        assert scores[key].meta["samples"] == [s.id for s in samples]


def test_ratios_are_ratios_of_means(model, eager):
    samples = mixed()
    scores = cl.score_heads(model, samples, ["precision", "lift"], batch_size=2)
    evidence, visual, expected = [], [], []
    for sample_ in samples:
        inputs = model.prepare(sample_)
        tm = inputs.token_maps[0]
        with torch.no_grad():
            attentions = eager(**inputs.tensors, output_attentions=True, use_cache=False).attentions
        rows = torch.stack([a[0][:, tm.question] for a in attentions])
        evidence.append(rows[..., tm.region].sum(-1).mean(-1).numpy())
        visual.append(rows[..., tm.visual].sum(-1).mean(-1).numpy())
        expected.append(visual[-1] * len(tm.region) / len(tm.visual))
    np.testing.assert_allclose(scores["precision"].values, sum(evidence) / sum(visual), atol=1e-6)
    np.testing.assert_allclose(scores["lift"].values, sum(evidence) / sum(expected), atol=1e-5)


def test_record_ram_in_a_users_own_run(model):
    samples = mixed()
    wanted = cl.score_heads(model, samples, ["ram[rows=last]"])["ram[rows=last]"]
    recorded = cl.record_ram(rows="last")
    for sample_ in samples:
        model.run_with_hooks(model.prepare(sample_), fwd_hooks=recorded.hooks, return_type=None)
    np.testing.assert_allclose(recorded.scores().values, wanted.values, atol=1e-6)
    with model.hooks(fwd_hooks=cl.record_ram().hooks + cl.ablate([(0, 1)], "zero")):
        model(model.prepare(samples[0]), return_type=None)
    with (
        pytest.raises(cl.CorelensError, match="leave model.pattern_rows"),
        model.pattern_rows("question"),
    ):
        model.run_with_hooks(model.prepare(samples[0]), fwd_hooks=cl.record_ram(rows="last").hooks)


def test_readers_see_edits(model):
    samples = mixed()
    cut = cl.knockout([(1, 2)], rows="question", columns="region")
    scores = cl.score_heads(model, samples, ["ram"], hooks=cut)["ram"]
    plain = cl.score_heads(model, samples, ["ram"])["ram"]
    assert (scores.per_sample[:, 1, 2] == 0).all() and (plain.per_sample[:, 1, 2] > 0).all()
    np.testing.assert_array_equal(scores.values[0], plain.values[0])


def test_a_metric_of_ones_own(model):
    def first_key(pattern, token_map):
        return pattern[:, :, token_map.start].mean(-1)

    scores = cl.score_heads(model, mixed(), ["ram", first_key])
    assert list(scores) == ["ram", "first_key"] and scores["first_key"].values.shape == (4, 4)


LACKS = {
    "a region": (
        ["ram", "gaze", "lift", "qr", "value_mass", "retrieval", "visual_head"],
        {"regions": []},
    ),
    "a question": (["ram", "visual_mass", "calibrated_ram"], {"question": None}),
    "an answer": (["ram[rows=answer]", "visual_mass[rows=question+answer]"], {"answer": None}),
    "text": (["retrieval", "visual_head"], {}),
    "chat": (
        ["qr", "calibrated_ram"],
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
    ),
}


@pytest.mark.parametrize("what", LACKS)
def test_what_a_sample_lacks_is_said_with_metric_and_sample_before_anything_runs(model, what):
    names, changes = LACKS[what]
    whole, lacking = mixed()[0], replace(mixed()[1], **changes)
    whole.regions = [replace(region, text="7") for region in whole.regions]
    for name in names:
        with pytest.raises(cl.CorelensError) as caught:
            cl.score_heads(
                model,
                [whole, lacking],
                ["random", name] if what != "a question" else [name],
                batch_size=1,
            )
        message = str(caught.value)
        assert message.startswith(f"{name}: sample 'mixed-1'") and what in message


def test_rows_before_the_evidence_and_nothing_to_score(model):
    words = [{"type": "text", "text": "What?"}, {"type": "image", "image": picture(0)}]
    chat = [{"role": "user", "content": words}]
    sample_ = cl.Sample(messages=chat, question="What?", regions=[cl.Box(5, 5, 60, 40)], id="late")
    with pytest.raises(cl.CorelensError, match="rows='last'"):
        cl.score_heads(model, [sample_], ["ram"])
    assert cl.score_heads(model, [sample_], ["ram[rows=last]"])
    with pytest.raises(cl.CorelensError, match="0 samples"):
        cl.score_heads(model, [], ["ram"])
    with pytest.raises(cl.CorelensError, match="0 metrics"):
        cl.score_heads(model, mixed(), [])


def test_attention_that_is_not_finite_is_named(model):
    sample_ = mixed()[0]
    sample_.regions = [replace(region, text="7") for region in sample_.regions]
    weight = model.layout.decoder(model.hf).layers[1].self_attn.q_proj.weight
    before = weight.detach().clone()
    weight.data[8:16] = torch.nan  # the queries of L1H1
    try:
        for name in (
            "ram",
            "lift",
            "qr",
            "calibrated_ram",
            "value_mass",
            "localization",
            "retrieval",
        ):
            with pytest.raises(cl.CorelensError, match=f"{name} of sample 'mixed-0': nan at L1H1"):
                cl.score_heads(model, [sample_], [name], max_new_tokens=2)
    finally:
        weight.data.copy_(before)


def test_meta_says_what_was_scored_and_how(model):
    meta = cl.score_heads(model, mixed(), ["lift[rows=last]"], data="mine")["lift[rows=last]"].meta
    assert (meta["metric"], meta["key"], meta["rows"], meta["options"]) == (
        "lift",
        "lift[rows=last]",
        "last",
        {},
    )
    assert meta["data"] == "mine" and meta["samples"] == ["mixed-0", "mixed-1", "mixed-2"]
    assert len(meta["sample_hash"]) == 16 and meta["date"].startswith("20")
    assert set(meta["versions"]) == {"corelens", "torch", "transformers", "transformer-lens"}
    assert {"model", "revision", "family", "dtype", "python"} <= set(meta) and len(
        meta["weight_hash"]
    ) == 16


def test_hashes_tell_models_and_samples_apart(model, tmp_path):
    same, other = weight_hash(all_weights(model.hf)), copy.deepcopy(model.hf)
    assert weight_hash(all_weights(other)) == same
    other.lm_head.weight.data[3, 5] += 1e-3  # any one weight of all
    assert weight_hash(all_weights(other)) != same
    sample_ = mixed()[0]
    file = tmp_path / "a.png"
    sample_.images[0].save(file)
    array, path = np.asarray(sample_.images[0]), str(file)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "What?"}],
        }
    ]
    variants = [
        sample_, replace(sample_, images=[picture(9)]), replace(sample_, images=[path]), replace(sample_, images=[array]),
        replace(sample_, images=[], video=np.stack([array, array])), replace(sample_, images=[], video=[array]),
        replace(sample_, question="Where?"), replace(sample_, regions=[cl.Box(1, 2, 3, 4)]),
        replace(sample_, images=[], messages=chat),
    ]  # fmt: skip
    assert len({sample_hash([sample]) for sample in variants}) == len(variants)
    assert sample_hash([sample_]) == sample_hash(mixed()[:1])
    sizes = [sum(map(pixels, images_and_frames(sample))) for sample in variants[:6]]
    assert sizes == [6144, 6144, 6144, 6144, 2 * 6144, 6144]
    assert pixels("no such file") == 0 and pixels(None) == 0
    assert len(images_and_frames(variants[-1])) == 1


def test_a_video_of_arrays_is_scored_as_one_of_pictures(model):
    sample_ = video(0)
    arrays = replace(sample_, video=np.stack([np.asarray(frame) for frame in sample_.video]))
    a, b = (cl.score_heads(model, [sample], ["ram"])["ram"].values for sample in (sample_, arrays))
    np.testing.assert_array_equal(a, b)
