"""BlockSparse: XAttention's choice of blocks (Xu et al. 2025, arXiv 2503.16428)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from corelens.errors import CorelensError
from corelens.hooks.rows import Call
from corelens.sparse.patterns import at_least
from corelens.sparse.prompt import Prompt
from corelens.sparse.visible import MaskMod


@dataclass(frozen=True)
class BlockSparse:
    """XAttention: each head attends to the blocks of keys whose antidiagonals score highest.

    Every `stride` queries and every `stride` keys make one number, the mean score along the
    antidiagonal of their square (each token of either side takes part in exactly one pair): S[i, j]
    = Σ_p q[stride·i + stride − 1 − p] · k[stride·j + p] · scaling / stride, for j ≤ i. After a
    softmax over j, the sum of S over a block of queries × a block of keys estimates that block's
    mass. A block of queries sees the first block, its own, and of the others the heaviest, until
    `threshold` of the mass is seen. Within a block the model's own mask holds. Blocks are counted
    from the first real token; a head never looks ahead.

    Args:
        block: how many tokens a side of a block has, a multiple of `stride`.
        threshold: how much of the estimated mass is to be seen, above 0, at most 1.
        stride: how many tokens a side of a square has that makes one number.
    """

    block: int = 128
    threshold: float = 0.9
    stride: int = 16

    def __post_init__(self) -> None:
        at_least("stride", self.stride, 1, "the paper takes 8 or 16")
        at_least("block", self.block, self.stride, "the paper takes 128")
        if self.block % self.stride:
            raise CorelensError(
                f"block={self.block} and stride={self.stride}",
                "a multiple of the stride",
                "take 128",
            )
        if not 0 < self.threshold <= 1:
            raise CorelensError(
                f"threshold={self.threshold!r}", "a share above 0, at most 1", "the paper takes 0.9"
            )

    def sees(self, prompt: Prompt, query: Tensor, key: Tensor, call: Call) -> MaskMod:
        """The pattern for this prompt, as a function of index tensors: which block of queries sees
        which block of keys."""
        if query.shape[2] != prompt.length:
            raise CorelensError(
                f"BlockSparse in a step of {query.shape[2]} of {prompt.length} tokens",
                "the whole prompt in one step",
                "run without prefill_chunk_size",
            )
        blocks = -(-prompt.length // self.block)
        table = torch.zeros(
            query.shape[0], query.shape[1], blocks, blocks, dtype=torch.bool, device=query.device
        )
        group = query.shape[1] // key.shape[1]
        for sample, (first, end) in enumerate(
            zip(prompt.first.tolist(), prompt.end.tolist(), strict=True)
        ):
            for head in range(query.shape[1]):
                q = query[sample, head, first:end].detach()
                k = key[sample, head // group, first:end].detach()
                seen_blocks = self.choose(q, k, call.scaling)
                table[sample, head, : len(seen_blocks), : len(seen_blocks)] = seen_blocks

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            block_indices = (
                ((x - prompt.first[b]) // self.block).clamp(0, blocks - 1) for x in (q, k)
            )
            return table[b, h, *block_indices]

        return mask_mod

    def choose(
        self, query: Float[Tensor, "pos d"], key: Float[Tensor, "pos d"], scaling: float
    ) -> Bool[Tensor, "block block"]:
        """Which blocks of keys one head's blocks of queries see."""
        groups, blocks = -(-len(query) // self.stride), -(-len(query) // self.block)
        missing = groups * self.stride - len(query)
        q, k = (
            pad(x.float(), (0, 0, 0, missing)).unflatten(0, (groups, self.stride))
            for x in (query, key)
        )
        score = q.flip(1).flatten(1) @ k.flatten(1).T * (scaling / self.stride)
        later = torch.ones(groups, groups, dtype=torch.bool, device=score.device).triu(1)
        mass = score.masked_fill(later, -torch.inf).softmax(dim=-1)
        a_side, missing = self.block // self.stride, blocks * self.block // self.stride - groups
        mass = (
            pad(mass, (0, missing, 0, missing))
            .unflatten(0, (blocks, a_side))
            .unflatten(2, (blocks, a_side))
        )
        mass = mass.sum((1, 3), dtype=torch.float64)
        always = torch.eye(blocks, dtype=torch.bool, device=mass.device)
        always[:, 0] = True
        seen_already = (mass * always).sum(-1, keepdim=True)
        rest, order = (mass * ~always).sort(dim=-1, descending=True)
        before = seen_already + rest.cumsum(-1) - rest  # what is seen before this block is taken
        taken = (before < self.threshold * mass.sum(-1, keepdim=True)) & (rest > 0)
        return always.scatter(1, order, taken) | always
