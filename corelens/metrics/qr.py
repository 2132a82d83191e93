"""QRHead's score: calibrated attention from the question to the evidence, without tokens that
calibrate oddly."""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows
from corelens.tokens.token_map import TokenMap


def qr(
    pattern: Float[Tensor, "head row key"],
    token_map: TokenMap,
    null_pattern: Float[Tensor, "head null_row null_key"],
    null_token_map: TokenMap,
    outlier: float = 2.0,
) -> Float[Tensor, " head"]:
    """Σ over regions of Σ_{j} s_j, over the region's tokens with s_j > mean(s) − 2 std(s);
    attention mass.

    s_j = mean over question rows of A_ij, minus the same under the null question "N/A". What lies
    two standard deviations below a region's mean is taken for an artefact of calibration and left
    out (std with n − 1; a region of one token has no outlier). Source: Zhang et al. 2025,
    "Query-Focused Retrieval Heads", arXiv 2506.09944, whose documents are our regions; rows there
    run from the instruction to the end of the prompt (here: rows="question+last" comes near).

    Args:
        null_pattern, null_token_map: of a forward of the same picture and regions whose question is
            "N/A".
        outlier: how many standard deviations below the mean a token may lie.
    """
    total = torch.zeros(pattern.shape[0], device=pattern.device)
    for region, null_region in zip(token_map.regions, null_token_map.regions, strict=True):
        asked = pattern.index_select(-1, region.to(pattern.device)).mean(1)
        null = null_pattern.index_select(-1, null_region.to(null_pattern.device)).mean(1)
        score = asked - null.to(asked.device)
        if len(region) > 1:
            floor = score.mean(-1, keepdim=True) - outlier * score.std(-1, keepdim=True)
            # not above the floor is out, as published: equal scores have no spread, and nothing of
            # them is above
            out = (score <= floor) & (score.std(-1, keepdim=True) > 0)  # (NaN stays, and is found)
            score = score.masked_fill(out, 0)
        total = total + score.sum(-1)
    if not token_map.regions:
        token_map.region  # noqa: B018 (raises, and says which sample lacks its region)
    over_rows(pattern[:, :, 0], "mean")  # raises if there is no row
    return total


QR = Metric(
    "qr",
    qr,
    needs=("pattern", "token_map", "null_pattern", "null_token_map"),
    options={"outlier": 2.0},
)
