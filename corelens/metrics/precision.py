"""Precision: of the attention that goes to the picture, the share that goes to the evidence."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def precision(
    evidence: Float[Tensor, "*layer head row"], visual: Float[Tensor, "*layer head row"]
) -> tuple[Float[Tensor, "*layer head"], Float[Tensor, "*layer head"]]:
    """M_G / M_V as a ratio of means over rows and samples: (mean over rows of M_G, mean over rows
    of M_V).

    Sum both over samples, then divide: a mean of ratios would be ruled by rows that hardly look at
    the picture. A sample with M_V = 0 has a zero denominator: `HeadScores(parts=…)` leaves it out
    and counts it. 0 to 1.
    """
    return over_rows(evidence, "mean"), over_rows(visual, "mean")


PRECISION = Metric("precision", precision, needs=("evidence", "visual"), ratio=True)
