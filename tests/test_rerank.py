"""Pages ranked by heads, against sums over `output_attentions`; sinks found in a model whose looks
are known."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.testbed import box, looking_model, samples
from helpers.families import tiny
from helpers.samples import picture


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


def document(seed: int) -> cl.Sample:
    pages = [picture(seed + i, (96, 64)) for i in range(3)]
    region = [cl.Box(3, 3, 50, 40, image=1)]
    return cl.Sample(
        pages, "Which colour?", "red", region, id=f"doc-{seed}", meta={"pages": [4, 7, 9]}
    )


def slow(model, sample, heads):
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    inputs = model.prepare(sample)
    tm = inputs.token_maps[0]
    with torch.no_grad():
        patterns = hf(**inputs.tensors, output_attentions=True, use_cache=False).attentions
    masses = np.zeros(len(tm.images))
    for page, positions in enumerate(tm.images):
        for layer, head in heads:
            masses[page] += np.mean(
                [sum(float(patterns[layer][0, head, i, j]) for j in positions) for i in tm.question]
            )
    return masses


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pages_are_ranked_by_attention_beyond_the_null_question(model, batch_size):
    documents, heads = [document(0), document(5)], [(0, 1), (2, 3), (2, 0)]
    documents[1].question = "Which one of these?"
    ranking = cl.rerank_pages(model, documents, heads, batch_size=batch_size)
    plain = cl.rerank_pages(model, documents, heads, calibrated=False, batch_size=batch_size)
    for number, sample in enumerate(documents):
        asked, null = (
            slow(model, sample, heads),
            slow(model, replace(sample, question="N/A"), heads),
        )
        np.testing.assert_allclose(plain.scores[number], asked, atol=1e-6)
        np.testing.assert_allclose(ranking.scores[number], asked - null, atol=1e-6)
        assert ranking.ranked[number] == [[4, 7, 9][i] for i in np.argsort(null - asked)]
    assert ranking.gold == [[7], [7]] and ranking.chance == pytest.approx(1 / 3)
    assert ranking.recall(1).value == np.mean([ranked[0] == 7 for ranked in ranking.ranked])
    assert ranking.recall(3).value == 1


def test_recall_of_several_evidence_pages(model):
    sample = replace(document(0), meta={"pages": [4, 7, 9], "evidence_pages": [4, 9]})
    ranking = cl.rerank_pages(model, [sample], [(1, 1)])
    assert ranking.gold == [[4, 9]] and ranking.recall(1).value == 0.5 * (ranking.ranked[0][0] != 7)
    assert ranking.recall(2).value == len({4, 9} & set(ranking.ranked[0][:2])) / 2


def test_what_cannot_be_ranked_is_said(model):
    with pytest.raises(cl.CorelensError, match="0 heads"):
        cl.rerank_pages(model, [document(0)], [])
    with pytest.raises(cl.CorelensError, match="1 images"):
        cl.rerank_pages(
            model, [replace(document(0), images=[picture(0)], regions=[], meta={})], [(0, 0)]
        )
    with pytest.raises(cl.CorelensError, match="without evidence pages"):
        cl.rerank_pages(model, [replace(document(0), regions=[])], [(0, 0)])
    with pytest.raises(cl.CorelensError, match="heads of another model"):
        cl.rerank_pages(model, [document(0)], [(40, 0)])


# --- sinks


def test_sinks_are_what_is_looked_at_whatever_is_asked():
    model, boards = looking_model(), samples(4, seed=3)
    sinks = cl.metrics.visual_sinks(model, boards, threshold=3)
    # two heads always look at the red and at the blue cell
    for number, sample in enumerate(boards):
        always = {box(sample.meta["marked"]).bounds, box(sample.meta["distractor"]).bounds}
        assert {sink.bounds for sink in sinks.boxes(number)} == always
    assert (sinks.share > 0.5).all() and "4 samples" in repr(sinks)
    assert [
        len(tokens) for tokens in cl.metrics.visual_sinks(model, boards, threshold=1e9).tokens
    ] == [0] * 4
    figure = sinks.plot(0)
    assert figure.axes[0].images and "sinks" in figure.axes[0].get_title(loc="left")


def test_strengths_are_the_least_over_questions_of_the_mean_attention(model):
    sample = document(0)
    sinks = cl.metrics.visual_sinks(model, sample, questions=["N/A", "Which?"])
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    each = []
    for question in ("N/A", "Which?"):
        inputs = model.prepare(replace(sample, question=question))
        tm = inputs.token_maps[0]
        rows = sorted({*tm.question.tolist(), *tm.last.tolist()})
        with torch.no_grad():
            patterns = hf(**inputs.tensors, output_attentions=True, use_cache=False).attentions
        drawn = torch.stack(
            [pattern[0][:, rows][:, :, tm.visual].mean((0, 1)) for pattern in patterns]
        ).mean(0)
        each.append((drawn / drawn.mean()).numpy())
    np.testing.assert_allclose(sinks.strengths[0], np.min(each, axis=0), rtol=1e-4)


def test_a_metric_leaves_sinks_out():
    model, boards = looking_model(), samples(4, seed=3)
    scores = cl.score_heads(
        model, boards, ["ram", "ram[sinks=left_out]", "visual_mass[sinks=left_out]"], batch_size=3
    )
    # the head that looks at the red cell, whatever is asked
    assert scores["ram"].values[0, 0] > 0.9
    # that cell is a sink here: nothing is left of the region
    assert scores["ram[sinks=left_out]"].values[0, 0] < 0.01
    assert (
        scores["visual_mass[sinks=left_out]"].values[0, 2]
        > 0.1
        > scores["visual_mass[sinks=left_out]"].values[0, 1]
    )
    assert scores["ram[sinks=left_out]"].meta["sinks"] == "left_out"
    with pytest.raises(cl.CorelensError, match="which is a chat"):
        cl.metrics.visual_sinks(
            model, cl.Sample(messages=[{"role": "user", "content": "What?"}], id="c")
        )
