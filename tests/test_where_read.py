"""Which rows the answer hangs on, and what each head alone is worth, against knockouts written out
by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.cli.rows import stored
from corelens.evaluation.answers import CI, Difference, Interval
from corelens.evaluation.causal import causal_scores
from corelens.evaluation.late_runs import LateRuns
from corelens.evaluation.where_read import RowCosts, where_read
from corelens.heads.scores import HeadScores
from corelens.interventions.counterfactuals import counterfactual
from corelens.testbed import circuit_model, samples
from helpers.families import tiny
from helpers.samples import mixed


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture(scope="module")
def answered():
    return mixed()


def logprobs(evaluation):
    return np.array([answer.logprob for answer in evaluation.per_sample])


def test_groups_are_knockouts_by_name_and_by_position(model, answered):
    costs = where_read(model, answered, batch_size=2)
    clean = cl.evaluate(model, answered)
    every = [
        cl.evaluate(model, answered, cl.knockout(None, rows=rows))
        for rows in ("question", "template", "last")
    ]
    for rows, cut in zip(("question", "template", "last"), every, strict=True):
        lost = (logprobs(clean) - logprobs(cut)).mean()
        assert (
            costs.logprob_costs[rows].difference == pytest.approx(lost, abs=1e-4)
            and abs(lost) > 1e-4
        )
        assert costs.costs[rows].difference == pytest.approx(clean.accuracy - cut.accuracy)
    lost, counted = [], 0
    for sample in answered:  # each token alone, each sample alone
        question = model.prepare(sample, answer=True).token_maps[0].question
        if len(question) > 2:
            counted += 1
            cut = cl.evaluate(model, sample, cl.knockout(None, rows=[int(question[2])]))
            lost.append(float((logprobs(cl.evaluate(model, sample)) - logprobs(cut))[0]))
    assert costs.counts["question[2]"] == counted
    assert costs.logprob_costs["question[2]"].difference == pytest.approx(np.mean(lost), abs=1e-4)
    longest = max(len(model.prepare(sample).token_maps[0].question) for sample in answered)
    assert (
        sum(group.startswith("question[") for group in costs.costs) == longest == len(costs.texts)
    )


def test_a_run_folder_keeps_what_is_finished(model, answered, tmp_path, monkeypatch):
    whole = where_read(model, answered, tokens=False, batch_size=2)
    cut, left = LateRuns.evaluate, [1, 1]

    def stops(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return cut(*arguments)

    monkeypatch.setattr(LateRuns, "evaluate", stops)
    with pytest.raises(KeyboardInterrupt):
        where_read(model, answered, tokens=False, batch_size=2, out=tmp_path)
    groups = list(whole.costs)
    assert {file.stem for file in tmp_path.glob("*.json")} == {"run", *groups[:2]}
    left += [1] * (len(groups) - 2)  # what is missing, and no more
    again = where_read(model, answered, tokens=False, batch_size=2, out=tmp_path)
    assert again.to_json() == whole.to_json() and not left
    with pytest.raises(cl.CorelensError, match="another columns"):
        where_read(model, answered, columns="visual", batch_size=2, out=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(cl.CorelensError, match="without a run folder"):
        where_read(model, answered)


def test_template_is_the_text_that_is_nothing_else(model, answered):
    for sample in answered:
        tm = model.prepare(sample, answer=True).token_maps[0]
        others = {*tm.question.tolist(), *tm.answer.tolist(), *tm.last.tolist()}
        assert tm.template.tolist() == [i for i in tm.text.tolist() if i not in others]
        assert tm.positions("template").tolist() == tm.template.tolist()


def test_the_circuit_reads_at_the_last_row():
    model, boards = circuit_model(), samples(24, seed=5)
    costs = cl.where_read(model, boards)
    assert costs.rows == "last" and costs.clean.value == 1
    clean = cl.evaluate(model, boards)
    for rows in ("question", "last"):  # a cost of nothing in 24 samples is not known to the point
        assert costs.costs[rows] == cl.paired(
            clean, cl.evaluate(model, boards, cl.knockout(None, rows=rows))
        )
        assert costs.costs[rows].ci.low < costs.costs[rows].difference
    assert costs.costs["question"].difference == 0 and costs.costs["all"].ci.low > 0.5
    assert costs.hurts("last") and costs.hurts("question+last") and costs.hurts("all")
    assert not costs.hurts("question") and not costs.hurts("template")
    scores = cl.score_heads(model, boards, ["ram", "ram[rows=last]", "lift"])
    assert costs.advice(scores["ram[rows=last]"]) is None
    advice = costs.advice(scores["ram"])
    assert "these heads look, and the answer does not need it" in advice
    assert (
        f"rows=last costs {100 * costs.costs['last'].difference:.0f} points: try 'ram[rows=last]'"
        in advice
    )
    assert "try 'lift[rows=last]'" in costs.advice(scores["lift"])
    assert "try 'ram[rows=last]'" in costs.advice(
        HeadScores(np.eye(3), meta={"key": "mine", "rows": "question"})
    )


def test_an_answer_that_hangs_on_nothing_is_said():
    nothing = Difference(0.0, CI(-0.1, 0.1))
    costs = RowCosts({"question": nothing, "last": nothing, "all": nothing}, dict.fromkeys(("question", "last"), nothing),
                     {"question": 9, "last": 9, "all": 9}, {}, Interval(0.1, 0.0, 0.3))  # fmt: skip
    assert "do not hang on it" in costs.advice(
        HeadScores(np.eye(2), meta={"key": "ram", "rows": "question"})
    )
    assert "no group of rows costs accuracy beyond its interval (n=9)" in costs.conclusion
    costs.costs["last"] = Difference(0.5, CI(0.1, 0.8))
    assert costs.conclusion == "the answer hangs on rows=last"


def test_costs_survive_a_file(model, answered, tmp_path):
    costs = where_read(model, answered)
    costs.save(tmp_path / "rows.json")
    read = RowCosts.load(tmp_path / "rows.json")
    assert read == costs and str(read) == str(costs) and stored(tmp_path) == costs
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(cl.CorelensError, match="cannot be read"):
        RowCosts.load(tmp_path / "rows.json")


def test_what_samples_lack_is_said(model, answered):
    with pytest.raises(cl.CorelensError, match="without a region"):
        where_read(model, [replace(answered[0], regions=[])])
    with pytest.raises(cl.CorelensError, match="without an answer"):
        where_read(model, [replace(answered[0], answer=None)])
    with pytest.raises(cl.CorelensError, match="no samples"):
        where_read(model, [])
    with pytest.raises(cl.CorelensError, match="one of knockout, attribution"):
        causal_scores(model, answered, kind="guess")
    with pytest.raises(cl.CorelensError, match="without a region or an answer"):
        causal_scores(model, [replace(answered[0], answer=None)])


STEP = 1e-2  # of a two-sided difference


# --- one head alone


def test_causal_knockout_is_evaluate_head_by_head(model, answered):
    scores_ = causal_scores(model, answered, batch_size=2)
    clean = cl.evaluate(model, answered)
    for head in [(0, 1), (2, 3), (3, 0)]:
        cut = cl.evaluate(model, answered, cl.knockout([head]))
        np.testing.assert_allclose(
            scores_.per_sample[(slice(None), *head)], logprobs(clean) - logprobs(cut), atol=1e-4
        )
    assert scores_.meta["key"] == "causal_knockout" and scores_.meta["samples"] == [
        sample.id for sample in answered
    ]


def test_causal_attribution_is_the_first_order_of_patching(model, answered):
    scores_ = causal_scores(model, answered, kind="attribution", batch_size=1)
    for number, sample in enumerate(answered):
        twin = sample
        for region in range(len(sample.regions)):
            twin = counterfactual(twin, "mask", region=region)
        twin.answer = sample.answer
        clean, other = (model.prepare(sample_, answer=True) for sample_ in (sample, twin))
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
        with torch.no_grad():
            _, here = model.run_with_cache(clean, names_filter=names)
            _, other_cache = model.run_with_cache(other, names_filter=names)
        for layer, head in [(0, 2), (2, 1)]:

            def moved(z, hook, layer=layer, head=head, sign=1, here=here, other_cache=other_cache):
                z = z.clone()
                name = f"blocks.{layer}.attn.hook_z"
                z[:, :, head] += sign * STEP * (other_cache[name] - here[name])[:, :, head]
                return z

            ends = []
            for sign in (1, -1):
                hook = (
                    f"blocks.{layer}.attn.hook_z",
                    lambda z, hook, s=sign, f=moved: f(z, hook, sign=s),
                )
                ends.append(logprobs(cl.evaluate(model, sample, [hook]))[0])
            slope = (ends[1] - ends[0]) / (2 * STEP)  # a cost: what is lost towards the twin
            assert scores_.per_sample[number, layer, head] == pytest.approx(
                slope, abs=2e-3, rel=0.05
            )


def test_the_circuit_s_copy_head_is_the_causal_one():
    model, boards = circuit_model(), samples(16, seed=5)
    scores_ = cl.evaluation.causal_scores(model, boards)
    assert scores_.top(1) == cl.HeadSet([(2, 2)]) and scores_.values[2, 2] > 1
    # the backup stands in: alone, the where head is worth nothing
    assert np.abs(scores_.values[0, 0]) < 1e-3
    assert np.abs(scores_.values[:, [1]]).max() < 1e-3  # decoys and sinks
