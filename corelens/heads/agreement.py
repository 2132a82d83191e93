"""How far two scores agree on the same heads."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from corelens.heads import stats


class Agreement(NamedTuple):
    """How far two scores agree on the same heads; see `HeadScores.agreement`."""

    spearman: float
    jaccard: float
    rbo: float
    k: int


def agreement(
    first: Float[np.ndarray, "layer head"],
    second: Float[np.ndarray, "layer head"],
    k: int,
    p: float,
    seed: int,
) -> Agreement:
    """Rank correlation over the heads that both have, overlap of their top k, rank-biased overlap.

    Args:
        first, second: scores, NaN where there is no such head.
        k: the size of the two top sets.
        p: how deep the rank-biased overlap looks, about 1 / (1 − p) ranks.
        seed: of the draw that breaks exact ties.
    """
    both = ~np.isnan(first) & ~np.isnan(second)
    a, b = (np.where(both, values, np.nan) for values in (first, second))
    order_a, order_b = stats.ranking(a, seed), stats.ranking(b, seed)
    top_a, top_b = set(order_a[:k].tolist()), set(order_b[:k].tolist())
    return Agreement(
        stats.spearman(a, b),
        len(top_a & top_b) / max(1, len(top_a | top_b)),
        stats.rank_biased_overlap(order_a, order_b, p),
        k,
    )
