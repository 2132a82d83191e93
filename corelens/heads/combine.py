"""Scores made of scores: a difference, a mean over data sets, shares of one. Each returns what a
HeadScores is made of: values, per-sample values, meta."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.errors import CorelensError
from corelens.heads.validity import shapes

Made = tuple[
    Float[np.ndarray, "layer head"], Float[np.ndarray, "sample layer head"] | None, dict[str, Any]
]


def check_same_shape(a: Any, b: Any) -> None:
    """Raise unless both are HeadScores of as many layers and heads."""
    for scores in (a, b):
        if not hasattr(scores, "per_sample"):
            raise CorelensError(
                f"a {type(scores).__name__} in place of scores",
                "HeadScores",
                "give what score_heads returned, one key of it",
            )
    if a.values.shape != b.values.shape:
        raise shapes(f"scores of {a.values.shape} and of {b.values.shape} [layer, head]")


def difference(a: Any, b: Any) -> Made:
    """One score minus another, head by head; sample by sample too where both speak of the same
    samples."""
    check_same_shape(a, b)
    names = a.meta.get("samples")
    per_sample = None
    same = names is not None and names == b.meta.get("samples") and not (a.parts or b.parts)
    if same and a.per_sample is not None and b.per_sample is not None:
        per_sample = a.per_sample - b.per_sample
    label = f"{a.label} − {b.label}"
    common = {
        name: value for name, value in a.meta.items() if name not in ("rows", "reduce", "unit")
    }
    meta = {**common, "metric": label, "key": label, "of": a.meta, "minus": b.meta}
    return a.values - b.values, per_sample, meta


def mean(scores: Sequence[Any]) -> Made:
    """The mean over data sets, each with the same weight however many samples it has; no
    per-sample scores."""
    if not scores:
        raise CorelensError(
            "no scores", "one HeadScores or more", "give a list of scores of one model"
        )
    for other in scores:
        check_same_shape(scores[0], other)

    def in_all(name: str) -> bool:
        return all(
            name in other.meta and other.meta[name] == scores[0].meta[name] for other in scores
        )

    common = {name: value for name, value in scores[0].meta.items() if in_all(name)}
    meta = {**common, "mean_of": [other.meta for other in scores]}
    return np.mean([other.values for other in scores], axis=0), None, meta
