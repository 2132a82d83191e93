"""Which arrays are scores: finite numbers, NaN only where the model has no such head."""

from typing import Any

import numpy as np
from jaxtyping import Bool

from corelens.errors import CorelensError

ROWS = 4096  # of an array that are looked at together: a mapped one may be larger than memory


def numbers(x: Any, name: str, ndim: int) -> np.ndarray:
    """The array as float32 of `ndim` dimensions without infinities."""
    try:
        real = np.asarray(x)
        if np.iscomplexobj(real):
            raise TypeError("complex numbers")
        x = real.astype(np.float32, copy=not isinstance(x, np.memmap))  # (that stays on the disk)
    except (TypeError, ValueError) as error:
        raise CorelensError(
            f"{name}, which is no array of numbers ({error})",
            f"numbers in {ndim} dimensions",
            "give an array, or lists of one length",
        ) from error
    if x.ndim != ndim:
        raise shapes(f"{name} of shape {x.shape}")
    for start in range(0, len(x), ROWS):
        _check(x, name, np.isinf(x[start : start + ROWS]), start)
    return x


def check_missing(x: np.ndarray, name: str, exists: Bool[np.ndarray, "layer head"]) -> None:
    """Raise unless a head is NaN in all of its numbers, where it does not exist, or in none."""
    starts = range(0, len(x), ROWS)
    never = np.ones(x.shape[1:], dtype=bool)
    for start in starts:
        never &= np.isnan(x[start : start + ROWS]).all(axis=0)
    for start in starts:
        missing = np.isnan(x[start : start + ROWS])
        _check(x, name, missing & (~never | exists), start)


def _check(x: np.ndarray, name: str, wrong: np.ndarray, start: int) -> None:
    if wrong.any():
        row, *layer_head = (int(i) for i in np.argwhere(wrong)[0])
        where = (start + row, *layer_head)
        raise CorelensError(
            f"{name}{list(where)} is {x[where]}",
            "finite scores (NaN only for a head that does not exist, then in every sample)",
            "look for NaN in the attention of that layer and head: half-precision overflow is the "
            "usual cause",
        )


def shapes(problem: str) -> CorelensError:
    """The error for arrays that are not of one model."""
    return CorelensError(
        problem,
        "[layer, head] and [sample, layer, head] of one model",
        "compare scores of one model only",
    )
