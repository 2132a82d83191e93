"""CoreLens as a model of lmms-eval: requests in the exact form of its "simple" models; its own runner,
where it is installed."""

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import corelens as cl
from corelens.cli.app import app
from corelens.evaluation.lmms_eval import lmms_model, run_tasks
from helpers.families import tiny


@pytest.fixture(scope="module")
def model():
    return cl.HookedMLLM(*tiny("qwen3_vl"))


@pytest.fixture
def theirs(monkeypatch):
    """lmms-eval's base class as of 0.7.3, without what it imports."""

    class lmms:
        is_simple = True

        def __init__(self):
            self._rank, self._world_size = 0, 1
            self.cache_hook = SimpleNamespace(add_partial=lambda name, request, answer: None)
            self.task_dict = {}

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = lmms
    return lmms


GREEDY = {"max_new_tokens": 4, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}


def documents(n=3):
    return [
        {
            "id": str(i),
            "image": sample.images[0],
            "question": sample.question,
            "answer": sample.answer,
        }
        for i, sample in enumerate(cl.synthetic("refer", n, seed=2))
    ]


def visual(document):
    return [document["image"].convert("RGB")]


def requests(documents, **options):
    """As ConfigurableTask.construct_requests makes them for generate_until."""
    return [
        SimpleNamespace(args=(d["question"], GREEDY | options, visual, i, "made", "test"))
        for i, d in enumerate(documents)
    ]


def asked(model, documents, *arguments, **options):
    made = lmms_model(model, *arguments, **options)
    made.task_dict["made"] = {"test": documents}
    return made


def test_answers_are_those_of_generate_under_the_same_hooks(model, theirs):
    shown = documents()
    hooks = cl.knockout(None, rows="text", columns="visual")
    plan = cl.SparseInference([(0, 1)], cl.Streaming(1, 4), decode="streaming")
    for edits, sparse in (((), None), (hooks, None), ((), plan)):
        made = asked(model, shown, edits, sparse)
        assert isinstance(made, theirs) and made.is_simple
        answers = made.generate_until(requests(shown))
        for document, answer in zip(shown, answers, strict=True):
            sample = cl.Sample(images=[document["image"]], question=document["question"])
            with model.hooks(fwd_hooks=list(edits)):
                if sparse is None:
                    ids = model.generate(model.prepare(sample), max_new_tokens=4)
                else:
                    with model.sparse(sparse):
                        ids = model.generate(model.prepare(sample), max_new_tokens=4)
            assert answer == model.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_likelihoods_are_those_of_evaluate(model, theirs):
    shown = documents()
    hooks = cl.knockout(None, rows="text", columns="visual")
    samples = [
        cl.Sample(images=[d["image"]], question=d["question"], answer=d["answer"], id=d["id"])
        for d in shown
    ]
    wanted = cl.evaluate(model, samples, hooks, batch_size=1)
    target = lambda document: document["answer"]  # noqa: E731
    made = asked(model, shown, hooks)
    given = made.loglikelihood(
        [
            SimpleNamespace(args=(d["question"], target, visual, i, "made", "test"))
            for i, d in enumerate(shown)
        ]
    )
    np.testing.assert_allclose([logprob for logprob, _ in given], wanted.logprobs, atol=1e-4)


def test_what_cannot_be_run_is_refused_by_name(model, theirs):
    shown = documents(1)
    blind = [SimpleNamespace(args=("Why?", GREEDY, lambda document: [], 0, "made", "test"))]
    with pytest.raises(cl.CorelensError, match="made, test 0: a document without a picture"):
        asked(model, shown).generate_until(blind)
    heard = [
        SimpleNamespace(args=("Why?", GREEDY, lambda document: [{"array": 1}], 0, "made", "test"))
    ]
    with pytest.raises(cl.CorelensError, match="dict"):
        asked(model, shown).generate_until(heard)
    with pytest.raises(cl.CorelensError, match="num_beams"):
        asked(model, shown).generate_until(requests(shown, num_beams=3))
    with pytest.raises(cl.CorelensError, match="several rounds"):
        asked(model, shown).generate_until_multi_round([])


def test_without_lmms_eval_it_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(cl.CorelensError, match="pip install lmms-eval"):
        lmms_model(model)


def test_the_command_line_runs_tasks_with_and_without_heads(model, theirs, monkeypatch, tmp_path):
    shown = documents()

    def simple_evaluate(model, tasks, batch_size, limit):
        model.task_dict["made"] = {"test": shown}
        answers = model.generate_until(requests(shown[:limit]))
        score = {"alias": "made", "letters,none": sum(map(len, answers)), "n": len(answers)}
        return {"results": {task: score | {"said": answers} for task in tasks}}

    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", ModuleType("evaluator"))
    sys.modules["lmms_eval.evaluator"].simple_evaluate = simple_evaluate
    monkeypatch.setattr("corelens.cli.eval.open_model", lambda *arguments: model)
    heads = cl.HeadSet([(0, head) for head in range(4)] + [(1, head) for head in range(4)])
    words = ["eval", "qwen3vl-s", "--tasks", "made", "--heads", ",".join(map(str, heads))]
    words += ["--limit", "2", "--out", str(tmp_path / "scores.json")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "made" in done.output and "8 heads, zero" in done.output
    results = json.loads((tmp_path / "scores.json").read_text())
    clean, without = (results[name]["made"] for name in ("clean", "8 heads, zero"))
    assert clean["n"] == without["n"] == 2 and clean["said"] != without["said"]
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
    with pytest.raises(cl.CorelensError, match="pip install lmms-eval"):
        CliRunner().invoke(app, words, catch_exceptions=False)


TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: made
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from PIL import Image


def visual(document):
    return [Image.open(document["image"]).convert("RGB")]
"""


def test_its_own_runner_runs_a_task_with_and_without_a_knockout(model, tmp_path):
    tasks = pytest.importorskip("lmms_eval.tasks")
    lines = []
    for document in documents(4):
        document["image"].save(tmp_path / f"{document['id']}.png")
        lines.append(json.dumps(document | {"image": str(tmp_path / f"{document['id']}.png")}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "made.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    manager = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = {}
    for name, hooks in (("clean", ()), ("cut", cl.knockout(None, rows="text", columns="visual"))):
        run = run_tasks(model, ["made"], hooks, task_manager=manager, bootstrap_iters=0)
        assert 0 <= run["results"]["made"]["exact_match,none"] <= 1
        results[name] = [sample["filtered_resps"] for sample in run["samples"]["made"]]
    assert len(results["clean"]) == 4 and results["clean"] != results["cut"]
