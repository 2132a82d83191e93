"""Random scores: what any score must beat."""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric


def random(
    pattern: Float[Tensor, "head row key"], layer: int, seed: int = 0
) -> Float[Tensor, " head"]:
    """A uniform number in [0, 1) for every head of layer `layer`, drawn from `seed`; the same for
    every sample."""
    # one stream per layer: SeedSequence-like mixing, so that neighbouring seeds and layers share no
    # draws
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) * 2_654_435_761 % 2**63)
    return torch.rand(pattern.shape[0], generator=generator).to(pattern.device)


RANDOM = Metric("random", random, needs=("pattern", "layer"), options={"seed": 0}, region=False)
