"""Gaze: RAM of the last row, at the moment when the answer begins."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.ram import ram
from corelens.tokens import TokenMap


def gaze(pattern: Float[Tensor, "head row key"], token_map: TokenMap) -> Float[Tensor, " head"]:
    """Σ_{j ∈ G} A_ij for i = the row that predicts the first answer token; attention mass, 0 to 1.

    Source: Gandikota and Bau 2026, "Gaze Heads", arXiv 2606.14703: the raw mass that the final prompt token puts on
    the panel that is asked about (their panels are our regions). Given several rows it is their mean.
    """
    return ram(pattern, token_map, reduce="mean")
