"""VerticalSlash: columns and diagonals chosen by a few sampled rows, as MInference does (Jiang et
al. 2024, arXiv 2407.02490, algorithm 2)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.rows import Call, row_scores, softmax
from corelens.sparse.patterns import at_least
from corelens.sparse.prompt import Prompt
from corelens.sparse.visible import MaskMod


@dataclass(frozen=True)
class VerticalSlash:
    """Each head sees the keys (columns) and the distances (diagonals) that hold most of the
    attention of the prompt's last rows.

    The attention of the last `rows` real rows is summed over them, once for each key and once for
    each distance i − j. A head sees the `vertical` highest keys and the `slash` highest distances;
    the first `sink` keys and the last `window` distances are among them in any case.

    Args:
        vertical: how many keys.
        slash: how many distances.
        rows: how many of the prompt's last rows are sampled (the paper takes 64).
        sink: first keys that are always seen (the paper's code takes 30).
        window: shortest distances that are always seen, 0 among them (the paper's code takes 100).
    """

    vertical: int = 1000
    slash: int = 1000
    rows: int = 64
    sink: int = 30
    window: int = 100

    def __post_init__(self) -> None:
        for name in ("vertical", "slash", "rows", "window"):
            at_least(
                name, getattr(self, name), 1, "the paper takes 1000, some thousands, 64 and 100"
            )
        at_least("sink", self.sink, 0, "the paper takes 30")

    def sees(self, prompt: Prompt, query: Tensor, key: Tensor, call: Call) -> MaskMod:
        """See `corelens.sparse.patterns`."""
        if query.shape[2] != prompt.length:
            raise CorelensError(
                f"VerticalSlash in a step of {query.shape[2]} of {prompt.length} tokens",
                "the whole prompt in one step",
                "run without prefill_chunk_size",
            )
        keys, distances = self.choose(prompt, query, key, call)
        last = prompt.length - 1

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q, k = q.clamp(max=last), k.clamp(max=last)
            # (where a model looks ahead, a distance counts in both directions)
            return keys[b, h, k] | distances[b, h, (q - k).abs()]

        return mask_mod

    def choose(
        self, prompt: Prompt, query: Tensor, key: Tensor, call: Call
    ) -> tuple[Bool[Tensor, "batch head key"], Bool[Tensor, "batch head distance"]]:
        """Which keys, and which distances, each head sees."""
        total, device = prompt.length, query.device
        sampled = prompt.end[:, None] - self.rows + torch.arange(self.rows, device=device)
        real = sampled >= prompt.first[:, None]
        plain = replace(call, allowed=None)
        scores = row_scores(query, key[:, :, :total], sampled.clamp(min=0), None, plain)
        attention = softmax(scores, call.sink_logits).masked_fill(~real[:, None, :, None], 0.0)
        positions = torch.arange(total, device=device)
        by_key = attention.sum(2)
        away = (sampled[:, :, None] - positions).clamp(min=0)[:, None].expand_as(attention)
        by_distance = torch.zeros_like(by_key).scatter_add_(
            2, away.flatten(2), attention.flatten(2)
        )
        padding = (positions < prompt.first[:, None]) | (positions >= prompt.end[:, None])
        by_key = by_key.masked_fill(padding[:, None], -torch.inf)
        of_sink = ~padding & (positions < prompt.first[:, None] + self.sink)
        in_window = (positions < self.window).expand(len(of_sink), -1)
        return _most(by_key, of_sink, self.vertical), _most(by_distance, in_window, self.slash)


def _most(
    mass: Float[Tensor, "batch head place"], always: Bool[Tensor, "batch place"], count: int
) -> Bool[Tensor, "batch head place"]:
    """The places of most mass, those that are always seen among them."""
    ranked = mass.masked_fill(always[:, None], torch.inf)
    top = ranked.topk(min(count, mass.shape[2]), dim=2).indices
    keep = torch.zeros_like(mass, dtype=torch.bool).scatter_(2, top, True)
    return keep | always[:, None]
