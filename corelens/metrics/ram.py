"""Retrieval Attention Mass: what the question's tokens put on the evidence, in three forms."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def ram(
    evidence: Float[Tensor, "*layer head row"], reduce: str = "mean"
) -> Float[Tensor, "*layer head"]:
    """RAM = mean_{i ∈ Q} Σ_{j ∈ G} w_j A_ij. Raw attention mass, 0 to 1; not normalised.

    Q: the question's tokens. G: the tokens of the region (the union, if there are several); w:
    their weights, all 1 unless the sample was prepared with covered fractions. Other rows, the
    maximum over rows and other reductions over keys are our variants; they show in the result's
    name: `ram[rows=last]`, `ram[reduce=max]`, `ram[keys=max]`.

    Args:
        evidence: attention of each row on G, already summed over its keys with their weights.
        reduce: over rows: "mean", as published, or "max".
    Source: the CoRe-head paper, arXiv 2606.05843. (We did not have its text; five summaries of it
    give this same formula.)
    """
    return over_rows(evidence, reduce)


def ram_excess(
    evidence: Float[Tensor, "*layer head row"],
    even_share: Float[Tensor, "*layer head row"],
    reduce: str = "mean",
) -> Float[Tensor, "*layer head"]:
    """RAM minus chance: mean_{i ∈ rows} (M_G − M_V · |G| / |V|); attention mass, −1 to 1.

    M_G: a row's attention on the region; M_V: on all picture tokens.
    A head that spreads its visual mass evenly has RAM M_V · |G| / |V| without retrieving anything;
    its excess is 0. |G| is the sum of the region's weights. Ours; `ram_shifted` is another estimate
    of chance.

    Args:
        evidence: attention of each row on G.
        even_share: M_V · |G| / |V| of each row.
        reduce: over rows, "mean" or "max" (of the differences).
    """
    return over_rows(evidence - even_share, reduce)


def ram_shifted(
    shifted: Float[Tensor, "*layer head row"], reduce: str = "mean"
) -> Float[Tensor, "*layer head"]:
    """RAM of a region of the same shape elsewhere in the picture; attention mass, 0 to 1.

    The mean over all shifts of the region within its picture that do not overlap it (shifts in the
    order of the picture's tokens). A head whose RAM is no higher attends to the picture, and not to
    the evidence. Ours.
    """
    return over_rows(shifted, reduce)


RAM = Metric("ram", ram, needs=("evidence",), keys="sum", reduce="mean")
RAM_EXCESS = Metric("ram_excess", ram_excess, needs=("evidence", "share"), reduce="mean")
RAM_SHIFTED = Metric("ram_shifted", ram_shifted, needs=("shifted",), reduce="mean")
