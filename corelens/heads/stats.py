"""Statistics of head scores: rankings, how sure they are, how far two agree. Arrays in, numbers
out."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from corelens.errors import CorelensError


def ranking(values: Float[np.ndarray, "layer head"], seed: int = 0) -> Int[np.ndarray, " rank"]:
    """Flat indices (layer · n_heads + head) from the highest value to the lowest; exact ties in a
    seeded random order.

    Heads that do not exist (NaN) are not in it. The order among ties does not depend on how many
    heads are asked for, so a top 3 lies inside the top 5.
    """
    random_order = np.random.default_rng(seed).permutation(values.size)
    order = np.lexsort((random_order, -values.ravel().astype(np.float64)))  # (NaN comes last)
    return order[: np.count_nonzero(~np.isnan(values))]


def baseline(
    values: Float[np.ndarray, "layer head"], kind: str, seed: int
) -> Float[np.ndarray, "layer head"]:
    """The values of a ranking that knows less; see `HeadScores.baseline`."""
    exists, rng = ~np.isnan(values), np.random.default_rng(seed)
    result = values.copy()
    if kind == "random":
        result[exists] = rng.permutation(values[exists])
        return result
    if kind not in ("layer", "depth-matched"):
        raise CorelensError(
            f"the baseline {kind!r}", "layer, depth-matched or random", "visual mass is a metric"
        )
    for layer, row in enumerate(exists):
        own = values[layer, row]
        if own.size:
            result[layer, row] = own.mean() if kind == "layer" else rng.permutation(own)
    return result


def bootstrap(
    numerator: Float[np.ndarray, "sample layer head"],
    denominator: Float[np.ndarray, "sample layer head"] | None,
    level: float,
    n_boot: int,
    seed: int,
    statistic: Callable[..., np.ndarray] | None = None,
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
    """Percentile bootstrap over samples (Efron 1979) of the mean, or of the ratio of means if there
    is a denominator.

    Args:
        statistic: another function of the samples, called as statistic(samples, axis=0): the
            median, for instance.
    Returns:
        (low, high): the bounds of the central interval of probability `level`.
    """
    n = need_samples(len(numerator), 2, "a bootstrap interval")
    check_draws("n_boot", n_boot)
    if not 0 < level < 1:
        raise CorelensError(
            f"level={level}", "a probability between 0 and 1", "for a 95% interval say level=0.95"
        )
    if statistic is not None:
        rng, flat = np.random.default_rng(seed), _flat(numerator)
        means = np.stack([statistic(flat[rng.integers(n, size=n)], axis=0) for _ in range(n_boot)])
        return _central(means, level, numerator.shape[1:])
    # how often each sample is drawn, then one matrix product: no resampled copy of the scores is
    # ever made
    counts = (
        np.random.default_rng(seed)
        .multinomial(n, np.full(n, 1 / n), size=n_boot)
        .astype(np.float64)
    )
    means = ratio(
        counts @ _flat(numerator), None if denominator is None else counts @ _flat(denominator), n
    )
    return _central(means, level, numerator.shape[1:])


def _central(
    bootstraps: Float[np.ndarray, "draw head"], level: float, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.quantile(bootstraps, [(1 - level) / 2, (1 + level) / 2], axis=0).astype(
        np.float32
    )
    return low.reshape(shape), high.reshape(shape)


def split_half(
    numerator: Float[np.ndarray, "sample layer head"],
    denominator: Float[np.ndarray, "sample layer head"] | None,
    n_splits: int,
    seed: int,
) -> float:
    """Spearman correlation of the heads' scores between two random halves of the samples, mean over
    `n_splits` draws.

    Reported as it is: without the Spearman-Brown correction it says how well HALF the samples
    repeat the ranking.
    """
    n = need_samples(len(numerator), 2, "a split in halves")
    check_draws("n_splits", n_splits)
    rng = np.random.default_rng(seed)
    top, bottom = _flat(numerator), None if denominator is None else _flat(denominator)
    correlations = []
    for _ in range(n_splits):
        order = rng.permutation(n)
        halves = order[: n // 2], order[n // 2 :]
        a, b = (
            ratio(top[half].sum(0), None if bottom is None else bottom[half].sum(0), len(half))
            for half in halves
        )
        correlations.append(spearman(a, b))
    return float(np.mean(correlations))


def ratio(
    numerator: Float[np.ndarray, "*any"], denominator: Float[np.ndarray, "*any"] | None, n: int
) -> Float[np.ndarray, "*any"]:
    """Sums over n samples to a mean, or to a ratio of means; 0 where nothing stands below the
    line."""
    if denominator is None:
        return numerator / n
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def spearman(a: Float[np.ndarray, "*any"], b: Float[np.ndarray, "*any"]) -> float:
    """Spearman's rank correlation (mean ranks for ties), −1 to 1; NaN if one side is constant. NaN
    is left out."""
    a, b = a.ravel(), b.ravel()
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    if len(a) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(x: Float[np.ndarray, " any"]) -> Float[np.ndarray, " any"]:
    """1 for the smallest …; equal numbers share the mean of their ranks. (As scipy's, whose import
    takes seconds.)"""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_biased_overlap(
    a: Int[np.ndarray, " rank"], b: Int[np.ndarray, " rank"], p: float
) -> float:
    """Rank-biased overlap, extrapolated (Webber, Moffat and Zobel 2010, equation 32): 1 for equal
    rankings.

    Σ_d p^d · |a[:d] ∩ b[:d]| / d · (1 − p) / p + p^n · |a ∩ b| / n, for d = 1 … n: the first 1 / (1
    − p) ranks carry most of the weight.
    """
    if not 0 < p < 1:
        raise CorelensError(
            f"p={p}", "a number between 0 and 1", "p=0.9 looks mostly at the first ten ranks"
        )
    n = len(a)
    # the items, numbered from 0 without gaps
    a, b = np.searchsorted(np.sort(a), a), np.searchsorted(np.sort(b), b)
    place_a, place_b = np.empty(n, int), np.empty(n, int)
    place_a[a], place_b[b] = np.arange(n), np.arange(n)
    # the depth at which an item has appeared in both lists
    in_both_at = np.maximum(place_a, place_b)
    depth = np.arange(1, n + 1)
    overlap = np.cumsum(np.bincount(in_both_at, minlength=n)) / depth
    weight = p**depth
    return float((overlap * weight).sum() * (1 - p) / p + overlap[-1] * weight[-1])


def gini(values: Float[np.ndarray, "layer head"]) -> float:
    """Gini coefficient over heads: 0 if all score the same, towards 1 if one holds everything;
    negatives count as 0."""
    ordered = np.sort(np.clip(values[~np.isnan(values)], 0, None).astype(np.float64))
    total = ordered.sum()
    if total == 0:
        return 0.0
    n = len(ordered)
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def check_draws(name: str, draws: int) -> None:
    """Raise for fewer than one draw."""
    if not isinstance(draws, int | np.integer) or draws < 1:
        raise CorelensError(f"{name}={draws!r}", "a whole number from 1", "1000 is usual")


def need_samples(have: int, need: int, quantity: str) -> int:
    """`have`, or an error if these are fewer samples than `quantity` needs."""
    if have < need:
        raise CorelensError(
            f"scores of {have} sample{'s' if have != 1 else ''}",
            f"{need} samples or more for {quantity}",
            "score more samples, or read `.values` alone",
        )
    return have


def _flat(x: Float[np.ndarray, "sample layer head"]) -> Float[np.ndarray, "sample layer*head"]:
    return x.reshape(len(x), -1).astype(np.float64)
