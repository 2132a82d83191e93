"""Lift: how much more attention the evidence gets than its size in the picture would give it."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def lift(
    evidence: Float[Tensor, "*layer head row"], even_mass: Float[Tensor, "*layer head row"]
) -> tuple[Float[Tensor, "*layer head"], Float[Tensor, "*layer head"]]:
    """(M_G / M_V) / (|G| / |V|) as a ratio of means over rows and samples: (M_G, M_V · |G| / |V|),
    means over rows.

    The denominator is the evidence mass that the same look would give if it were spread evenly over
    the picture, so 1 means chance, 5 five times chance. |G| is the sum of the region's weights.
    Rows are taken to stand after the whole picture. Unlike RAM it does not grow with the region.
    """
    return over_rows(evidence, "mean"), over_rows(even_mass, "mean")


LIFT = Metric("lift", lift, needs=("evidence", "even_mass"), ratio=True)
