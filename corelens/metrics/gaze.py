"""Gaze: RAM of the last row, at the moment when the answer begins."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def gaze(evidence: Float[Tensor, "*layer head row"]) -> Float[Tensor, "*layer head"]:
    """Σ_{j ∈ G} A_ij for i = the row that predicts the first answer token; attention mass, 0 to 1.

    Source: Gandikota and Bau 2026, "Gaze Heads", arXiv 2606.14703: the raw mass that the final
    prompt token puts on the panel that is asked about (their panels are our regions). Given several
    rows it is their mean.
    """
    return over_rows(evidence, "mean")


GAZE = Metric("gaze", gaze, needs=("evidence",), rows="last", keys="sum")
