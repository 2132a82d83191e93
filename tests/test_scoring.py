"""The sets' own scores against cases worked out by hand from their published rules."""

import pytest

import corelens as cl
from corelens.data.scoring import answerable_f1, iou, recall_at, score

CASES = [
    # rule, meta, gold, text, score
    ("exact_match", {}, "ball", " Ball. ", 1),
    ("exact_match", {"answers": ["ball", "sports ball"]}, "ball", "sports  ball", 1),
    ("exact_match", {}, "ball", "a ball", 0),
    ("anls", {}, "Total 42", "total 42", 1),
    ("anls", {}, "abcde", "abcdx", 0.8),
    ("anls", {}, "abcd", "abxy", 0),  # similarity 0.5 does not exceed the threshold
    ("anls", {"answers": ["no", "yes"]}, "no", "yes", 1),
    ("multiple_choice", {}, "B", "B", 1),
    ("multiple_choice", {}, "B", "(B) Takes (twice)", 1),
    ("multiple_choice", {}, "B", "B. Takes", 1),
    ("multiple_choice", {}, "B", "Because of B", 0),
    ("multiple_choice", {}, "B", "(A) or (B)", 0),
    ("box_iou", {"box": [0, 0, 100, 100]}, "[0, 0, 100, 100]", "<box>(0,0),(100,60)</box>", 1),
    ("box_iou", {"box": [0, 0, 100, 100]}, "", "[0, 0, 100, 50]", 0),  # exactly half
    ("box_iou", {"box": [0, 0, 100, 100]}, "", "left", 0),
    ("mmlongbench_doc", {"answer_format": "Int"}, "8", "8.0", 1),
    ("mmlongbench_doc", {"answer_format": "Int"}, "8", "eight", 0),
    # as the benchmark: its gold is no number
    ("mmlongbench_doc", {"answer_format": "Int"}, "21%", "21%", 0),
    ("mmlongbench_doc", {"answer_format": "Float"}, "18.29%", "0.1829", 1),
    ("mmlongbench_doc", {"answer_format": "Float"}, "18.29%", "18.4", 1),  # within 1%
    ("mmlongbench_doc", {"answer_format": "Float"}, "18.29%", "18.6", 0),
    ("mmlongbench_doc", {"answer_format": "Str"}, "Less well-off", "less well-of", 12 / 13),
    ("mmlongbench_doc", {"answer_format": "Str"}, "page 5", "page 6", 0),  # must be exact
    ("mmlongbench_doc", {"answer_format": "Str"}, "2015-06", "2015-06", 1),
    ("mmlongbench_doc", {"answer_format": "None"}, "Not answerable", "not answerable", 1),
    ("mmlongbench_doc", {"answer_format": "List"}, "['White', '10%']", "['10%', 'White']", 1),
    ("mmlongbench_doc", {"answer_format": "List"}, "['White', 'Black']", "['White', 'Blacks']", 5 / 6),
    ("mmlongbench_doc", {"answer_format": "List"}, "['White', 'Black']", "White", 0),
    ("sub_em", {"answers": ["Gaudí", "Antoni Gaudí"]}, "Gaudí", "Answer: It was the Gaudí!", 1),
    ("sub_em", {}, "kitchen", "the bath", 0),
    ("binary_acc", {}, "Yes", "No, rather: yes", 1),
    ("binary_acc", {}, "No", "perhaps", 0),
    ("soft_acc", {}, "[1, 0, 2]", "Answer: [3]", 1),
    ("soft_acc", {}, "[1, 0, 2]", "1 and 1", 0),
    ("mc_acc", {}, "B", "Between A and B, the answer is (B).", 1),
    ("mc_acc", {}, "B", "answer: A", 0),
    # as the benchmark: behind "answer:", the last letter counts
    ("mc_acc", {}, "B", "answer: A, not B", 1),
    ("cls_acc", {}, "3", "label: 3", 1),
    ("cls_acc", {}, "3", "3 or 4", 0),
    ("doc_qa", {"answer_format": "Integer"}, "1,200", "Answer: about 1200 people", 1),
    ("doc_qa", {"answer_format": "Float"}, "0.5", "50%", 1),
    ("doc_qa", {"answer_format": "Float"}, "0.5", "0.6", 0),
    ("doc_qa", {"answer_format": "String"}, "the red house", "a red car", 0.5),
    ("doc_qa", {"answer_format": "String"}, "page 3", "it is page 3", 1),
    # words: 1 of 2 and of 2
    ("doc_qa", {"answer_format": "List"}, '["red house", 7]', "house, 7", 0.5 * 0.5 + 0.5),
    ("doc_qa", {"answer_format": "Integer"}, "14:04", "14:04", 0),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "meta", "gold", "text", "wanted"), CASES)
def test_score(rule, meta, gold, text, wanted):
    assert score(cl.Sample(answer=gold, meta={"scoring": rule, **meta}), text) == pytest.approx(
        wanted
    )


def test_answers_that_need_a_judge_are_refused():
    for rule, message in (("gpt-4", "GPT-4"), ("rouge", "rouge-score"), ("bleu", "no rule")):
        with pytest.raises(cl.CorelensError, match=message):
            score(cl.Sample(answer="x", meta={"scoring": rule}, id="7"), "x")


def test_f1_of_answerable_questions():
    def asked(gold):
        return cl.Sample(answer=gold, meta={"scoring": "mmlongbench_doc", "answer_format": "Str"})

    samples = [asked("red"), asked("green"), asked("Not answerable"), asked("blue")]
    f1 = answerable_f1(samples, ["red", "Not answerable", "black", "blue"])
    recall, precision = 2 / 3, 2 / 3  # two right of three answerable, and of three answered
    assert f1 == pytest.approx(2 * recall * precision / (recall + precision))
    assert answerable_f1(samples, ["Not answerable"] * 4) == 0


def test_boxes_and_pages():
    assert (
        iou([0, 0, 2, 2], [1, 1, 3, 3]) == pytest.approx(1 / 7)
        and iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    )
    assert recall_at([4, 2, 9], [2, 5], 2) == 0.5 and recall_at([4], [], 1) == 0


def test_evaluate_uses_the_rule_of_the_set_and_refuses_what_needs_a_judge():
    model = cl.load_demo("qwen3vl-s")
    samples = cl.synthetic("refer", 3, seed=4)
    plain = cl.evaluate(model, samples)
    assert plain.accuracy == 1 and plain.per_sample[0].score is None
    digit = samples[0].answer
    # one of two characters is written
    samples[0].meta |= {"scoring": "anls", "answers": [f"{digit}x", "other"]}
    samples[1].meta |= {"scoring": "exact_match", "answers": ["none", samples[1].answer]}
    for evaluation in (cl.evaluate(model, samples), cl.evaluate(model, samples, batch_size=2)):
        # ANLS: 0.5 is not above 0.5
        assert [answer.score for answer in evaluation.per_sample] == [0.0, 1.0, None]
        assert (
            evaluation.accuracy == pytest.approx(2 / 3) and evaluation.per_sample[0].given == digit
        )
    samples[0].meta["answers"] = [f"{digit}.", digit]
    assert cl.evaluate(model, samples).accuracy == 1
    blind = cl.evaluate(
        model, samples, cl.knockout(None, rows="question+last+answer", columns="visual")
    )
    assert blind.per_sample[1].score == 0  # written under the same hooks
    sparse = cl.evaluate(
        model,
        samples,
        sparse=cl.SparseInference(cl.HeadSet([(0, 0)]), cl.Streaming(4, 64)),
        rounds=0,
    )
    assert sparse.per_sample[1].score in (0.0, 1.0)
    samples[2].meta["scoring"] = "gpt-4"
    with pytest.raises(cl.CorelensError, match="GPT-4 judge"):
        cl.evaluate(model, samples)
