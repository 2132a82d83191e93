"""PruneVisual: visual tokens that the chosen heads did not look at are hidden from the layers that
follow.

The tokens are judged on the query side, by the attention of the prompt's last rows in heads that
scores name (as HAWK weighs heads, and FastV, arXiv 2403.06764, takes the mean over all heads of one
layer).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.rows import Call, row_scores, softmax
from corelens.sparse.patterns import at_least
from corelens.sparse.prompt import Prompt
from corelens.sparse.visible import MaskMod


@dataclass(eq=False)
class PruneVisual:
    """From layer `after` on, only the share `keep` of a sample's visual tokens is seen.

    In the layers before, everything is seen, and a visual token's weight is Σ s(l, h) · mean over
    the last `rows` real rows of A[l, h, row, token], with s the heads' scores (negative ones count
    as 0; without scores all heads count alike). The tokens of least weight are hidden from every
    other row then; their own rows decide nothing more. It is a plan for whole layers: give no full
    heads, or these go on seeing all.

    Args:
        scores: a HeadScores (or an array [layer, head]); None: all heads alike.
        keep: the share of visual tokens that stay, above 0, at most 1.
        after: the first layer that does without the others.
        rows: how many of the prompt's last rows judge.
    """

    scores: Any = None
    keep: float = 0.5
    after: int = 2
    rows: int = 16

    def __post_init__(self) -> None:
        at_least("after", self.after, 1, "the layers before judge: 1 at the least")
        at_least("rows", self.rows, 1, "the last row alone is rows=1")
        if not 0 < self.keep <= 1:
            raise CorelensError(f"keep={self.keep!r}", "a share above 0, at most 1", "0.5, say")

    def sees(self, prompt: Prompt, query: Tensor, key: Tensor, call: Call) -> MaskMod:
        """See `corelens.sparse.patterns`."""
        module: Any = call.module
        layer, pictures = int(module.layer_idx), prompt.pictures
        if pictures is None or query.shape[2] != prompt.length:
            raise CorelensError(
                "PruneVisual in a run on bare tensors, or on a prompt in parts",
                "inputs that know which tokens are visual, whole",
                "run on model.prepare(sample), without prefill_chunk_size",
            )
        if layer < self.after:
            prompt.notes[(id(self), layer)] = self._weights(prompt, layer, query, key, call)
            return lambda b, h, q, k: (q >= 0) & (k >= 0)
        if (id(self), "hidden") not in prompt.notes:
            judged = [prompt.notes.get((id(self), earlier)) for earlier in range(self.after)]
            known = [weights.to(query.device) for weights in judged if weights is not None]
            if not known:
                raise CorelensError(
                    f"PruneVisual(after={self.after}) where no layer before it has judged",
                    "layers with attention before it, under the same pattern",
                    "give a later layer",
                )
            prompt.notes[(id(self), "hidden")] = self._hidden(sum(known), pictures >= 0)  # type: ignore[arg-type]
        hidden = prompt.notes[(id(self), "hidden")].to(query.device)
        last = prompt.length - 1

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return ~hidden[b, k.clamp(max=last)] | (q == k)

        return mask_mod

    def _weights(
        self, prompt: Prompt, layer: int, query: Tensor, key: Tensor, call: Call
    ) -> Float[Tensor, "batch key"]:
        """How much this layer's heads look at each key, weighted by their scores."""
        sampled = prompt.end[:, None] - self.rows + torch.arange(self.rows, device=query.device)
        real = sampled >= prompt.first[:, None]
        scores = row_scores(query, key[:, :, : prompt.length], sampled.clamp(min=0), None, call)
        attention = softmax(scores, call.sink_logits).masked_fill(~real[:, None, :, None], 0.0)
        mean = attention.sum(2) / real.sum(1)[:, None, None]
        if self.scores is None:
            return mean.sum(1)
        values = np.clip(np.nan_to_num(getattr(self.scores, "values", self.scores)), 0, None)
        if layer >= len(values) or values.shape[1] < mean.shape[1]:
            raise CorelensError(
                f"scores of {values.shape[0]} layers × {values.shape[1]} heads",
                f"scores of this model, whose layer {layer} has {mean.shape[1]} heads",
                "score the heads of the model that runs",
            )
        weights = torch.as_tensor(values[layer, : mean.shape[1]], dtype=mean.dtype)
        return torch.einsum("bhk,h->bk", mean, weights.to(mean.device))

    def _hidden(
        self, weights: Float[Tensor, "batch key"], visual: Bool[Tensor, "batch key"]
    ) -> Bool[Tensor, "batch key"]:
        """The visual tokens of least weight, all but the share that is kept of each sample."""
        hidden = torch.zeros_like(visual)
        for sample, (of_sample, tokens) in enumerate(zip(weights, visual, strict=True)):
            visual = tokens.nonzero()[:, 0]
            count = len(visual) - max(1, round(self.keep * len(visual))) if len(visual) else 0
            order = of_sample[visual].argsort(stable=True)
            hidden[sample, visual[order[:count]]] = True
        return hidden

    # not hashable: what it hides depends on the prompt, and no engine may keep its mask
    __hash__ = None  # type: ignore[assignment]
