"""Scores of heads against loops that spell out their formulas, on patterns whose scores are
known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.metrics import METRICS, Metric, check_finite, head_scores, metric
from corelens.metrics.localization import elbow, spatial_entropy
from corelens.metrics.sinks import without
from corelens.tokens.cells import Picture
from corelens.tokens.token_map import TokenMap


def row_map(pad=3, grid=4, region=((5, 6, 9),), weights=None, question_first=False):
    """[padding][head of prompt][grid × grid patches][question of 4][rest], the region at the given
    patches."""
    visual = torch.arange(pad + 2, pad + 2 + grid * grid)
    question = torch.arange(int(visual[-1]) + 2, int(visual[-1]) + 6)
    length = int(question[-1]) + 4
    real = torch.arange(length) >= pad
    box = torch.tensor(
        [
            [x * 16.0, y * 16.0, x * 16 + 16.0, y * 16 + 16.0]
            for y in range(grid)
            for x in range(grid)
        ]
    )
    if question_first:
        question = torch.arange(pad, pad + 2)
    covered = [
        (visual[list(r)], torch.ones(len(r)) if weights is None else torch.tensor(weights))
        for r in region
    ]
    return TokenMap(
        real, visual, visual, torch.tensor([length - 1]), [Picture(visual, box)],
        parts={"question": question, "answer": torch.tensor([length - 1])}, covered=covered, id="s7",
    )  # fmt: skip


def causal_pattern(tm, heads=3, seed=0, uniform=False):
    """A softmax of random scores, causal, padding hidden: [head, query, key]."""
    scores = (
        torch.randn(heads, tm.length, tm.length, generator=torch.Generator().manual_seed(seed)) * 3
    )
    hidden = torch.ones(tm.length, tm.length).triu(1).bool() | ~tm.real[None]
    return torch.softmax((scores * (not uniform)).masked_fill(hidden, -torch.inf), -1).nan_to_num()


def rows_of(pattern, positions):
    return pattern[:, positions]


def test_ram_is_the_mean_over_rows_of_the_summed_attention_on_the_region():
    tm = row_map(region=((5, 6), (6, 9)))
    pattern = causal_pattern(tm)
    rows = rows_of(pattern, tm.question)
    slow = [
        [sum(float(row[j]) for j in {int(p) for r in tm.regions for p in r}) for row in head]
        for head in rows
    ]
    assert torch.allclose(
        metric("ram")(rows, tm), torch.tensor([np.mean(head) for head in slow]).float(), atol=1e-6
    )
    hardest = torch.tensor([max(head) for head in slow])
    assert torch.allclose(metric("ram", reduce="max")(rows, tm), hardest, atol=1e-6)


def test_ram_weighs_tokens_that_a_region_covers_in_part():
    tm = row_map(weights=[1.0, 0.25, 0.5])
    rows = rows_of(causal_pattern(tm), tm.last)
    region = tm.region
    slow = rows[:, 0, region[0]] + 0.25 * rows[:, 0, region[1]] + 0.5 * rows[:, 0, region[2]]
    assert torch.allclose(metric("ram")(rows, tm), slow, atol=1e-6)


def test_ram_over_every_key_is_one_and_adds_up_over_disjoint_regions():
    pattern = causal_pattern(row_map())
    whole = row_map()
    everything = replace(whole, covered=[(whole.all, torch.ones(len(whole.all)))])
    assert torch.allclose(
        metric("ram")(rows_of(pattern, whole.question), everything), torch.ones(3), atol=1e-6
    )
    a, b, both = (
        row_map(region=((1, 2),)),
        row_map(region=((7, 8),)),
        row_map(region=((1, 2), (7, 8))),
    )
    rows = rows_of(pattern, whole.question)
    parts = metric("ram")(rows, a) + metric("ram")(rows, b)
    assert torch.allclose(parts, metric("ram")(rows, both), atol=1e-6)
    hardest = metric("ram", reduce="max")
    # of max only this
    assert (hardest(rows, a) + hardest(rows, b) >= hardest(rows, both) - 1e-6).all()


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_a_uniform_head_has_ram_by_counting_and_lift_one(reduce):
    tm = row_map()
    rows = rows_of(causal_pattern(tm, uniform=True), tm.question)
    counted = [len(tm.region) / (int(i) - tm.start + 1) for i in tm.question]
    expected = max(counted) if reduce == "max" else float(np.mean(counted))
    assert metric("ram", reduce=reduce)(rows, tm).tolist() == pytest.approx([expected] * 3)
    above, below = metric("lift")(rows, tm)
    assert (above / below).tolist() == pytest.approx([1, 1, 1])
    above, below = metric("precision")(rows, tm)
    assert (above / below).tolist() == pytest.approx([3 / 16] * 3)


def test_visual_mass_precision_and_lift_against_loops():
    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.question)
    seen = rows[:, :, tm.visual].sum(-1)
    actual = rows[:, :, tm.region].sum(-1)
    assert torch.allclose(metric("visual_mass")(rows, tm), seen.mean(-1), atol=1e-6)
    assert torch.allclose(
        metric("visual_mass", reduce="max")(rows, tm), seen.max(-1).values, atol=1e-6
    )
    above, below = metric("precision")(rows, tm)
    assert torch.allclose(above / below, actual.mean(-1) / seen.mean(-1), atol=1e-6)
    above, below = metric("lift")(rows, tm)
    assert torch.allclose(above / below, actual.mean(-1) / seen.mean(-1) * 16 / 3, atol=1e-5)


def test_a_sample_without_visual_mass_is_left_out_of_precision_and_counted():
    tm, blind = row_map(), torch.zeros(3, 4, row_map().length)
    blind[:, :, tm.start] = 1
    parts = [metric("precision")(p, tm) for p in (rows_of(causal_pattern(tm), tm.question), blind)]
    above, below = (np.stack([part[i].numpy() for part in parts])[:, None] for i in (0, 1))
    scores = HeadScores(parts=(above, below))
    assert (
        np.allclose(scores.values[0], (parts[0][0] / parts[0][1]).numpy())
        and (scores.left_out == 1).all()
    )


def test_gaze_is_ram_of_the_last_row():
    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.last)
    assert (
        torch.equal(metric("gaze")(rows, tm), metric("ram")(rows, tm))
        and metric("gaze").rows == "last"
    )


def test_random_scores_are_the_same_for_every_sample_and_differ_by_layer_and_seed():
    tm = row_map()
    a, b = (rows_of(causal_pattern(tm, heads=8, seed=s), tm.question) for s in (0, 1))
    m = metric("random")
    assert torch.equal(m(a, tm, layer=2), m(b, tm, layer=2))
    draws = torch.stack(
        [metric("random", seed=s)(a, tm, layer=la) for s in range(20) for la in range(20)]
    )
    assert len({tuple(row.tolist()) for row in draws}) == 400 and 0.45 < draws.mean() < 0.55
    assert abs(np.corrcoef(draws[:-1].flatten(), draws[1:].flatten())[0, 1]) < 0.06


# --- metrics that need more than rows


def null_of(tm, seed=9):
    """The same picture under a shorter question, padded further: its token map and pattern."""
    shifted = row_map(pad=5)
    assert len(shifted.region) == len(tm.region)
    return shifted, causal_pattern(shifted, seed=seed)


def test_calibrated_ram_is_the_difference_to_the_null_question():
    tm = row_map()
    null_map, null = null_of(tm)
    rows, null_rows = rows_of(causal_pattern(tm), tm.question), rows_of(null, null_map.question[:2])
    for reduce in ("mean", "max"):
        m, plain = metric("calibrated_ram", reduce=reduce), metric("ram", reduce=reduce)
        actual = m(rows, tm, null_pattern=null_rows, null_token_map=null_map)
        assert (
            torch.allclose(actual, plain(rows, tm) - plain(null_rows, null_map), atol=1e-7)
            and m.needs_null
        )
    assert metric("calibrated_ram").reduce == "mean"
    with pytest.raises(CorelensError, match="calibrated_ram: no null_evidence"):
        metric("calibrated_ram")(rows, tm)


def test_qr_sums_calibrated_attention_without_outliers():
    tm = row_map(region=((0, 1, 2, 3, 4, 5, 6, 7), (10,)))
    rows = torch.zeros(2, 3, tm.length)
    first, second = tm.regions
    rows[0, :, first] = torch.tensor([0.05] * 7 + [0.01])  # one far below the mean
    rows[0, :, second] = 0.2
    rows[1, 0, first] = torch.linspace(0.01, 0.08, 8)  # no outlier; the mean of three rows
    null = torch.zeros(2, 1, tm.length)
    null[0, 0, first] = 0.02
    nothing = {"null_pattern": null, "null_token_map": tm}
    actual = metric("qr")(rows, tm, **nothing)
    calibrated = np.array([0.03] * 7 + [-0.01])
    assert calibrated[-1] < calibrated.mean() - 2 * calibrated.std(ddof=1)
    assert actual.tolist() == pytest.approx(
        [0.21 + 0.2, sum(np.linspace(0.01, 0.08, 8)) / 3], abs=1e-6
    )
    assert metric("qr", outlier=9.0)(rows, tm, **nothing)[0].item() == pytest.approx(
        0.20 + 0.2, abs=1e-6
    )
    same = rows * 0
    same[:, :, first] = 0.04  # no spread at all: nothing is an outlier
    assert metric("qr")(
        same, tm, null_pattern=null * 0, null_token_map=tm
    ).tolist() == pytest.approx([0.32, 0.32], abs=1e-6)


def test_value_mass_against_its_definition():
    tm = row_map(weights=[1.0, 0.5, 1.0])
    rows = rows_of(causal_pattern(tm, heads=4), tm.question)
    values, w_o = torch.randn(2, tm.length, 5), torch.randn(4, 5, 7)
    slow = torch.zeros(4, 4)
    for h in range(4):
        for i in range(4):
            for j, weight in zip(tm.region, tm.region_weight, strict=True):
                slow[h, i] += weight * (rows[h, i, j] * values[h // 2, j] @ w_o[h]).norm()
    actual = metric("value_mass")(rows, tm, values=values, w_o=w_o)
    assert torch.allclose(actual, slow.mean(-1), rtol=1e-5)
    hardest = metric("value_mass", reduce="max")(rows, tm, values=values, w_o=w_o)
    assert torch.allclose(hardest, slow.max(-1).values, rtol=1e-5)


def test_retrieval_counts_copied_tokens_looked_at_in_their_region():
    tm = row_map(region=((5, 6), (9, 10, 11)))
    a, b = tm.regions
    steps, texts = ["Total", " 7", " of", "", "42"], ["Total 7", "42"]
    looked = torch.tensor(
        [[a[0], a[1], a[0], a[0], b[2]], [b[0], a[1], a[0], a[0], tm.length + 3], [0, 0, 0, 0, 0]]
    )
    hits, copied = metric("retrieval")(None, tm, looked=looked, steps=steps, texts=texts)
    # " of" and "" stand in no region's text
    assert hits.tolist() == [3, 1, 0] and copied.tolist() == [3, 3, 3]
    assert metric("retrieval")(None, tm, looked=looked[:, :1], steps=["no"], texts=texts)[
        1
    ].tolist() == [0, 0, 0]
    with pytest.raises(CorelensError, match="retrieval: sample 's7': region 1 without text"):
        metric("retrieval")(None, tm, looked=looked, steps=steps, texts=["Total 7", None])


def test_visual_head_follows_sparsemm_s_rules():
    tm = row_map(region=((5, 6), (9, 10, 11)))
    a, b = tm.regions
    # "4" is in both boxes: it does not count
    steps, texts = ["Total", "7", "4", "42"], ["Total 47", "42"]
    looked = torch.tensor([[a[0], a[1], a[0], b[2]], [b[0], b[0], b[0], b[0]], [0, 0, 0, 0]])
    actual = metric("visual_head")(None, tm, looked=looked, steps=steps, texts=texts)
    assert actual.tolist() == pytest.approx([1 / 2 + 1 / 2 + 1 / 3, 1 / 3, 0])
    raw = np.stack([actual.numpy(), 3 * actual.numpy()])[:, None, None]  # two pictures, one layer
    scores = head_scores(metric("visual_head"), raw, {})
    assert scores.values.sum() == pytest.approx(1) and np.allclose(
        scores.values[0], (actual / actual.sum()).numpy()
    )
    assert head_scores(metric("visual_head"), raw * 0, {}).values.sum() == 0


def grid_map(columns, rows):
    visual = torch.arange(2, 2 + columns * rows)
    box = torch.tensor(
        [
            [x * 16.0, y * 16.0, x * 16 + 16.0, y * 16 + 16.0]
            for y in range(rows)
            for x in range(columns)
        ]
    )
    n = int(visual[-1]) + 4
    return TokenMap(
        torch.ones(n, dtype=torch.bool),
        visual,
        visual,
        torch.tensor([n - 1]),
        [Picture(visual, box)],
    )


def test_spatial_entropy_against_labelled_components():
    tm = grid_map(7, 5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        attention = rng.gamma(0.3, 1, 35)
        attention /= attention.sum()
        above = np.clip(attention - attention.mean(), 0, None).reshape(5, 7)
        parts, n = ndimage.label(above > 0.001, structure=np.ones((3, 3)))
        share = [above[parts == i].sum() / above.sum() for i in range(1, n + 1)]
        assert spatial_entropy(attention[None], tm) == pytest.approx(
            -sum(p * np.log(p) for p in share), abs=1e-9
        )


def test_one_place_has_less_entropy_than_two_and_a_bottom_row_is_scattered():
    tm = grid_map(6, 6)
    maps = {
        "one": [7, 8, 13, 14],
        "corner": [7, 14],
        "two": [0, 35],
        "bottom": [30, 31, 32, 33, 34, 35],
        "none": [],
    }
    actual = {}
    for name, lit in maps.items():
        attention = np.full(36, 0.005)
        attention[lit] = 0.2
        actual[name] = spatial_entropy(attention[None], tm)[0]
    assert actual["one"] == pytest.approx(0) == actual["corner"] and actual["two"] == pytest.approx(
        np.log(2)
    )
    assert actual["bottom"] == actual["none"] == pytest.approx(np.log(36) + 1)


def test_thumbnail_cells_touch_only_each_other():
    tm = grid_map(4, 4)
    large = torch.tensor(
        [[x * 32.0, y * 32.0, x * 32 + 32.0, y * 32 + 32.0] for y in range(2) for x in range(2)]
    )
    visual = torch.arange(2, 22)
    both = TokenMap(torch.ones(26, dtype=torch.bool), visual, visual, torch.tensor([25]),
                    [Picture(visual, torch.cat([tm.pictures[0].box, large]))])  # fmt: skip
    attention = np.full(20, 0.001)
    attention[0] = attention[16] = 0.4  # the same place, once in each view: two components
    assert spatial_entropy(attention[None], both) == pytest.approx(np.log(2), abs=0.01)


def test_localization_votes_for_the_heads_that_look_at_one_place():
    tm = grid_map(6, 6)
    pattern = torch.full((12, 1, tm.length), 1e-5)
    pattern[:, 0, tm.visual[0]] = torch.linspace(0.001, 0.002, 12)  # heads that hardly look
    pattern[3, 0, tm.visual[[7, 8]]] = 0.4  # one place
    pattern[5, 0, tm.visual[[0, 20, 35]]] = 0.27  # three places
    parts = torch.stack(metric("localization")(pattern, tm)).numpy()
    assert parts[0, 3] == pytest.approx(0.8, abs=0.01) and parts[1, 3] < parts[1, 5]
    raw = np.stack([parts, parts])[:, :, None]
    votes = head_scores(metric("localization"), raw, {}).values
    # 11 is the elbow itself
    assert np.argwhere(votes[0] == 1)[:, 0].tolist() == [3, 5, 11] and votes.sum() == 3
    all_look = raw.copy()
    # the elbow is the lowest: ten of twelve are chosen
    all_look[:, 0] = np.r_[0.5, 0.5, np.linspace(0.6, 0.9, 10)]
    all_look[:, 1] = np.arange(12)
    assert (
        head_scores(metric("localization"), all_look, {}).values[0].tolist() == [1] * 10 + [0] * 2
    )


def test_elbow_is_the_point_farthest_from_the_chord():
    assert elbow(np.array([0.01, 0.9, 0.02, 0.03, 0.8, 0.04])) == pytest.approx(0.04)
    values = np.random.default_rng(0).gamma(0.3, 1, 200)
    points = np.stack([np.arange(200), np.sort(values)], 1)
    line = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    rest = points - points[0] - np.outer((points - points[0]) @ line, line)
    assert elbow(values) == points[np.linalg.norm(rest, axis=1).argmax(), 1]


# --- the registry


@pytest.mark.parametrize(
    ("made", "key"),
    [
        (metric("ram"), "ram"),
        (metric("ram", rows="last", reduce="max"), "ram[rows=last,reduce=max]"),
        (metric("ram", rows="question", reduce="mean", keys="sum", samples="mean"), "ram"),
        (
            metric("ram", keys="hit", samples="vote", reduce="max"),
            "ram[keys=hit,reduce=max,samples=vote]",
        ),
        (metric("ram", sinks="left_out"), "ram[sinks=left_out]"),
        (metric("calibrated_ram", keys="max"), "calibrated_ram[keys=max]"),
        (metric("gaze"), "gaze"),
        (metric("random", seed=0), "random"),
        (metric("random", seed=5), "random[seed=5]"),
        (metric("lift", rows="answer"), "lift[rows=answer]"),
    ],
)
def test_a_key_names_what_differs_from_the_default_and_reads_back(made, key):
    assert (
        made.key == key
        and metric(key) == made
        and metric(made) is made
        and hash(made) == hash(metric(key))
    )


def test_a_metric_of_ones_own_is_a_function():
    def sharpest(pattern, token_map, floor=0.0):
        return pattern.amax((-2, -1)).clamp(min=floor)

    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.question)
    assert rows.shape == (3, 4, 29)
    m = metric(sharpest)
    assert (
        m.key == "sharpest"
        and m.rows == "question"
        and torch.equal(m(rows, tm), rows.amax((-2, -1)))
    )
    raised = metric(sharpest, rows="last", floor=2.0)
    assert raised.key == "sharpest[rows=last,floor=2.0]" and raised(rows, tm).min() == 2
    with pytest.raises(CorelensError, match=r"row_zero: a score of \(3, 29\)"):

        def row_zero(pattern, token_map):
            return pattern[:, 0]

        metric(row_zero)(rows, tm)


def test_a_name_reduction_or_option_that_does_not_exist_is_refused():
    with pytest.raises(CorelensError, match="did you mean 'precision'"):
        metric("presicion")
    with pytest.raises(CorelensError, match=r"one of ram, ram_excess"):
        metric("zzz")
    with pytest.raises(CorelensError, match="reduce='median'"):
        metric("ram", reduce="median")
    for option, value in {"reduce": "max", "keys": "max", "samples": "median"}.items():
        with pytest.raises(CorelensError, match=f"no {option}: lift"):
            metric("lift", **{option: value})
    with pytest.raises(CorelensError, match="keys='most' for ram"):
        metric("ram", keys="most")
    with pytest.raises(CorelensError, match="samples='mode' for ram"):
        metric("ram", samples="mode")
    with pytest.raises(CorelensError, match="no sinks: qr"):
        metric("qr", sinks="left_out")
    with pytest.raises(CorelensError, match="temperature=2 for ram"):
        metric("ram", temperature=2)
    with pytest.raises(CorelensError, match="check brackets"):
        metric("ram[last]")


def test_what_a_sample_lacks_is_named_with_metric_and_sample():
    tm = row_map(region=())
    rows = rows_of(causal_pattern(tm), tm.question)
    with pytest.raises(CorelensError, match=r"lift: sample 's7' without a region"):
        metric("lift")(rows, tm)
    with pytest.raises(CorelensError, match=r"ram: sample 's7' without a region"):
        metric("ram").row_positions(tm)
    assert metric("visual_mass")(rows, tm).shape == (3,)
    with pytest.raises(CorelensError, match="without question rows"):
        metric("visual_mass")(rows[:, :0], tm)
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
    for name, m in METRICS.items():
        assert m.name == m.function.__name__ == name and len(m.function.__doc__) > 60


# --- the design space: over keys, over samples, chance, sinks


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_reductions_over_keys_against_loops(reduce):
    tm = row_map(region=((5, 6), (6, 9)), weights=[1.0, 0.5])
    rows = rows_of(causal_pattern(tm, heads=5, seed=4), tm.question)
    rows[0, 0, tm.region[1]] = 0.99  # one row at least whose hardest look is inside
    weight = dict(zip(tm.region.tolist(), tm.region_weight.tolist(), strict=True))
    slow = {"sum": [], "mean": [], "max": [], "hit": []}
    for head in rows.tolist():
        of_keys = {key: [row[key] for row in head] for key in weight}
        sums = [sum(weight[key] * of_keys[key][i] for key in weight) for i in range(len(head))]
        slow["sum"].append(sums)
        slow["mean"].append([x / sum(weight.values()) for x in sums])
        slow["max"].append([max(of_keys[key][i] for key in weight) for i in range(len(head))])
        slow["hit"].append([float(row.index(max(row)) in weight) for row in head])
    over = {"mean": np.mean, "max": np.max}[reduce]
    for keys, of_heads in slow.items():
        actual = metric("ram", keys=keys, reduce=reduce)(rows, tm)
        assert actual.tolist() == pytest.approx([over(x) for x in of_heads], abs=1e-6), keys
    assert 0 < sum(map(sum, slow["hit"])) < 20


def test_chance_is_what_an_even_look_and_a_shifted_region_give():
    tm = row_map(grid=4, region=((0, 1),))
    rows = rows_of(causal_pattern(tm), tm.question)
    mass, seen = rows[:, :, tm.region].sum(-1), rows[:, :, tm.visual].sum(-1)
    assert torch.allclose(
        metric("ram_excess")(rows, tm), (mass - seen * 2 / 16).mean(-1), atol=1e-6
    )
    assert torch.allclose(
        metric("ram_excess", reduce="max")(rows, tm), (mass - seen * 2 / 16).amax(-1), atol=1e-6
    )
    # all that do not touch the tokens 0 and 1
    places = [(start, (start + 1) % 16) for start in range(2, 15)]
    slow = torch.stack(
        [rows[:, :, tm.visual[list(place)]].sum(-1).mean(-1) for place in places]
    ).mean(0)
    assert torch.allclose(metric("ram_shifted")(rows, tm), slow, atol=1e-6)
    even = rows_of(causal_pattern(tm, uniform=True), tm.question)
    assert metric("ram_excess")(even, tm).abs().max() < 1e-7
    whole = row_map(region=(tuple(range(16)),))
    assert torch.allclose(metric("ram_shifted")(rows, whole), metric("ram")(rows, whole), atol=1e-6)


def test_reductions_over_samples_against_loops():
    rng = np.random.default_rng(0)
    raw = rng.random((7, 1, 2, 5)).astype(np.float32)
    raw[0, 0, 0, :3] = 0.5  # ties
    of = {
        how: head_scores(metric("ram", samples=how), raw, {})
        for how in ("mean", "median", "rank_mean", "vote")
    }
    np.testing.assert_allclose(of["mean"].values, raw[:, 0].mean(0), atol=1e-6)
    np.testing.assert_allclose(of["median"].values, np.median(raw[:, 0], axis=0), atol=1e-6)
    slow = np.zeros((7, 10))
    for sample, scores in enumerate(raw[:, 0].reshape(7, 10)):
        for i, x in enumerate(scores):
            slow[sample, i] = (
                sum(x > y for y in scores) + 0.5 * (sum(x == y for y in scores) - 1)
            ) / 9
    np.testing.assert_allclose(of["rank_mean"].values, slow.mean(0).reshape(2, 5), atol=1e-6)
    best = np.zeros((7, 10))
    best[np.arange(7), raw[:, 0].reshape(7, 10).argmax(1)] = 1  # 5% of ten heads: one
    np.testing.assert_allclose(of["vote"].values, best.mean(0).reshape(2, 5), atol=1e-6)
    low, high = of["median"].ci()
    assert ((low <= of["median"].values) & (of["median"].values <= high)).all()
    tied = np.ones((1, 1, 2, 20), dtype=np.float32)  # two votes among forty heads that are equal
    assert head_scores(metric("ram", samples="vote"), tied, {}).values == pytest.approx(
        np.full((2, 20), 2 / 40)
    )


def test_sinks_that_are_left_out_are_in_no_set():
    tm = row_map(region=((5, 6, 9),))
    left = without(tm, torch.tensor([6, 15]))
    gone = tm.visual[[6, 15]]
    assert not torch.isin(left.visual, gone).any() and len(left.visual) == 14
    assert left.region.tolist() == tm.visual[[5, 9]].tolist() and len(left.pictures[0].box) == 14
    rows = rows_of(causal_pattern(tm), tm.question)
    seen = rows[:, :, left.visual].sum(-1).mean(-1)
    above, below = metric("lift")(rows, left)
    assert torch.allclose(below, seen * 2 / 14, atol=1e-6)
    assert torch.allclose(above, rows[:, :, left.region].sum(-1).mean(-1), atol=1e-6)


def test_a_metric_of_ones_own_in_the_form_of_ours():
    def contrast(evidence, share, power=1):
        return (evidence - share).abs().pow(power).mean(-1)

    tm = row_map()
    rows = rows_of(causal_pattern(tm), tm.question)
    own = Metric("contrast", contrast, needs=("evidence", "even_mass"), options={"power": 1})
    assert metric(own) is own and own.key == "contrast" and own.of_masses
    assert metric(own, power=2, rows="last").key == "contrast[rows=last,power=2]"
    expected = (
        (rows[:, :, tm.region].sum(-1) - rows[:, :, tm.visual].sum(-1) * 3 / 16).abs().mean(-1)
    )
    assert torch.allclose(own(rows, tm), expected, atol=1e-6)
