"""The keys that heads look at while a model writes."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.hooks.points import Hook
from corelens.metrics.rows import rows_points, stacked


class LookedAt:
    """The key that each head looks at most, in the row that predicts each token of a greedy
    generation."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Int[Tensor, "batch head"]]] = {}  # layer → steps

        def keep_argmax(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            # one row a step: of the prompt its last one, then each token that was written
            self._keys.setdefault(hook.layer(), []).append(_argmax(pattern[:, :, 0]))

        keep_argmax.rows = "last+answer"  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(rows_points, keep_argmax)]

    def keys(self) -> Int[Tensor, "layer batch head step"]:
        """Positions in the padded row; −1 where attention is not finite."""
        return stacked([torch.stack(self._keys[layer], dim=-1) for layer in sorted(self._keys)], 1)


def _argmax(row: Float[Tensor, "batch head key"]) -> Int[Tensor, "batch head"]:
    best = row.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)
