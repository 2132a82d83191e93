"""The retrieval score: does a head look at the evidence in the moment when the model writes what stands there?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.copying import copied_regions
from corelens.tokens import TokenMap


def retrieval(
    pattern: Float[Tensor, "head row key"],
    token_map: TokenMap,
    steps: Sequence[str],
    texts: Sequence[str | None],
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """(hits, copied tokens): of the generated tokens that occur in a region's text, those at which the key that the
    head attends to most lies in such a region; a ratio, 0 to 1.

    Wu et al. 2024 ("Retrieval Head", arXiv 2404.15574) ask that the key looked at IS the generated token; a visual
    token is no word, so its region's text must contain it. They divide by the needle's length, which equals the number
    of copied tokens when the model answers right; a sample in which nothing is copied is left out and counted.

    Args:
        pattern: one row a generated token: the row that predicted it, over all keys so far (zero behind them).
        steps: the text of each generated token; special tokens as "".
        texts: the text of each of the sample's regions.
    """
    hits = torch.zeros(pattern.shape[0], device=pattern.device)
    copied = 0
    looked = pattern.argmax(-1)  # [head, row]
    for row, regions in enumerate(copied_regions(steps, texts, token_map)):
        if regions:
            copied += 1
            inside = torch.cat([token_map.regions[i] for i in regions]).to(pattern.device)
            hits += torch.isin(looked[:, row], inside)
    return hits, torch.full_like(hits, copied)
