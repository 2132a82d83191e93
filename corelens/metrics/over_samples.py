"""From the numbers of single samples to scores of heads: mean, ratio of means, median, ranks or
votes."""

from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.heads.scores import HeadScores
from corelens.metrics.definition import Metric

VOTED = 0.05  # the share of heads that a sample votes for


def head_scores(
    metric: Metric, raw: Float[np.ndarray, "sample part layer head"], meta: dict[str, Any]
) -> HeadScores:
    """What a metric made of every sample and layer, as HeadScores.

    `per_sample` is what is averaged: the scores themselves ("mean", "median"), the ranks within
    each sample ("rank_mean"), or the votes ("vote").
    """
    exists = np.isfinite(raw).any(axis=(0, 1))
    # layers without attention, or with fewer heads: the others are ranked among themselves
    if not exists.all():
        return _of_those(metric, raw, exists, meta)
    if metric.finish is not None:
        return HeadScores(per_sample=metric.finish(raw.swapaxes(0, 1)), meta=meta)
    if metric.ratio:
        return HeadScores(parts=(raw[:, 0], raw[:, 1]), meta=meta)
    scores = raw[:, 0]
    if metric.samples == "median":
        return HeadScores(np.median(scores, axis=0), scores, meta)
    if metric.samples == "rank_mean":
        return HeadScores(per_sample=ranks(scores), meta=meta)
    if metric.samples == "vote":
        return HeadScores(per_sample=votes(scores), meta=meta)
    return HeadScores(per_sample=scores, meta=meta)


def _of_those(
    metric: Metric, raw: np.ndarray, exists: np.ndarray, meta: dict[str, Any]
) -> HeadScores:
    """Scores of the heads that exist, NaN elsewhere."""
    alone = head_scores(metric, raw[:, :, exists][:, :, None], meta)

    def spread(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        every = np.full((*values.shape[:-2], *exists.shape), np.nan, dtype=values.dtype)
        every[..., exists] = values[..., 0, :]
        return every

    if alone.parts is not None:
        return HeadScores(parts=tuple(spread(part) for part in alone.parts), meta=meta)  # type: ignore[arg-type]
    return HeadScores(spread(alone.values), spread(alone.per_sample), meta)


def ranks(scores: Float[np.ndarray, "sample layer head"]) -> Float[np.ndarray, "sample layer head"]:
    """Every sample's ranks of the heads, from 0 (the lowest) to 1 (the highest); heads that are
    equal share theirs."""
    from scipy.stats import rankdata  # its import takes a second

    flat = scores.reshape(len(scores), -1)
    return (
        ((rankdata(flat, axis=1) - 1) / max(flat.shape[1] - 1, 1))
        .reshape(scores.shape)
        .astype(np.float32)
    )


def votes(scores: Float[np.ndarray, "sample layer head"]) -> Float[np.ndarray, "sample layer head"]:
    """1 for the heads in a sample's top 5%, else 0; heads that are equal at the border share the
    votes left there."""
    flat = scores.reshape(len(scores), -1)
    count = max(1, round(VOTED * flat.shape[1]))
    border = np.sort(flat, axis=1)[:, -count][:, None]
    above, equal = flat > border, flat == border
    left = count - above.sum(1, keepdims=True)
    return (
        (above + equal * left / equal.sum(1, keepdims=True))
        .reshape(scores.shape)
        .astype(np.float32)
    )
