"""The retrieval score: does a head look at the evidence in the moment when the model writes what
stands there?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.metrics.copying import copied_regions
from corelens.metrics.definition import Metric
from corelens.tokens.token_map import TokenMap


def retrieval(
    looked: Int[Tensor, "head step"],
    token_map: TokenMap,
    steps: Sequence[str],
    texts: Sequence[str | None],
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """(hits, copied tokens): of the generated tokens that occur in a region's text, those at which
    the key that the head attends to most lies in such a region; a ratio, 0 to 1.

    Wu et al. 2024 ("Retrieval Head", arXiv 2404.15574) ask that the key looked at IS the generated
    token; a visual token is no word, so its region's text must contain it. They divide by the
    needle's length, which equals the number of copied tokens when the model answers right; a sample
    in which nothing is copied is left out and counted.

    Args:
        looked: the key (of all keys so far) that a head attends to most in the row that predicted
            each token.
        steps: the text of each generated token; special tokens as "".
        texts: the text of each of the sample's regions.
    """
    hits = torch.zeros(looked.shape[0], device=looked.device)
    copied = 0
    for step, regions in enumerate(copied_regions(steps, texts, token_map)):
        if regions:
            copied += 1
            inside = torch.cat([token_map.regions[i] for i in regions]).to(looked.device)
            hits += torch.isin(looked[:, step], inside)
    return hits, torch.full_like(hits, copied)


RETRIEVAL = Metric(
    "retrieval",
    retrieval,
    needs=("looked", "token_map", "steps", "texts"),
    rows="generated",
    ratio=True,
)
