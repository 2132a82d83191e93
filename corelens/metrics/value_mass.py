"""Value mass: how much of the evidence a head writes into the residual stream, not only how hard it looks."""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.mass import mass_on, over_rows
from corelens.tokens import TokenMap


def value_mass(
    pattern: Float[Tensor, "head row key"],
    token_map: TokenMap,
    values: Float[Tensor, "kv_head key d_head"],
    w_o: Float[Tensor, "head d_head d_model"],
    reduce: str = "max",
) -> Float[Tensor, " head"]:
    """max_{i ∈ rows} Σ_{j ∈ G} w_j ‖A_ij v_j W_O‖₂, or the mean over rows; in the residual stream's unit (a norm).

    An attention sink is looked at with a tiny value: attention mass counts it, this does not. Source: the norm-based
    analysis of Kobayashi et al. 2020 (arXiv 2004.10102), summed over the region.

    Args:
        values: v of every key as attention uses it, one a KV head; query head h reads KV head h // group.
        w_o: the output projection of every query head.
    """
    region = token_map.region
    group = pattern.shape[0] // values.shape[0]
    chosen = values.index_select(1, region.to(values.device)).float().repeat_interleave(group, dim=0)
    # A is a non-negative number, so it leaves the norm: one norm a key instead of one a row and key
    norms = torch.linalg.vector_norm(torch.bmm(chosen, w_o.float().to(chosen.device)), dim=-1).to(pattern.device)
    evidence = pattern.index_select(-1, region.to(pattern.device)) * norms[:, None]
    return over_rows(mass_on(evidence, torch.arange(len(region)), token_map.region_weight), reduce)
