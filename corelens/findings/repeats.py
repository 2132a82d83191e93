"""How many samples a ranking needs: agreement of rankings from n samples with rankings from as many
others."""

from typing import Any

import numpy as np

from corelens.heads.scores import HeadScores

COUNTS = (5, 10, 20, 50, 100, 200)
DRAWS = 20


def agreement_over_n(scores: HeadScores, seed: int = 0) -> list[dict[str, float]]:
    """For n of COUNTS (up to half of the samples): mean Spearman ρ and Jaccard overlap of the top
    5% of two rankings.

    The two rankings come from n samples each that have none in common; the mean of 20 draws.
    """
    assert scores.per_sample is not None
    rng, rows = np.random.default_rng(seed), []
    for n in COUNTS:
        if 2 * n > len(scores.per_sample):
            break
        agreements: list[Any] = []
        for _ in range(DRAWS):
            order = rng.permutation(len(scores.per_sample))[: 2 * n]
            first, second = (
                HeadScores(per_sample=scores.per_sample[half]) for half in (order[:n], order[n:])
            )
            agreements.append(first.agreement(second))
        spearman = np.nanmean([agreement.spearman for agreement in agreements])
        jaccard = np.mean([agreement.jaccard for agreement in agreements])
        rows.append({"n": n, "spearman": float(spearman), "jaccard": float(jaccard)})
    return rows
