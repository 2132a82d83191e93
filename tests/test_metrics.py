"""Scores of heads against loops that spell out their formulas, on patterns whose scores are known."""

import numpy as np
import pytest
import torch

from corelens import metrics
from corelens.errors import CorelensError
from corelens.heads import HeadScores
from corelens.metrics import SPECS, check_finite, metric
from corelens.tokens import Picture, TokenMap


def row_map(pad=3, grid=4, region=((5, 6, 9),), weights=None, question_first=False):
    """[padding][head of prompt][grid × grid patches][question of 4][rest], the region at the given patches."""
    visual = torch.arange(pad + 2, pad + 2 + grid * grid)
    question = torch.arange(int(visual[-1]) + 2, int(visual[-1]) + 6)
    length = int(question[-1]) + 4
    real = torch.arange(length) >= pad
    box = torch.tensor([[x * 16.0, y * 16.0, x * 16 + 16.0, y * 16 + 16.0] for y in range(grid) for x in range(grid)])
    if question_first:
        question = torch.arange(pad, pad + 2)
    covered = [(visual[list(r)], torch.ones(len(r)) if weights is None else torch.tensor(weights)) for r in region]
    return TokenMap(
        real, visual, visual, torch.tensor([length - 1]), [Picture(visual, box)],
        parts={"question": question, "answer": torch.tensor([length - 1])}, covered=covered, id="s7",
    )  # fmt: skip


def causal_pattern(tm, heads=3, seed=0, uniform=False):
    """A softmax of random scores, causal, padding hidden: [head, query, key]."""
    scores = torch.randn(heads, tm.length, tm.length, generator=torch.Generator().manual_seed(seed)) * 3
    hidden = torch.ones(tm.length, tm.length).triu(1).bool() | ~tm.real[None]
    return torch.softmax((scores * (not uniform)).masked_fill(hidden, -torch.inf), -1).nan_to_num()


def rows_of(pattern, positions):
    return pattern[:, positions]


def test_ram_is_the_row_that_looks_hardest():
    tm = row_map(region=((5, 6), (6, 9)))
    pattern = causal_pattern(tm)
    rows = rows_of(pattern, tm.question)
    slow = [[sum(float(row[j]) for j in {int(p) for r in tm.regions for p in r}) for row in head] for head in rows]
    assert torch.allclose(metrics.ram(rows, tm), torch.tensor([max(head) for head in slow]), atol=1e-6)
    assert torch.allclose(
        metrics.ram(rows, tm, reduce="mean"), torch.tensor([np.mean(head) for head in slow]).float(), atol=1e-6
    )


def test_ram_weighs_tokens_that_a_region_covers_in_part():
    tm = row_map(weights=[1.0, 0.25, 0.5])
    rows = rows_of(causal_pattern(tm), tm.last)
    region = tm.region
    slow = rows[:, 0, region[0]] + 0.25 * rows[:, 0, region[1]] + 0.5 * rows[:, 0, region[2]]
    assert torch.allclose(metrics.ram(rows, tm), slow, atol=1e-6)


def test_ram_over_every_key_is_one_and_adds_up_over_disjoint_regions():
    pattern = causal_pattern(row_map())
    whole = row_map()
    everything = TokenMap(**{**vars(whole), "covered": [(whole.all, torch.ones(len(whole.all)))]})
    assert torch.allclose(metrics.ram(rows_of(pattern, whole.question), everything), torch.ones(3), atol=1e-6)
    a, b, both = row_map(region=((1, 2),)), row_map(region=((7, 8),)), row_map(region=((1, 2), (7, 8)))
    rows = rows_of(pattern, whole.question)
    parts = metrics.ram(rows, a, reduce="mean") + metrics.ram(rows, b, reduce="mean")
    assert torch.allclose(parts, metrics.ram(rows, both, reduce="mean"), atol=1e-6)
    assert (metrics.ram(rows, a) + metrics.ram(rows, b) >= metrics.ram(rows, both) - 1e-6).all()  # of max only this


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_uniform_head_has_ram_by_counting_and_lift_one(reduce):
    tm = row_map()
    rows = rows_of(causal_pattern(tm, uniform=True), tm.question)
    counted = [len(tm.region) / (int(i) - tm.start + 1) for i in tm.question]
    expected = max(counted) if reduce == "max" else float(np.mean(counted))
    assert metrics.ram(rows, tm, reduce=reduce).tolist() == pytest.approx([expected] * 3)
    above, below = metrics.lift(rows, tm)
    assert (above / below).tolist() == pytest.approx([1, 1, 1])
    above, below = metrics.precision(rows, tm)
    assert (above / below).tolist() == pytest.approx([3 / 16] * 3)


def test_visual_mass_precision_and_lift_against_loops():
    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.question)
    seen = rows[:, :, tm.visual].sum(-1)
    found = rows[:, :, tm.region].sum(-1)
    assert torch.allclose(metrics.visual_mass(rows, tm), seen.max(-1).values, atol=1e-6)
    assert torch.allclose(metrics.visual_mass(rows, tm, reduce="mean"), seen.mean(-1), atol=1e-6)
    above, below = metrics.precision(rows, tm)
    assert torch.allclose(above / below, found.mean(-1) / seen.mean(-1), atol=1e-6)
    above, below = metrics.lift(rows, tm)
    assert torch.allclose(above / below, found.mean(-1) / seen.mean(-1) * 16 / 3, atol=1e-5)


def test_a_sample_without_visual_mass_is_left_out_of_precision_and_counted():
    tm, blind = row_map(), torch.zeros(3, 4, row_map().length)
    blind[:, :, tm.start] = 1
    parts = [metrics.precision(p, tm) for p in (rows_of(causal_pattern(tm), tm.question), blind)]
    above, below = (np.stack([part[i].numpy() for part in parts])[:, None] for i in (0, 1))
    scores = HeadScores(parts=(above, below))
    assert np.allclose(scores.values[0], (parts[0][0] / parts[0][1]).numpy()) and (scores.left_out == 1).all()


def test_gaze_is_ram_of_the_last_row():
    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.last)
    assert torch.equal(metrics.gaze(rows, tm), metrics.ram(rows, tm)) and metric("gaze").rows == "last"


def test_random_scores_are_the_same_for_every_sample_and_differ_by_layer_and_seed():
    tm = row_map()
    a, b = (rows_of(causal_pattern(tm, heads=8, seed=s), tm.question) for s in (0, 1))
    m = metric("random")
    assert torch.equal(m.compute(a, tm, layer=2), m.compute(b, tm, layer=2))
    draws = torch.stack([metric("random", seed=s).compute(a, tm, layer=la) for s in range(20) for la in range(20)])
    assert len({tuple(row.tolist()) for row in draws}) == 400 and 0.45 < draws.mean() < 0.55
    assert abs(np.corrcoef(draws[:-1].flatten(), draws[1:].flatten())[0, 1]) < 0.06


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (metric("ram"), "ram"),
        (metric("ram", rows="last", reduce="mean"), "ram[rows=last,reduce=mean]"),
        (metric("ram", rows="question", reduce="max"), "ram"),
        (metric("gaze"), "gaze"),
        (metric("random", seed=0), "random"),
        (metric("random", seed=5), "random[seed=5]"),
        (metric("lift", rows="answer"), "lift[rows=answer]"),
    ],
)
def test_a_key_names_what_differs_from_the_default_and_reads_back(made, key):
    assert made.key == key and metric(key) == made and metric(made) is made and hash(made) == hash(metric(key))


def test_a_metric_of_ones_own_is_a_function():
    def sharpest(pattern, token_map, floor=0.0):
        return pattern.amax((-2, -1)).clamp(min=floor)

    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.question)
    assert rows.shape == (3, 4, 29)
    m = metric(sharpest)
    assert m.key == "sharpest" and m.rows == "question" and torch.equal(m.compute(rows, tm), rows.amax((-2, -1)))
    raised = metric(sharpest, rows="last", floor=2.0)
    assert raised.key == "sharpest[rows=last,floor=2.0]" and raised.compute(rows, tm).min() == 2
    with pytest.raises(CorelensError, match=r"row_zero: a score of \(3, 29\)"):

        def row_zero(pattern, token_map):
            return pattern[:, 0]

        metric(row_zero).compute(rows, tm)


def test_a_name_reduction_or_option_that_does_not_exist_is_refused():
    with pytest.raises(CorelensError, match="did you mean 'precision'"):
        metric("presicion")
    with pytest.raises(CorelensError, match=r"one of ram, visual_mass"):
        metric("zzz")
    with pytest.raises(CorelensError, match="reduce='median'"):
        metric("ram", reduce="median")
    with pytest.raises(CorelensError, match="no reduce: lift"):
        metric("lift", reduce="max")
    with pytest.raises(CorelensError, match="temperature=2 for ram"):
        metric("ram", temperature=2)
    with pytest.raises(CorelensError, match="check brackets"):
        metric("ram[last]")
    with pytest.raises(CorelensError, match="reduce='median'"):
        metrics.ram(torch.rand(2, 3, row_map().length), row_map(), reduce="median")


def test_what_a_sample_lacks_is_named_with_metric_and_sample():
    tm = row_map(region=())
    rows = rows_of(causal_pattern(tm), tm.question)
    with pytest.raises(CorelensError, match=r"lift: sample 's7' without a region"):
        metric("lift").compute(rows, tm)
    with pytest.raises(CorelensError, match=r"ram: sample 's7' without a region"):
        metric("ram").row_positions(tm)
    assert metric("visual_mass").compute(rows, tm).shape == (3,)
    with pytest.raises(CorelensError, match="without question rows"):
        metric("visual_mass").compute(rows[:, :0], tm)
    before = row_map(question_first=True)
    with pytest.raises(CorelensError, match="use rows='last'"):
        metric("ram").row_positions(before)
    assert metric("ram", rows="last").row_positions(before).tolist() == before.last.tolist()


def test_not_finite_scores_are_named():
    bad = torch.zeros(2, 3)
    check_finite(bad, metric("ram"), "s7")
    bad[1, 2] = torch.nan
    with pytest.raises(CorelensError, match="ram of sample 's7': nan at L1H2"):
        check_finite(bad, metric("ram"), "s7")


def test_every_registered_metric_says_formula_and_range():
    for name, spec in SPECS.items():
        assert spec.function.__name__ == name and len(spec.function.__doc__) > 60
