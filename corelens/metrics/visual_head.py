"""SparseMM's visual-head score: which heads look at a piece of text while the model reads it
out."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.metrics.copying import copied_regions
from corelens.metrics.definition import Metric
from corelens.tokens.token_map import TokenMap


def visual_head(
    looked: Int[Tensor, "head step"],
    token_map: TokenMap,
    steps: Sequence[str],
    texts: Sequence[str | None],
) -> Float[Tensor, " head"]:
    """Σ over steps of 1 / |box tokens| where the head's argmax key lies in the box that is being
    read.

    Greedy decoding; a step counts only if its token occurs in exactly one box's text; the argmax is
    over all keys. The mean over pictures is then divided by its sum over all heads
    (`share_of_all`). Source: Wang et al. 2025, "SparseMM", arXiv 2506.05344, and its published
    code. (Blanks around a token are ignored, which that code does not.)

    Args:
        looked: the key (of all keys so far) that a head attends to most in the row that predicted
            each token.
        steps: the text of each generated token; special tokens as "".
        texts: the text of each of the sample's regions.
    """
    score = torch.zeros(looked.shape[0], device=looked.device)
    for step, boxes in enumerate(copied_regions(steps, texts, token_map)):
        if len(boxes) == 1:
            tokens = token_map.regions[boxes[0]].to(looked.device)
            score += torch.isin(looked[:, step], tokens) / len(tokens)
    return score


def share_of_all(
    parts: Float[np.ndarray, "part sample layer head"],
) -> Float[np.ndarray, "sample layer head"]:
    """Per-sample scores over the sum of their mean, so that the mean sums to 1; all zero if nothing
    was hit."""
    total = parts[0].mean(0, dtype=np.float64).sum()
    return (parts[0] / (total or 1)).astype(np.float32)


VISUAL_HEAD = Metric(
    "visual_head",
    visual_head,
    needs=("looked", "token_map", "steps", "texts"),
    rows="generated",
    finish=share_of_all,
)
