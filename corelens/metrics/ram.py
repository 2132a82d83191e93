"""Retrieval Attention Mass: what the question token that looks hardest puts on the evidence."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.mass import of_masses, over_rows
from corelens.tokens.token_map import TokenMap


@of_masses
def ram(
    evidence: Float[Tensor, "*layer head row"], token_map: TokenMap, reduce: str = "max"
) -> Float[Tensor, "*layer head"]:
    """RAM = max_{i ∈ rows} Σ_{j ∈ G} w_j A_ij, or the mean over rows. Raw attention mass, 0 to 1; not normalised.

    G: the tokens of the region (the union, if there are several); w: their weights, all 1 unless the sample was
    prepared with covered fractions. The papers leave the reduction over rows open and it decides what is found:
    the row that reads the evidence stands out by its maximum and drowns in the mean.

    Args:
        evidence: M_G, made of the `pattern` [head, row, key] that callers give: the rows asked for, of one sample and
            layer, float32.
        reduce: "max" or "mean" over rows.
    Source: the CoRe-head paper, arXiv 2606.05843, which leaves rows and reduction open; every result names both.
    """
    return over_rows(evidence, reduce)
