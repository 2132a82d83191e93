"""Precision: of the attention that goes to the picture, the share that goes to the evidence."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.mass import mass_on
from corelens.tokens import TokenMap


def precision(
    pattern: Float[Tensor, "head row key"], token_map: TokenMap
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """M_G / M_V as a ratio of means over rows and samples: (mean over rows of M_G, mean over rows of M_V).

    Sum both over samples, then divide: a mean of ratios would be ruled by rows that hardly look at the picture.
    A sample with M_V = 0 has a zero denominator: `HeadScores(parts=…)` leaves it out and counts it. 0 to 1.
    """
    evidence = mass_on(pattern, token_map.region, token_map.region_weight)
    return evidence.mean(-1), mass_on(pattern, token_map.visual).mean(-1)
