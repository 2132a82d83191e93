"""Attention mass: what the rows of a pattern put on some keys. The sums that RAM and its relatives are made of."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.token_map import TokenMap

REDUCTIONS = ("max", "mean")

Weighted = tuple[Int[Tensor, " some"], Float[Tensor, " some"]]  # positions and their weights
SETS: dict[str, Callable[[TokenMap], Weighted]] = {
    "evidence": lambda token_map: (token_map.region, token_map.region_weight),  # M_G
    "visual": lambda token_map: (token_map.visual, torch.ones(len(token_map.visual))),  # M_V
}
"""The sets of tokens whose mass a formula may ask for by the name of its parameter."""


def of_masses(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Make a metric f(pattern [head, row, key], token_map, …) of a formula in what rows put on sets of tokens.

    The formula's first parameters are names in SETS, each [*any, head, row]; then come `token_map` and options. It
    stays at hand as `f.of_masses`, the names as `f.sets`: a `Record` sums the masses of a whole batch in one product a
    layer, and applies the formula once, to all layers.
    """
    parameters = inspect.signature(formula).parameters
    sets = [name for name in parameters if name in SETS]

    @functools.wraps(formula)
    def score(pattern: Float[Tensor, "head row key"], token_map: TokenMap, *options: Any, **named: Any) -> Any:
        return formula(*(mass_on(pattern, *SETS[name](token_map)) for name in sets), token_map, *options, **named)

    pattern = inspect.Parameter("pattern", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    rest = [parameter for name, parameter in parameters.items() if name not in sets]
    score.__signature__ = inspect.Signature([pattern, *rest])  # type: ignore[attr-defined]
    score.of_masses, score.sets = formula, sets  # type: ignore[attr-defined]
    return score


def mass_on(
    pattern: Float[Tensor, "head row key"],
    positions: Int[Tensor, " some"],
    weights: Float[Tensor, " some"],
) -> Float[Tensor, "head row"]:
    """Σ_{j ∈ positions} w_j A_ij for every head and row."""
    return (pattern.index_select(-1, positions.to(pattern.device)) * weights.to(pattern.device)).sum(-1)


def set_weights(token_maps: list[TokenMap], sets: list[str]) -> Float[Tensor, "batch pos set"]:
    """The weight of every position in each of these sets: pattern @ weights is the mass on all of them at once."""
    weights = torch.zeros(len(token_maps), token_maps[0].length, len(sets))
    for of_sample, token_map in zip(weights, token_maps, strict=True):
        for i, name in enumerate(sets):
            positions, values = SETS[name](token_map)
            of_sample[positions, i] = values
    return weights


def over_rows(mass: Float[Tensor, "*any row"], reduce: str) -> Float[Tensor, "*any"]:
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
