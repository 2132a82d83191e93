"""Retrieval Attention Mass (RAM): the attention of the question's tokens on the evidence; RAM above
chance; and RAM of shifted regions, an estimate of chance."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def ram(
    evidence: Float[Tensor, "*layer head row"], reduce: str = "mean"
) -> Float[Tensor, "*layer head"]:
    """RAM = mean_{i ∈ Q} Σ_{j ∈ G} w_j A_ij. Raw attention mass, 0 to 1; not normalised.

    Q: the question's tokens. G: the tokens of the region (of all regions, if there are several).
    w: the weights of these tokens: all 1, or by option the fraction of each that the region covers.
    A: the pattern. Our variants read other rows, take the maximum over rows, or reduce over keys in
    another way; the result's name says so: `ram[rows=last]`, `ram[reduce=max]`, `ram[keys=max]`.

    Args:
        evidence: Σ_{j ∈ G} w_j A_ij of each row i.
        reduce: over rows: "mean", as published, or "max".
    Source: the CoRe-head paper, arXiv 2606.05843. (We did not have its text; five summaries of it
    give this same formula.)
    """
    return over_rows(evidence, reduce)


def ram_excess(
    evidence: Float[Tensor, "*layer head row"],
    even_mass: Float[Tensor, "*layer head row"],
    reduce: str = "mean",
) -> Float[Tensor, "*layer head"]:
    """RAM minus chance: mean_{i ∈ rows} (M_G − M_V · |G| / |V|); attention mass, −1 to 1.

    M_G: a row's attention on the region. M_V: its attention on all picture tokens, V. |G|: the sum
    of the region's weights. A head that spreads its attention evenly over the picture has RAM
    M_V · |G| / |V| without retrieving anything; its excess is 0. Ours.

    Args:
        evidence: M_G of each row.
        even_mass: M_V · |G| / |V| of each row.
        reduce: over rows, "mean" or "max" (of the differences).
    """
    return over_rows(evidence - even_mass, reduce)


def ram_shifted(
    shifted: Float[Tensor, "*layer head row"], reduce: str = "mean"
) -> Float[Tensor, "*layer head"]:
    """RAM of regions of the same shape elsewhere in the picture; attention mass, 0 to 1.

    The region is shifted along the picture's tokens to every place where it does not overlap
    itself; the score is the mean RAM of these shifted regions. A head whose RAM is no higher than
    that attends to the picture, not to the evidence. Ours.

    Args:
        shifted: the mean attention of each row on the shifted regions.
        reduce: over rows, "mean" or "max".
    """
    return over_rows(shifted, reduce)


RAM = Metric("ram", ram, needs=("evidence",), keys="sum", reduce="mean")
RAM_EXCESS = Metric("ram_excess", ram_excess, needs=("evidence", "share"), reduce="mean")
RAM_SHIFTED = Metric("ram_shifted", ram_shifted, needs=("shifted",), reduce="mean")
