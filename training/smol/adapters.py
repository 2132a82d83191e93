"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) of a decoder's projections."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
RANK, SCALE = 8, 2.0


class Adapted(nn.Module):
    """A frozen linear map plus SCALE · up · down."""

    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(
            torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features)
        )
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.down.to(x.dtype))
        return self.linear(x) + F.linear(low, (SCALE * self.up).to(x.dtype))


def adapt(decoder: Any) -> nn.ModuleDict:
    """Put adapters around every projection of a decoder's layers; returns them by the projection's
    name."""
    adapters = nn.ModuleDict()
    for i, layer in enumerate(decoder.layers):
        for part in (layer.self_attn, layer.mlp):
            for name in ADAPTED:
                if hasattr(part, name):
                    adapted = Adapted(getattr(part, name))
                    setattr(part, name, adapted)
                    adapters[f"{i}:{name}"] = adapted
    return adapters
