"""Value mass: how much of the evidence a head writes into the residual stream, not only how hard it
looks."""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows
from corelens.tokens.token_map import TokenMap


def value_mass(
    pattern: Float[Tensor, "head row key"],
    token_map: TokenMap,
    values: Float[Tensor, "kv_head key d_head"],
    w_o: Float[Tensor, "head d_head d_out"],
    reduce: str = "mean",
) -> Float[Tensor, " head"]:
    """mean_{i ∈ rows} Σ_{j ∈ G} w_j ‖A_ij v_j W_O‖₂, or the maximum over rows; in the residual
    stream's unit (a norm).

    An attention sink is looked at with a tiny value: attention mass counts it, this does not.
    Source: the norm-based analysis of Kobayashi et al. 2020 (arXiv 2004.10102), summed over the
    region.

    Args:
        values: v of every key as attention uses it, one a KV head; query head h reads KV head h //
            group.
        w_o: the output projection of every query head, or what gives the same norms (`same_norms`).
    """
    region = token_map.region.to(values.device)
    group = pattern.shape[0] // values.shape[0]
    region_values = values.index_select(1, region).float().repeat_interleave(group, dim=0)
    # A is a non-negative number, so it leaves the norm: one norm a key instead of one a row and key
    norms = torch.linalg.vector_norm(torch.bmm(region_values, w_o.to(region_values)), dim=-1).to(
        pattern.device
    )
    weight = token_map.region_weight.to(pattern.device) * norms  # [head, region]
    return over_rows(
        (pattern.index_select(-1, region.to(pattern.device)) * weight[:, None]).sum(-1), reduce
    )


def same_norms(w_o: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_out"]:
    """A smaller matrix L with ‖v L‖ = ‖v W_O‖ for every v: of W_O = L Qᵀ with orthonormal Q,
    [d_head, d_head] a head.

    With it the norms of a region's tokens take d_model / d_head times less memory and work.
    """
    w_o = w_o.detach().float()
    if w_o.shape[1] >= w_o.shape[2]:
        return w_o
    return torch.linalg.qr(w_o.transpose(1, 2), mode="r").R.transpose(1, 2).contiguous()


VALUE_MASS = Metric(
    "value_mass", value_mass, needs=("pattern", "token_map", "values", "w_o"), reduce="mean"
)
