"""Heads, sets of heads and their scores: each number against a slow, obvious way of getting it."""

import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from corelens.errors import CorelensError
from corelens.heads.scores import Head, HeadScores, HeadSet


def scores_of(n=24, layers=4, heads=6, seed=0, **meta):
    rng = np.random.default_rng(seed)
    strength = rng.gamma(0.6, 0.2, size=(layers, heads))
    return HeadScores(
        per_sample=np.abs(strength + 0.05 * rng.normal(size=(n, layers, heads))), meta=meta
    )


# --- sets


def test_head_set_keeps_order_and_drops_repeats():
    heads = HeadSet(["L3H5", (1, 2), Head(3, 5), [0, 0]])
    assert list(heads) == [Head(3, 5), Head(1, 2), Head(0, 0)] and all(
        isinstance(head, Head) for head in heads
    )
    assert [str(head) for head in heads] == ["L3H5", "L1H2", "L0H0"] and repr(
        heads
    ) == "HeadSet([L3H5, L1H2, L0H0])"
    assert heads.by_layer() == {0: [0], 1: [2], 3: [5]} and list(heads.by_layer()) == [0, 1, 3]
    assert (
        (3, 5) in heads
        and "L1H2" in heads
        and (5, 3) not in heads
        and "nonsense" not in heads
        and 7 not in heads
    )
    assert heads[0] == Head(3, 5) and heads[1:] == HeadSet([(1, 2), (0, 0)])
    assert HeadSet("L1H2") == HeadSet(Head(1, 2)) == HeadSet([(1, 2)])
    assert HeadSet(np.argwhere(np.eye(3))) == HeadSet([(0, 0), (1, 1), (2, 2)])


def test_head_set_algebra_is_ordered_and_hashable():
    a, b = HeadSet([(2, 0), (1, 0), (0, 0)]), HeadSet([(0, 0), (5, 5), (2, 0)])
    assert list(a | b) == [(2, 0), (1, 0), (0, 0), (5, 5)]
    assert list(a & b) == [(2, 0), (0, 0)] and list(a - b) == [(1, 0)] and list(b - a) == [(5, 5)]
    assert isinstance(a & [(2, 0)], HeadSet) and isinstance({Head(9, 9)} | a, HeadSet)
    assert (
        a == HeadSet(reversed(list(a))) and hash(a) == hash(HeadSet(reversed(list(a)))) and a != b
    )
    assert a & b <= a and a.isdisjoint([(7, 7)]) and len({a, HeadSet(list(a)[::-1])}) == 1
    assert HeadSet(json.loads(json.dumps(a.to_json()))) == a and pickle.loads(pickle.dumps(a)) == a


@pytest.mark.parametrize(
    "given", [[(1, -1)], ["L1"], [(1, 2, 3)], [3], [(1.5, 2)], ["H5L3"], [None]]
)
def test_what_is_no_head_is_refused(given):
    with pytest.raises(CorelensError, match="as a head"):
        HeadSet(given)


def test_a_head_of_another_model_is_refused():
    assert HeadSet([(5, 7)]).check(6, 8) == HeadSet([(5, 7)])
    with pytest.raises(CorelensError, match=r"L5H8.*heads of another model"):
        HeadSet([(5, 7), (5, 8)]).check(6, 8)
    with pytest.raises(CorelensError, match="heads of another model"):
        HeadSet([(6, 0)]).mask(6, 8)
    assert np.argwhere(HeadSet([(2, 1)]).mask(3, 4)).tolist() == [[2, 1]]


# --- choosing


def test_top_and_bottom_are_the_sorted_values():
    s = scores_of()
    order = np.argsort(-s.values.ravel())
    assert [head.layer * 6 + head.head for head in s.top(k=5)] == order[:5].tolist()
    assert [head.layer * 6 + head.head for head in s.bottom(k=5)] == order[::-1][:5].tolist()
    assert s.values.dtype == np.float32 and np.allclose(s.values, s.per_sample.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "k"), [(0.001, 1), (0.05, 1), (0.0625, 2), (0.5, 12), (1.0, 24)]
)
def test_top_takes_the_rounded_share_and_never_none(fraction, k):
    assert len(scores_of().top(fraction)) == k


def test_exact_ties_are_drawn_not_ordered():
    s = HeadScores(np.zeros((4, 6)))
    draws = {tuple(s.top(k=3, seed=seed)) for seed in range(20)}
    assert len(draws) > 10 and s.top(k=3, seed=4) == s.top(k=3, seed=4)
    assert list(s.top(k=3, seed=1)) == list(s.top(k=5, seed=1))[:3]  # nested
    assert s.top(k=12).isdisjoint(s.bottom(k=12))
    above = HeadScores(np.where(np.arange(24).reshape(4, 6) == 17, 1.0, 0.0))
    assert all(above.top(k=3, seed=seed)[0] == Head(2, 5) for seed in range(10))


@pytest.mark.parametrize(
    "call",
    [{}, {"fraction": 0.1, "k": 2}, {"k": 25}, {"k": -1}, {"fraction": 0.0}, {"fraction": 5.0}],
)
def test_a_count_that_makes_no_sense_is_refused(call):
    with pytest.raises(CorelensError):
        scores_of().top(**call)


def test_random_controls_lie_outside_the_top():
    s = scores_of()
    for seed in range(20):
        drawn = s.random(k=6, seed=seed)
        assert (
            len(drawn) == 6 and drawn.isdisjoint(s.top(k=6)) and drawn == s.random(k=6, seed=seed)
        )
    assert len({s.random(k=6, seed=seed) for seed in range(20)}) > 15
    outside = {head for seed in range(60) for head in s.random(k=6, seed=seed)}
    assert len(outside) == 18  # every head outside the top is drawn sooner or later
    heads = HeadSet([(0, 0), (3, 3)])
    assert s.random(exclude=heads).isdisjoint(heads) and len(s.random(exclude=heads)) == 2
    with pytest.raises(CorelensError, match="k=13 random heads outside"):
        s.random(k=13)


def test_layer_matched_controls_take_as_many_a_layer():
    s = scores_of()
    for k, seed in [(1, 0), (5, 1), (6, 2)]:
        top, drawn = s.top(k=k), s.random(k=k, seed=seed, match="layer")
        assert {la: len(h) for la, h in top.by_layer().items()} == {
            la: len(h) for la, h in drawn.by_layer().items()
        }
        assert drawn.isdisjoint(top)
    claim = HeadSet([(1, 0), (1, 1), (2, 2)])
    drawn = s.random(exclude=claim, match="layer", seed=3)
    assert (
        sorted(drawn.by_layer()) == [1, 2]
        and len(drawn.by_layer()[1]) == 2
        and drawn.isdisjoint(claim)
    )
    with pytest.raises(CorelensError, match='match="layer"'):
        s.random(k=2, match="depth")
    with pytest.raises(CorelensError, match="matched by layer"):
        s.random(k=2, exclude=claim, match="layer")


def test_a_full_layer_is_matched_from_its_neighbours_with_a_warning():
    s = HeadScores(np.array([[0.0] * 4, [0.1] * 4, [9.0, 9.0, 9.0, 0.5], [0.2] * 4]))
    with pytest.warns(UserWarning, match="2 of 3 heads come from the nearest layers"):
        drawn = s.random(k=3, match="layer", seed=0)
    assert len(drawn) == 3 and drawn.isdisjoint(s.top(k=3))
    assert (2, 3) in drawn and set(drawn.by_layer()) <= {1, 2, 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.random(k=1, match="layer")


# --- how sure


def test_ci_agrees_with_a_resampling_loop_and_covers_the_mean():
    s = scores_of(n=40)
    low, high = s.ci(0.9, n_boot=2000, seed=5)
    rng = np.random.default_rng(1)
    means = np.stack([s.per_sample[rng.integers(0, 40, 40)].mean(0) for _ in range(2000)])
    width = np.quantile(means, 0.95, axis=0) - np.quantile(means, 0.05, axis=0)
    assert np.allclose(high - low, width, rtol=0.12)
    assert (low <= s.values).all() and (s.values <= high).all()
    wider = s.ci(0.99, n_boot=2000, seed=5)
    assert (
        (wider[0] <= low).all()
        and (wider[1] >= high).all()
        and np.array_equal(s.ci(seed=5)[0], s.ci(seed=5)[0])
    )


def test_ci_covers_the_true_mean_as_often_as_it_says():
    hits = []
    for seed in range(40):
        x = np.random.default_rng(seed).normal(1.0, 0.5, size=(30, 2, 5))
        low, high = HeadScores(per_sample=x).ci(0.9, n_boot=300, seed=seed)
        hits.append((low <= 1) & (high >= 1))
    assert 0.82 < np.mean(hits) < 0.95


def test_what_needs_samples_says_so():
    with pytest.raises(CorelensError, match="of 1 sample"):
        HeadScores(per_sample=np.ones((1, 2, 2))).ci()
    with pytest.raises(CorelensError, match="without per-sample values"):
        HeadScores(np.ones((2, 2))).split_half()


def test_split_half_is_high_for_signal_and_zero_for_noise():
    assert scores_of(n=60).split_half() > 0.9
    noise = HeadScores(per_sample=np.random.default_rng(0).normal(size=(60, 10, 20)))
    assert abs(noise.split_half()) < 0.2
    assert noise.split_half(seed=1) == noise.split_half(seed=1) != noise.split_half(seed=2)


def test_ratio_scores_are_ratios_of_means_and_count_what_they_leave_out():
    rng = np.random.default_rng(0)
    below = rng.uniform(0.05, 1, size=(30, 3, 4))
    above = below * rng.uniform(0.2, 0.4, size=(30, 3, 4))
    below[:7, 1, 2] = above[:7, 1, 2] = 0
    below[:, 2, 2] = above[:, 2, 2] = 0
    s = HeadScores(parts=(above, below))
    keep = below[:, 1, 2] > 0
    assert np.isclose(s.values[1, 2], above[keep, 1, 2].sum() / below[keep, 1, 2].sum())
    # not a mean of ratios
    assert not np.isclose(s.values[0, 0], np.mean(above[:, 0, 0] / below[:, 0, 0]), atol=1e-4)
    assert (
        s.left_out[1, 2] == 7
        and s.left_out[2, 2] == 30
        and s.left_out.sum() == 37
        and s.values[2, 2] == 0
    )
    assert np.isnan(s.per_sample[0, 1, 2]) and np.isclose(
        s.per_sample[20, 0, 1], above[20, 0, 1] / below[20, 0, 1]
    )
    low, high = s.ci()
    assert (low <= s.values).all() and (s.values <= high).all() and (high - low)[:2].min() > 0
    ratios = [above[i, 0, 0].sum() / below[i, 0, 0].sum() for i in rng.integers(0, 30, (2000, 30))]
    assert np.isclose(
        (high - low)[0, 0], np.quantile(ratios, 0.975) - np.quantile(ratios, 0.025), rtol=0.15
    )
    assert -1 <= s.split_half() <= 1


# --- comparing


def test_agreement_with_itself_and_with_its_opposite():
    s = scores_of()
    same = s.agreement(s, 0.25)
    assert (
        same.spearman == pytest.approx(1)
        and same.jaccard == 1
        and same.rbo == pytest.approx(1)
        and same.k == 6
    )
    worst = s.agreement(HeadScores(-s.values), k=6)
    assert worst.spearman == pytest.approx(-1) and worst.jaccard == 0 and worst.rbo < 0.2
    moved = s.values.copy()
    first, last = s.top(k=4)[0], s.bottom(k=1)[0]
    moved[first], moved[last] = moved[last], moved[first]
    assert s.agreement(HeadScores(moved), k=4).jaccard == 3 / 5
    with pytest.raises(CorelensError, match=r"\(4, 6\) and of \(3, 2\)"):
        s.agreement(HeadScores(np.zeros((3, 2))))


def test_rank_biased_overlap_against_its_definition():
    a, b, p = scores_of(seed=1), scores_of(seed=2), 0.8
    ra, rb = list(a.top(1.0)), list(b.top(1.0))
    overlap = [len(set(ra[:d]) & set(rb[:d])) / d for d in range(1, 25)]
    slow = (1 - p) / p * sum(x * p**d for d, x in enumerate(overlap, 1)) + overlap[-1] * p**24
    assert a.agreement(b, p=p).rbo == pytest.approx(slow)


def test_concentration():
    equal, peaked = HeadScores(np.full((3, 4), 0.3)), HeadScores(np.eye(1, 12).reshape(3, 4))
    assert equal.gini() == pytest.approx(0, abs=1e-6) and peaked.gini() == pytest.approx(11 / 12)
    assert equal.mass_of_top(0.25) == pytest.approx(0.25) and peaked.mass_of_top(0.05) == 1
    assert HeadScores(np.zeros((2, 2))).mass_of_top() == 0 == HeadScores(np.zeros((2, 2))).gini()
    x = np.abs(np.random.default_rng(0).normal(size=12))
    slow = np.abs(x[:, None] - x[None]).sum() / (2 * 12**2 * x.mean())
    assert HeadScores(x.reshape(3, 4)).gini() == pytest.approx(slow, rel=1e-5)
    assert np.allclose(scores_of().by_layer(), scores_of().values.mean(1))


def test_subtraction_pairs_samples_only_when_they_are_the_same():
    a, b = scores_of(seed=1, samples=["x"], key="ram"), scores_of(seed=2, samples=["x"], key="gaze")
    d = a - b
    assert np.allclose(d.values, a.values - b.values) and np.allclose(
        d.per_sample, a.per_sample - b.per_sample
    )
    assert d.label == "ram − gaze" and (a - scores_of(seed=2, samples=["y"])).per_sample is None
    assert (scores_of(seed=1) - scores_of(seed=2)).per_sample is None


def test_mean_over_data_sets_weighs_them_equally():
    small, large = (
        scores_of(n=2, seed=1, metric="ram", data="a"),
        scores_of(n=50, seed=2, metric="ram", data="b"),
    )
    both = HeadScores.mean([small, large])
    assert (
        np.allclose(both.values, (small.values + large.values) / 2) and both.meta["metric"] == "ram"
    )
    assert "data" not in both.meta and [m["data"] for m in both.meta["mean_of"]] == ["a", "b"]
    with pytest.raises(CorelensError):
        HeadScores.mean([])


def test_normalised_sums_to_one():
    s = scores_of()
    n = s.normalised()
    assert n.values.sum() == pytest.approx(1, rel=1e-5) and np.allclose(
        n.per_sample.mean(0), n.values, atol=1e-6
    )
    with pytest.raises(CorelensError):
        HeadScores(np.zeros((2, 2))).normalised()


# --- files


def test_a_file_gives_back_what_was_saved_and_always_the_same_bytes(tmp_path):
    s = scores_of(
        metric="ram",
        rows="question",
        samples=["a", "b"],
        number=np.int64(3),
        chosen=HeadSet([(1, 2)]),
    )
    s.save(tmp_path / "a.scores")
    s.save(tmp_path / "b.scores")
    assert (tmp_path / "a.scores").read_bytes() == (tmp_path / "b.scores").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.scores", "b.scores"]
    back = HeadScores.load(tmp_path / "a.scores")
    assert np.array_equal(back.values, s.values) and np.array_equal(back.per_sample, s.per_sample)
    assert (
        back.meta["samples"] == ["a", "b"]
        and back.meta["number"] == 3
        and back.meta["chosen"] == [[1, 2]]
    )
    assert set(load_file(tmp_path / "a.scores")) == {"values", "per_sample"}


def test_a_ratio_goes_through_a_file(tmp_path):
    s = HeadScores(
        parts=(np.ones((5, 2, 3)), np.full((5, 2, 3), 4.0)), meta={"metric": "precision"}
    )
    s.save(tmp_path / "p")
    back = HeadScores.load(tmp_path / "p")
    assert np.allclose(back.values, 0.25) and np.array_equal(back.parts[1], s.parts[1])
    assert np.array_equal(back.ci()[0], s.ci()[0])


def test_files_that_are_wrong_are_refused(tmp_path):
    path = tmp_path / "s"
    scores_of().save(path)
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 10):
        path.write_bytes(whole[:size])
        with pytest.raises(CorelensError, match="truncated"):
            HeadScores.load(path)
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    with pytest.raises(CorelensError, match="version 9"):
        HeadScores.load(path)
    save_file({"values": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(CorelensError, match="holds no head scores"):
        HeadScores.load(path)
    with pytest.raises(CorelensError, match="does not exist"):
        HeadScores.load(tmp_path / "nothing")


def test_duo_attention_file(tmp_path):
    # as np.savetxt(…, delimiter="\t") writes it in mit-han-lab/duo-attention: %.18e, one line a
    # layer, KV heads
    folder = tmp_path / "lr=0.02-reg=0.05-ctx=1000_32000-multi_passkey10"
    folder.mkdir()
    gates = np.array(
        [
            [-9.584426879882812500e-05, 5.585937500000000000e-01],
            [1.000000000000000000e00, 2.06e-03],
            [0.5, 1.01],
        ]
    )
    np.savetxt(folder / "full_attention_heads.tsv", gates, delimiter="\t")
    s = HeadScores.from_duo_attention(folder)
    assert s.values.shape == (3, 2) and s.meta["heads"] == "kv"
    assert np.allclose(s.values, [[0, 0.55859375], [1, 2.06e-3], [0.5, 1]])
    wide = HeadScores.from_duo_attention(folder / "full_attention_heads.tsv", n_heads=6)
    assert wide.values.shape == (3, 6) and wide.values[0].tolist() == [0, 0, 0] + [0.55859375] * 3
    with pytest.raises(CorelensError, match="2 KV heads"):
        HeadScores.from_duo_attention(folder, n_heads=5)
    (folder / "full_attention_heads.tsv").write_text("1.0\t0.5\n0.5\n")
    with pytest.raises(CorelensError, match="different lengths"):
        HeadScores.from_duo_attention(folder)
    (folder / "full_attention_heads.tsv").write_text("1.0\t0.5\n0.5 0.3\n")
    with pytest.raises(CorelensError, match="line 2"):
        HeadScores.from_duo_attention(folder)


@pytest.mark.parametrize("importer", [HeadScores.from_retrieval_head, HeadScores.from_sparsemm])
def test_layer_head_json(tmp_path, importer):
    path = tmp_path / "llama-2-7b-80k.json"
    read_back = {
        "0-0": [0, 0, 0.10344827586206896],
        "0-1": [0.05, 0, 0],
        "1-0": [0, 0, 0],
        "1-1": [1, 0.5, 0.25],
    }
    path.write_text(json.dumps(dict(reversed(read_back.items()))))  # any order
    s = importer(path)
    assert (
        s.values.shape == (2, 2)
        and s.per_sample.shape == (3, 2, 2)
        and s.top(k=1) == HeadSet([(1, 1)])
    )
    assert s.values[0, 0] == pytest.approx(0.10344827586206896 / 3) and s.per_sample[1, 1, 1] == 0.5
    # some published runs are of unequal length
    path.write_text(json.dumps({**read_back, "0-1": [0.05, 0]}))
    assert importer(path).per_sample is None and importer(path).values[0, 1] == pytest.approx(0.025)
    for wrong, what in [
        ("{", "JSON"), ("[]", "object"), ('{"0-0-key": [1]}', "key"), ('{"0-0": []}', "list of one"),
        ('{"0-1": [1]}', "all of 1 layers × 2 heads"), ('{"0-0": ["x"]}', "numbers"), ('{"0-0": [NaN]}', "finite"),
    ]:  # fmt: skip
        path.write_text(wrong)
        with pytest.raises(CorelensError, match=what):
            importer(path)


def test_scores_that_are_not_finite_or_do_not_fit_are_refused():
    bad = np.ones((3, 2, 2))
    bad[1, 0, 1] = np.nan
    with pytest.raises(CorelensError, match=r"per_sample\[1, 0, 1\] is nan"):
        HeadScores(per_sample=bad)
    with pytest.raises(CorelensError, match=r"values of shape \(4,\)"):
        HeadScores(np.ones(4))
    with pytest.raises(CorelensError, match=r"values \(2, 3\)"):
        HeadScores(np.ones((2, 3)), np.ones((5, 2, 2)))
    with pytest.raises(CorelensError, match="neither values"):
        HeadScores()
    with pytest.raises(CorelensError, match="a numerator"):
        HeadScores(parts=(np.ones((3, 2, 2)), np.ones((2, 2, 2))))


def test_repr_names_the_best():
    assert repr(HeadScores(np.eye(2, 3), meta={"metric": "ram"})).startswith(
        "HeadScores(ram: 2 layers × 3 heads; top L"
    )


# --- heads that do not exist, counts, baselines, MIB


def holey():
    """Five heads in the first layer, three in the second: two that do not exist."""
    per_sample = np.random.default_rng(3).random((6, 2, 5)).astype(np.float32)
    per_sample[:, 1, 3:] = np.nan
    return HeadScores(per_sample=per_sample, meta={"key": "ram"})


def test_heads_that_do_not_exist_are_never_drawn():
    s = holey()
    missing = {(1, 3), (1, 4)}
    assert len(s.top(1.0)) == 8 == len(s.bottom(1.0)) and not missing & set(s.top(1.0))
    assert list(s.bottom(1.0)) == list(s.top(1.0))[::-1]
    drawn = {head for seed in range(50) for head in s.random(k=2, seed=seed)}
    assert not missing & drawn and drawn == set(s.top(1.0)) - set(s.top(2))
    for seed in range(10):
        assert not missing & set(
            s.random(k=2, seed=seed, exclude=HeadSet([(1, 0), (1, 1)]), match="layer")
        )
    with pytest.raises(CorelensError, match="0 to 8"):
        s.top(k=9)
    with pytest.raises(CorelensError, match="at most 3"):
        s.random(k=5)


def test_statistics_leave_out_heads_that_do_not_exist(tmp_path):
    s = holey()
    existing = s.values[s.exists]
    assert s.gini() == pytest.approx(HeadScores(existing[None]).gini())
    assert s.mass_of_top(0.25) == pytest.approx(HeadScores(existing[None]).mass_of_top(0.25))
    assert s.by_layer() == pytest.approx([s.values[0].mean(), s.values[1, :3].mean()])
    assert s.agreement(s).spearman == pytest.approx(1) and s.agreement(s).rbo == pytest.approx(1)
    low, high = s.ci()
    assert (
        np.isnan(low[1, 3:]).all()
        and (low[s.exists] <= existing).all()
        and (existing <= high[s.exists]).all()
    )
    assert -1 <= s.split_half() <= 1 and s.normalised().values[s.exists].sum() == pytest.approx(1)
    s.save(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(HeadScores.load(tmp_path / "s.safetensors").values, s.values)
    assert "2 layers × 5 heads" in repr(s)


def test_nan_in_some_samples_only_is_an_error():
    per_sample = np.ones((3, 2, 2), dtype=np.float32)
    per_sample[1, 0, 1] = np.nan
    with pytest.raises(CorelensError, match=r"per_sample\[1, 0, 1\] is nan"):
        HeadScores(per_sample=per_sample)
    with pytest.raises(CorelensError, match=r"values\[0, 1\] is inf"):
        HeadScores(np.array([[1, np.inf]]))
    with pytest.raises(CorelensError, match="all NaN"):
        HeadScores(np.full((2, 2), np.nan))


def test_a_whole_number_is_a_count_and_a_fraction_a_share():
    s = HeadScores(np.arange(200.0).reshape(10, 20))
    assert (
        len(s.top(1)) == 1
        and len(s.top(1.0)) == 200
        and len(s.top(0.05)) == 10 == len(s.bottom(10))
    )
    assert s.top(3) == s.top(k=3) and len(s.random(7, seed=1)) == 7
    with pytest.raises(CorelensError, match="one of the two"):
        s.top(3, k=3)
    with pytest.raises(CorelensError, match="0 to 200"):
        s.top(201)


def test_baselines_know_less():
    s = HeadScores(np.random.default_rng(0).random((6, 8)), meta={"key": "ram", "rows": "last"})
    by_layer, matched, drawn = (
        s.baseline(kind, seed=1) for kind in ("layer", "depth-matched", "random")
    )
    np.testing.assert_allclose(
        by_layer.values, np.repeat(s.values.mean(1, keepdims=True), 8, axis=1), rtol=1e-6
    )
    np.testing.assert_array_equal(np.sort(matched.values, axis=1), np.sort(s.values, axis=1))
    count = lambda heads: {layer: len(of) for layer, of in heads.by_layer().items()}  # noqa: E731
    assert count(matched.top(10)) == count(s.top(10)) and matched.top(10) != s.top(10)
    np.testing.assert_array_equal(np.sort(drawn.values, axis=None), np.sort(s.values, axis=None))
    assert (
        drawn.label == "random baseline of ram"
        and (drawn.values != s.baseline("random", seed=2).values).any()
    )
    assert np.isnan(holey().baseline("random").values[1, 3:]).all()
    with pytest.raises(CorelensError, match="layer, depth-matched or random"):
        s.baseline("none")


def test_mib_s_node_scores(tmp_path):
    s = holey()
    s.to_mib(tmp_path / "importances.json", d_model=64, top=2)
    # no NaN in JSON
    written = json.loads((tmp_path / "importances.json").read_text(), parse_constant=pytest.fail)
    assert written["cfg"] == {
        "n_layers": 2,
        "n_heads": 5,
        "parallel_attn_mlp": False,
        "d_model": 64,
    }
    assert list(written["nodes"])[:2] == ["input", "a0.h0"] and list(written["nodes"])[-2:] == [
        "m1",
        "logits",
    ]
    assert written["nodes"]["a0.h2"]["score"] == pytest.approx(float(s.values[0, 2]))
    assert {
        name for name, node in written["nodes"].items() if node["in_graph"] and name[0] == "a"
    } == {f"a{layer}.h{head}" for layer, head in s.top(2)}
    assert "score" not in written["nodes"]["a1.h4"] and "score" not in written["nodes"]["m0"]
    np.testing.assert_array_equal(
        HeadScores.from_mib(tmp_path / "importances.json").values, s.values
    )
    for text, message in {
        "[": "no JSON", "{}": "cfg and nodes", '{"cfg": {"n_layers": 1, "n_heads": 1}, "nodes": {}, "edges": {}}': "no node",
        '{"cfg": {"n_layers": 1, "n_heads": 1}, "nodes": {"a0.h7": {"score": 1}}}': "IndexError",
        '{"cfg": {"n_layers": 1, "n_heads": 1}, "nodes": {"a0.h0": true}}': "AttributeError",
    }.items():  # fmt: skip
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(CorelensError, match=message):
            HeadScores.from_mib(tmp_path / "wrong.json")
    with pytest.raises(CorelensError, match="does not exist"):
        HeadScores.from_mib(tmp_path / "none.json")


# (in a process of its own: there the shapes and types of signatures are not checked, as for a user)
WRONG_VALUES = """
import numpy as np
from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores, HeadSet
scores = HeadScores(per_sample=np.random.default_rng(0).random((3, 4, 4)))
for use in (
    lambda: scores.top("0.05"), lambda: scores.top(k=1.5), lambda: scores.top(k=True),
    lambda: scores.top(float("nan")), lambda: HeadSet(3), lambda: HeadSet(None),
    lambda: scores.ci(n_boot=0), lambda: scores.split_half(n_splits=0), lambda: HeadScores("abc"),
    lambda: HeadScores([[1, 2], [3]]), lambda: HeadScores(np.ones((2, 2), complex)),
    lambda: scores - 3, lambda: HeadScores.mean([scores, 1]),
):
    try:
        print("taken", use())
    except CorelensError as error:
        print(error.given)
"""


def test_wrong_values_are_one_kind_of_error():
    done = subprocess.run([sys.executable, "-c", WRONG_VALUES], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines() == [
        "fraction='0.05'", "k=1.5", "k=True", "fraction=nan", "3 as heads", "None as heads",
        "n_boot=0", "n_splits=0", done.stdout.splitlines()[8], done.stdout.splitlines()[9],
        "values, which is no array of numbers (complex numbers)", "a int in place of scores",
        "a int in place of scores",
    ]  # fmt: skip
    assert all("no array of numbers" in line for line in done.stdout.splitlines()[8:11])


def test_meta_is_written_or_refused(tmp_path):
    def threshold(x):
        return x

    HeadScores(np.ones((2, 2)), meta={"body": threshold}).save(tmp_path / "a")
    assert HeadScores.load(tmp_path / "a").meta["body"].endswith("threshold")
    with pytest.raises(CorelensError, match="meta that holds a object"):
        HeadScores(np.ones((2, 2)), meta={"body": object()}).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
