"""TokenMap on a row made by hand: 2 padding, 12 text, one image of 2 × 2 with a newline a row,
text, answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from corelens.errors import CorelensError
from corelens.tokens.cells import Picture, covered_tokens
from corelens.tokens.regions import Box, Mask, Tube
from corelens.tokens.token_map import TokenMap

BOXES = torch.tensor(
    [[0, 0, 10, 10], [10, 0, 20, 10], [0, 10, 10, 20], [10, 10, 20, 20]], dtype=torch.float64
)


def make(regions=(), weights="touch", **changes) -> TokenMap:
    picture = Picture(torch.tensor([3, 4, 6, 7]), BOXES)
    real = torch.ones(16, dtype=torch.bool)
    real[:2] = False
    made = TokenMap(
        real=real,
        placeholder=torch.tensor([3, 4, 5, 6, 7, 8]),
        visual=torch.tensor([3, 4, 6, 7]),
        last=torch.tensor([13]),
        pictures=[picture],
        parts={"question": torch.tensor([10, 11]), "answer": torch.tensor([14, 15])},
        covered=covered_tokens([picture], regions, weights),
        id="s",
    )
    return replace(made, **changes)


def test_names():
    tm = make([Box(2, 2, 12, 8)])
    expected = {
        "visual": [3, 4, 6, 7], "question": [10, 11], "last": [13], "answer": [14, 15], "region": [3, 4],
        "text": [2, 9, 10, 11, 12, 13, 14, 15], "all": list(range(2, 16)), "image:0": [3, 4, 6, 7],
        "question+last+answer": [10, 11, 13, 14, 15], "region + last": [3, 4, 13],
    }  # fmt: skip
    for name, positions in expected.items():
        assert tm.positions(name).tolist() == positions, name
    assert tm.positions("answer", rows=True).tolist() == [13, 14]
    assert tm.positions("question+last+answer", rows=True).tolist() == [10, 11, 13, 14]
    assert (tm.length, tm.start, tm.stop) == (16, 2, 16)
    tm.positions("region").zero_()  # what is handed out is the caller's
    assert tm.positions("region").tolist() == [3, 4]


def test_an_answer_that_was_not_prepared_is_left_out_of_sums_only():
    tm = make(parts={"question": torch.tensor([10, 11])})
    assert tm.positions("question+last+answer").tolist() == [10, 11, 13]
    with pytest.raises(CorelensError, match="answer=True"):
        tm.positions("answer")


def test_explicit_positions():
    tm = make()
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[1, 5]] = True
    for positions in ([5, 1, 5], torch.tensor([1, 5]), np.array([5, 1]), mask, range(1, 6, 4)):
        assert tm.positions(positions).tolist() == [1, 5]
    assert tm.positions(7).tolist() == [7] and tm.positions([]).tolist() == []


@pytest.mark.parametrize(
    "given",
    [16, [-1], torch.tensor([0.5]), "questions", "image:1", "frame:0", "image:x", "", "visual+"],
)
def test_unknown_positions(given):
    with pytest.raises(CorelensError, match=r"'s'|of 16 tokens|one of 'question'"):
        make().positions(given)


def test_cells():
    tm = make()
    assert tm.cell(6) == (0, 0, 10, 10, 20) and tm.frames(6) == ()
    with pytest.raises(CorelensError, match="no visual token"):
        tm.cell(5)


def test_regions_touch_or_weigh():
    box, mask = Box(5, 5, 10, 10), Mask(np.eye(20, dtype=bool))
    tm = make([box, mask])
    assert [tokens.tolist() for tokens in tm.regions] == [[3], [3, 7]]
    assert [weights.tolist() for weights in tm.region_weights] == [[1], [1, 1]]
    assert tm.region.tolist() == [3, 7] and tm.region_weight.tolist() == [1, 1]
    tm = make([box, mask], "fraction")
    assert [weights.tolist() for weights in tm.region_weights] == [
        [0.25],
        pytest.approx([0.1, 0.1]),
    ]
    assert tm.region_weight.tolist() == pytest.approx([0.35, 0.1])


def test_a_region_that_ends_at_a_cells_edge_does_not_touch_the_next():
    assert make([Box(0, 0, 10, 20)]).region.tolist() == [3, 6]


def test_video():
    frames = torch.tensor([[0, 1], [0, 1], [2, -1], [2, -1]])
    video = Picture(torch.tensor([3, 4, 6, 7]), BOXES[[0, 1, 0, 1]], frames)
    tube = Tube({1: Box(0, 0, 10, 10), 2: Box(12, 0, 17, 10)})
    tm = make(pictures=[video], covered=covered_tokens([video], [tube], "fraction"))
    assert tm.region.tolist() == [3, 7] and tm.region_weight.tolist() == [0.5, 0.5]
    assert tm.frames(3) == (0, 1) and tm.frames(7) == (2,) and tm.cell(7) == (2, 10, 0, 20, 10)
    assert tm.positions("frame:1").tolist() == [3, 4] and tm.positions("frame:2").tolist() == [6, 7]
    with pytest.raises(CorelensError, match="below 3"):
        tm.positions("frame:3")


def test_a_cell_that_sees_padding_only_is_covered_by_nothing():
    picture = Picture(
        torch.tensor([3, 4]), torch.tensor([[0, 0, 20, 20], [20, 0, 20, 20]], dtype=torch.float64)
    )
    assert make(
        covered=covered_tokens([picture], [Box(0, 0, 20, 20)], "touch")
    ).region.tolist() == [3]


def test_a_region_that_covers_no_token():
    with pytest.raises(CorelensError, match="covers no visual token"):
        make([Box(30, 0, 40, 10)])


def test_what_is_missing_is_said():
    tm = make(parts={})
    with pytest.raises(CorelensError, match="sample 's' without question"):
        _ = tm.question
    with pytest.raises(CorelensError, match="sample 's' without a region"):
        _ = tm.region
    assert tm.regions == []


def test_question_before_the_evidence():
    tm = make([Box(0, 0, 5, 5)])
    assert tm.evidence_rows("question").tolist() == [10, 11]
    before = replace(tm, parts={"question": torch.tensor([2])})
    with pytest.raises(CorelensError, match="rows='last'"):
        before.evidence_rows("question")
    assert before.evidence_rows("last").tolist() == [13]
    around = replace(tm, parts={"question": torch.tensor([2, 9])})
    assert around.evidence_rows("question").tolist() == [2, 9]


def test_moved():
    tm = make([Box(0, 0, 5, 5)])
    moved = tm.moved(4, 25)
    assert (moved.length, moved.start, moved.stop) == (25, 6, 20)
    for name in ("visual", "question", "last", "answer", "region", "text", "all", "image:0"):
        assert torch.equal(moved.positions(name), tm.positions(name) + 4)
    assert moved.cell(10) == tm.cell(6)
    with pytest.raises(CorelensError):
        tm.moved(10, 20)
