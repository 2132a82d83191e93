"""Attention over a set of keys in two parts, joined by the log-sum-exp of each part's scores.

The kernel is the one that SDPA itself uses on a CPU; SDPA does not return the log-sum-exp.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def joinable(*tensors: Tensor) -> bool:
    """Whether the kernel supports these queries, keys and values: on a CPU, without gradients, all
    of one width."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    same_width = len({x.shape[-1] for x in tensors}) == 1
    return all(x.device.type == "cpu" for x in tensors) and not needs_grad and same_width


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Float[Tensor, "n head row d"], Float[Tensor, "n head row"]]:
    """(z, log-sum-exp of the scores); keys and values with as many heads as the queries."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=mask, scale=scaling
    )


def join(z: Tensor, log_sum: Tensor, other: Tensor, other_log_sum: Tensor) -> Tensor:
    """Attention over the union of two sets of keys, from attention over each.

    With L = log Σ exp(scores) of each set, the second set has exp(L₂) / (exp(L₁) + exp(L₂)) =
    sigmoid(L₂ − L₁) of the whole softmax: z = (1 − w) · z₁ + w · z₂ with this w.
    """
    return torch.lerp(z, other, torch.sigmoid(other_log_sum - log_sum).unsqueeze(-1).to(z.dtype))
