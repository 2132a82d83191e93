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
    A: the pattern. A variant of ours changes an option, and the result's name shows it: other rows,
    `ram[rows=last]`; the maximum over rows, `ram[reduce=max]`; over keys, `ram[keys=max]`.

    Args:
        evidence: Σ_{j ∈ G} w_j A_ij of each row i, which `corelens.metrics.mass` computes.
        reduce: over rows: "mean", as published, or "max".
    Source: the CoRe-head paper, arXiv 2606.05843. (We could not read the paper itself;
    five summaries of it give this formula.)
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

    The region is shifted along the picture's tokens, in the order of the prompt, to every place
    where it does not overlap the original; the score is the mean RAM of these regions. (A shift
    past the end of a row of tokens goes on in the next row.) If a head's RAM is not above this
    score, the head looks at the picture in general, not at the evidence. Ours.

    Args:
        shifted: the mean attention of each row on the shifted regions.
        reduce: over rows, "mean" or "max".
    """
    return over_rows(shifted, reduce)


RAM = Metric("ram", ram, needs=("evidence",), keys="sum", reduce="mean")
RAM_EXCESS = Metric("ram_excess", ram_excess, needs=("evidence", "even_mass"), reduce="mean")
RAM_SHIFTED = Metric("ram_shifted", ram_shifted, needs=("shifted",), reduce="mean")
