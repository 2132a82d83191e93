"""Attention mass: what the rows of a pattern put on some keys. The sums that RAM and its relatives are made of."""

from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError

REDUCTIONS = ("max", "mean")


def mass_on(
    pattern: Float[Tensor, "head row key"],
    positions: Int[Tensor, " some"],
    weights: Float[Tensor, " some"] | None = None,
) -> Float[Tensor, "head row"]:
    """Σ_{j ∈ positions} w_j A_ij for every head and row; weights are 1 if not given."""
    chosen = pattern.index_select(-1, positions.to(pattern.device))
    return (chosen if weights is None else chosen * weights.to(pattern.device)).sum(-1)


def over_rows(mass: Float[Tensor, "head row"], reduce: str) -> Float[Tensor, " head"]:
    """One number a head: the row that has most ("max") or the mean of the rows ("mean")."""
    if mass.shape[-1] == 0:
        raise CorelensError("a pattern without rows", "one row or more", "check which rows the sample has")
    if reduce == "max":
        return mass.amax(-1)
    if reduce == "mean":
        return mass.mean(-1)
    raise CorelensError(
        f"reduce={reduce!r}", " or ".join(map(repr, REDUCTIONS)), "'max': the row that looks hardest; 'mean': all rows"
    )
