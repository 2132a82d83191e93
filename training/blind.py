"""Pressure to read at the question's rows: the rows behind a question do not see the picture, so
that its own tokens have to fetch what is asked. And head dropout, so that no single head does it
all.

A blind batch also asks the question's last token for the answer, which its other losses alone do
not make it hold for hundreds of steps. All this is a cause of what is then found in the model, and
its card says so.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Sight:
    """The mask of the batch that runs; `mask()` is what `fast_training` asks for.

    Args:
        tokenizer: with the chat template's "<|im_start|>", "user" and "<|im_end|>".
        visual: the picture's token id.
    """

    def __init__(self, tokenizer: Any, visual: int) -> None:
        self._start, self._user, self._end = tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "user", "<|im_end|>"]
        )
        self._visual = visual
        self._mask: Tensor | None = None

    def mask(self) -> Tensor | None:
        """[batch, 1, row, column], True where a row sees a column; None: causality alone."""
        return self._mask

    def open(self) -> None:
        """Every row sees what stands before it."""
        self._mask = None

    def close(self, ids: Tensor) -> None:
        """Rows that are no question's do not see the picture. `ids` [batch, pos]."""
        visual = ids == self._visual
        hides = ~(self.asked(ids) | visual)[:, :, None] & visual[:, None, :]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        self._mask = (causal & ~hides)[:, None]

    def asked(self, ids: Tensor) -> Tensor:
        """[batch, pos]: True at the words of the user's turns, behind the picture."""
        marks = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(ids.tolist()):
            inside = False
            for i, token in enumerate(tokens):
                if token == self._end:
                    inside = False
                marks[row, i] = inside and token != self._visual
                if token == self._visual:  # what stood before the picture asks nothing
                    marks[row, :i] = False
                if i and tokens[i - 1] == self._start:
                    inside = token == self._user
        return marks


def answered_at(asked: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For the last token of every question, its row in the batch, its position, and the position of
    its answer.

    Args:
        asked: [batch, pos], as `Sight.asked` gives it. answers: [batch, pos], True where an answer
            stands.
    """
    ends = asked & ~torch.nn.functional.pad(asked[:, 1:], (0, 1))
    triples = []
    for row, position in ends.nonzero().tolist():
        behind = answers[row, position:].nonzero()
        if len(behind):
            triples.append((row, position, position + int(behind[0])))
    rows, positions, golds = (
        torch.tensor(triples, dtype=torch.long, device=asked.device).view(-1, 3).unbind(1)
    )
    return rows, positions, golds


def share_blind(step: int, share: float, opens: int, opened: int) -> float:
    """Of the batches of questions: `share` until step `opens`, then falling to none at step
    `opened`."""
    if not share or step >= opened:
        return 0.0
    return share * min(1.0, (opened - step) / max(1, opened - opens))


def is_blind(step: int, seed: int, share: float) -> bool:
    """Whether the batch of a step is blind; the same after a resumed start."""
    return bool(np.random.default_rng((seed, step, 7)).random() < share)


class HeadDropout:
    """Whole heads whose output is left out of a sample, `share` of them, the others scaled up;
    `share` may change."""

    def __init__(self, decoder: Any, heads: int, share: float = 0.0) -> None:
        self.share, self._heads = share, heads
        self._hooks = [
            layer.self_attn.o_proj.register_forward_pre_hook(self._drop) for layer in decoder.layers
        ]

    def _drop(self, module: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if not self.share or not torch.is_grad_enabled():
            return None
        (z,) = args
        scale = (torch.rand(len(z), 1, self._heads, 1, device=z.device) >= self.share).to(
            z.dtype
        ) / (1 - self.share)
        return ((z.unflatten(-1, (self._heads, -1)) * scale).flatten(-2),)

    def close(self) -> None:
        """Drop no longer."""
        for hook in self._hooks:
            hook.remove()
