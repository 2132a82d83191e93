"""How sure a number is: exact intervals of proportions, differences of paired ones, the bootstrap
for the rest.

- A proportion (accuracy): Clopper–Pearson, which holds its level at any n and says something of 0
  of 36 (0 to 9.7%) where a bootstrap says [0, 0].
- The difference of two proportions over the same samples: Newcombe's hybrid score interval.
- The mean of other numbers: percentile bootstrap over samples, which needs two samples or more.

Sources: Clopper and Pearson 1934, Biometrika 26; Newcombe 1998, Statistics in Medicine 17,
2635–2650 (method 10),
https://doi.org/10.1002/(SICI)1097-0258(19981130)17:22<2635::AID-SIM954>3.0.CO;2-C.
"""

from collections.abc import Mapping
from math import isnan, sqrt
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from corelens.errors import CorelensError


class CI(NamedTuple):
    """The ends of a confidence interval."""

    low: float
    high: float


class Interval(NamedTuple):
    """A number with the ends of its confidence interval; they are NaN where one sample is all there
    is."""

    value: float
    low: float
    high: float

    @property
    def ci(self) -> CI:
        """Its ends alone."""
        return CI(self.low, self.high)

    def __str__(self) -> str:
        if isnan(self.low):
            return f"{self.value:.3f} [one sample: no interval]"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Difference(NamedTuple):
    """A paired difference and its 95% confidence interval: `difference, (low, high) = cl.paired(a,
    b)`."""

    difference: float
    ci: CI

    def __str__(self) -> str:
        return f"{self.difference:+.3f} [{self.ci.low:+.3f}, {self.ci.high:+.3f}]"


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The exact interval of a proportion of `successes` in `n`: 1 of 1 is [0.025, 1]."""
    from scipy.special import betaincinv  # (a second's import)

    _check(n, 1, "a proportion")
    tail = (1 - level) / 2
    low = betaincinv(successes, n - successes + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, n - successes, 1 - tail) if successes < n else 1.0
    return Interval(successes / n, float(low), float(high))


def newcombe(
    a: Float[np.ndarray, " sample"], b: Float[np.ndarray, " sample"], level: float = 0.95
) -> Interval:
    """The difference of two proportions over the same samples, a minus b, with Newcombe's interval.

    Args:
        a, b: 0 or 1 for each sample.
        level: of the interval.
    """
    _check(len(a), 1, "a difference of proportions")
    n = len(a)
    p, q = float(a.mean()), float(b.mean())
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    only_a, only_b = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    covered = both * neither - only_a * only_b
    covered = max(covered - n / 2, 0.0) if covered > 0 else covered  # corrected for continuity
    phi = covered / sqrt(margins) if margins > 0 else 0.0
    (low_p, high_p), (low_q, high_q) = _wilson(p, n, level), _wilson(q, n, level)
    down = _joint(p - low_p, high_q - q, phi)
    up = _joint(high_p - p, q - low_q, phi)
    return Interval(p - q, p - q - down, p - q + up)


def _joint(x: float, y: float, phi: float) -> float:
    return sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))


def _wilson(p: float, n: int, level: float) -> CI:
    """Wilson's score interval of a proportion."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    centre, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return CI((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))


def bootstrap_mean(
    x: Float[np.ndarray, " sample"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of per-sample numbers with its percentile-bootstrap interval over samples.

    Raises:
        CorelensError: one sample or none, of which every resample is the same.
    """
    _check(len(x), 2, "a bootstrap interval")
    rng = np.random.default_rng(seed)
    # resamples; all of them at once would not fit for many samples
    at_once = max(1, (1 << 16) // len(x))
    rows = [min(at_once, draws - start) for start in range(0, draws, at_once)]
    means = np.concatenate(
        [x[rng.integers(len(x), size=(rows_at_once, len(x)))].mean(axis=1) for rows_at_once in rows]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(x.mean()), float(low), float(high))


def mean_interval(x: Float[np.ndarray, " sample"], level: float = 0.95) -> Interval:
    """The mean of per-sample numbers, bootstrapped; of one sample it has no interval (NaN)."""
    return bootstrap_mean(x, level) if len(x) > 1 else _alone(x)


def accuracy_interval(x: Float[np.ndarray, " sample"], level: float = 0.95) -> Interval:
    """The share of samples answered right: Clopper–Pearson; bootstrapped if x holds means over
    several runs."""
    return clopper_pearson(int(x.sum()), len(x), level) if is_binary(x) else mean_interval(x, level)


def accuracy_difference(
    a: Float[np.ndarray, " sample"], b: Float[np.ndarray, " sample"], level: float = 0.95
) -> Interval:
    """Accuracy a minus b over the same samples: Newcombe; bootstrapped if they hold means over
    several runs."""
    return newcombe(a, b, level) if is_binary(a) and is_binary(b) else mean_interval(a - b, level)


def percent_interval(interval: Mapping[str, float]) -> str:
    """An interval in percent: {"value": 0.88, "low": 0.86, "high": 0.9} → "88 [86, 90]"."""
    # (+ 0.0 makes 0 of −0)
    value, low, high = (round(100 * interval[name]) + 0.0 for name in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def _alone(x: Float[np.ndarray, " sample"]) -> Interval:
    _check(len(x), 1, "a mean")
    return Interval(float(x.mean()), float("nan"), float("nan"))


def is_binary(x: Float[np.ndarray, " sample"]) -> bool:
    """Whether all numbers are 0 or 1, as right and wrong answers are."""
    return bool(len(x)) and bool(np.isin(x, (0.0, 1.0)).all())


def _check(n: int, least: int, quantity: str) -> None:
    if n < least:
        raise CorelensError(
            f"{n} sample{'' if n == 1 else 's'}",
            f"{least} or more for {quantity}",
            "give more samples, or read the mean alone",
        )
