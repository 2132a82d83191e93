"""Random heads as a control for a claim about some others."""

import warnings

import numpy as np
from jaxtyping import Bool

from corelens.errors import CorelensError
from corelens.heads.head_set import Head, HeadSet


def random_heads(
    exists: Bool[np.ndarray, "layer head"], claim: HeadSet, k: int, seed: int, match: str | None
) -> HeadSet:
    """k random heads that exist and are not in `claim`; see `HeadScores.random`."""
    free = exists & ~claim.mask(*exists.shape)
    rng = np.random.default_rng(seed)
    left = {layer: rng.permutation(np.flatnonzero(row)).tolist() for layer, row in enumerate(free)}
    if free.sum() < k:
        raise CorelensError(
            f"k={k} random heads outside {len(claim)} of {exists.sum()}",
            f"at most {free.sum()}",
            "ask for fewer heads: half of a model has no control in the other half",
        )
    if match is None:
        pool = [Head(layer, head) for layer, heads in left.items() for head in heads]
        return HeadSet([pool[i] for i in rng.permutation(len(pool))[:k]])
    if match != "layer":
        raise CorelensError(
            f"match={match!r}", 'match="layer" or None', "leave it out for a plain random draw"
        )
    if len(claim) != k:
        raise CorelensError(
            f"k={k} heads matched by layer to {len(claim)}",
            "as many as are matched",
            "leave k out, or exclude",
        )
    return _matched(left, {layer: len(heads) for layer, heads in claim.by_layer().items()})


def _matched(left: dict[int, list[int]], counts: dict[int, int]) -> HeadSet:
    """As many heads of each layer's (shuffled) list as `counts` says; what is missing comes from
    the nearest layers."""
    drawn = [
        Head(layer, left[layer].pop())
        for layer, n in counts.items()
        for _ in range(min(n, len(left[layer])))
    ]
    have = {layer: sum(head.layer == layer for head in drawn) for layer in counts}
    short = {layer: n - have[layer] for layer, n in counts.items() if n > have[layer]}
    if short:
        warnings.warn(
            f"layers {', '.join(map(str, short))} have too few heads left to match; "
            f"{sum(short.values())} of {sum(counts.values())} heads come from the nearest layers",
            stacklevel=3,
        )
    for layer, n in short.items():
        for _ in range(n):
            nearest = min(
                (other for other, heads in left.items() if heads),
                key=lambda other: abs(other - layer),
            )
            drawn.append(Head(nearest, left[nearest].pop()))
    return HeadSet(drawn)


def how_many(n: int, fraction: float | int | None, k: int | None) -> int:
    """How many of n heads a share or a number means: a share is max(1, round(fraction · n)) heads,
    a whole number is itself.

    Raises:
        CorelensError: neither or both; no share from above 0 to 1, no number from 0 to n.
    """
    if k is None and isinstance(fraction, int | np.integer) and not isinstance(fraction, bool):
        k, fraction = int(fraction), None
    if (fraction is None) == (k is None):
        raise CorelensError(
            f"fraction={fraction}, k={k}",
            "one of the two",
            "say top(0.05) for a share of all heads or top(k=10)",
        )
    if k is not None:
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 0 <= k <= n:
            raise CorelensError(
                f"k={k!r}", f"0 to {n}, the number of heads", "ask for fewer heads, a whole number"
            )
        return int(k)
    if not isinstance(fraction, float | np.floating) or not 0 < fraction <= 1:
        raise CorelensError(
            f"fraction={fraction!r}",
            "a share of all heads, above 0 and up to 1",
            "for a number: top(10)",
        )
    return max(1, round(float(fraction) * n))
