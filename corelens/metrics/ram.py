"""Retrieval Attention Mass: what the question token that looks hardest puts on the evidence."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.mass import mass_on, over_rows
from corelens.tokens import TokenMap


def ram(pattern: Float[Tensor, "head row key"], token_map: TokenMap, reduce: str = "max") -> Float[Tensor, " head"]:
    """RAM = max_{i ∈ rows} Σ_{j ∈ G} w_j A_ij, or the mean over rows. Raw attention mass, 0 to 1; not normalised.

    G: the tokens of the region (the union, if there are several); w: their weights, all 1 unless the sample was
    prepared with covered fractions. The papers leave the reduction over rows open and it decides what is found:
    the row that reads the evidence stands out by its maximum and drowns in the mean.

    Args:
        pattern: the rows asked for, of one sample and layer, float32.
        reduce: "max" or "mean" over rows.
    Source: the CoRe-head paper, which leaves rows and reduction open; every result here names both.
    """
    return over_rows(mass_on(pattern, token_map.region, token_map.region_weight), reduce)
