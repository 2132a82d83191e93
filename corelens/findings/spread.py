"""How widely a head looks over the picture: two numbers of one map of attention."""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.localization import spatial_entropy
from corelens.tokens.token_map import TokenMap


def spread(pattern: Float[Tensor, "head row key"], token_map: TokenMap) -> Float[Tensor, " head"]:
    """exp(H) / |V|: the share of the picture that a head spreads over, 1/|V| (one token) to 1 (evenly over all).

    H = −Σ_{j∈V} p_j ln p_j with p the head's attention on the visual tokens divided by its sum, mean over rows.
    """
    on_picture = pattern.index_select(-1, token_map.visual.to(pattern.device))
    p = on_picture / on_picture.sum(-1, keepdim=True).clamp(min=1e-12)
    entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
    return entropy.exp().mean(1) / on_picture.shape[-1]


def tightness(pattern: Float[Tensor, "head row key"], token_map: TokenMap) -> Float[Tensor, " head"]:
    """Spatial entropy in nats of arXiv 2503.06287 (see `localization`), of the mean over rows: low when a head looks at
    one place; ln(tokens) + 1 where its attention on the picture is too faint or too even to have a place."""
    on_picture = pattern.index_select(-1, token_map.visual.to(pattern.device)).mean(1)
    found = spatial_entropy(on_picture.double().cpu().numpy(), token_map)
    return torch.tensor(found, device=pattern.device, dtype=pattern.dtype)
