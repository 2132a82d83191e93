"""What the heads of one layer see in one step: full heads everything, the others what their pattern
leaves."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.sparse.prompt import Prompt

# (b, h, q_idx, kv_idx) → bool, index tensors broadcast
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Visible:
    """Which keys the rows of one call may see under a sparse pattern. (The model's own mask hides
    keys in addition.)

    Args:
        full: whether each head is full, so that the pattern does not apply to it.
        pattern: of the other heads: a Streaming, BlockSparse, Pruned or a function.
        sees: the pattern for this step, as a function (b, h, q_idx, kv_idx) → bool; None: the other
            heads see nothing.
        prompt: where the prompt's real tokens are.
        rows: positions of this step's tokens.
        keys: positions of the keys.
        batch: how many samples run.
        ran: engines add their name here when they compute this call.
    """

    full: Bool[Tensor, " head"]
    pattern: object
    sees: MaskMod | None
    prompt: Prompt
    rows: Int[Tensor, " pos"]
    keys: Int[Tensor, " key"]
    batch: int
    ran: set[str] = field(default_factory=set)

    def __call__(
        self, rows: Tensor | None, heads: Tensor | None
    ) -> Bool[Tensor, "#b #h #row #key"]:
        """The mask of visible keys, for these rows (counted within this step, [batch, row]) and
        heads; None: all. An axis has size 1 where all its entries are equal."""
        heads = torch.arange(len(self.full), device=self.full.device) if heads is None else heads
        full = self.full[heads][None, :, None, None]
        seen = self.pattern_of(heads, self.rows[None] if rows is None else self.rows[rows])
        return full if seen is None else full | seen

    def pattern_of(
        self, heads: Int[Tensor, " some"], positions: Int[Tensor, "_ row"]
    ) -> Bool[Tensor, "#n #some #row key"] | None:
        """The mask of the pattern alone, for rows at these positions; None if it shows no key. The
        head axis has size 1 if all heads see the same."""
        if self.sees is None:
            return None
        sample = torch.arange(self.batch, device=positions.device)[:, None, None, None]
        seen = self.sees(
            sample,
            heads[None, :, None, None],
            positions[:, None, :, None],
            self.keys[None, None, None],
        )
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            raise CorelensError(
                f"a pattern that returned {getattr(seen, 'dtype', type(seen).__name__)}",
                "a bool tensor, made of the index tensors (b, h, q_idx, kv_idx) as they broadcast",
                "write it as a FlexAttention mask_mod, for example lambda b, h, q, k: q - k < 512",
            )
        return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)

    @property
    def sparse_heads(self) -> Int[Tensor, " some"]:
        """The heads that follow the pattern."""
        return (~self.full).nonzero()[:, 0]

    @property
    def full_heads(self) -> Int[Tensor, " some"]:
        """The heads that see all."""
        return self.full.nonzero()[:, 0]
