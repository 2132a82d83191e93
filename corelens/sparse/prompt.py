"""What a sparse plan knows of the running batch: where the real tokens of the prompt begin and
end."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from corelens.errors import CorelensError


@dataclass
class Prompt:
    """The prompt of a running batch, in positions of the padded row. Real tokens stand together:
    padding is outside.

    Args:
        first: of each sample, the position of its first real token.
        end: of each sample, the position behind its last real token of the prompt.
        length: of the padded row; positions from there on were generated.
        pictures: for each position the number of its image, or of its group of frames; −1 on text
            and padding; None where nothing says so.
        notes: what a pattern keeps from layer to layer of this run.
    """

    first: Int[Tensor, " batch"]
    end: Int[Tensor, " batch"]
    length: int
    pictures: Int[Tensor, "batch pos"] | None = None
    notes: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> "Prompt":
        """The same on a layer's device (its notes shared)."""
        pictures = None if self.pictures is None else self.pictures.to(device)
        first, end = self.first.to(device), self.end.to(device)
        return replace(self, first=first, end=end, pictures=pictures)

    @property
    def padded(self) -> bool:
        """Whether any sample has padding."""
        return bool((self.first > 0).any() or (self.end < self.length).any())


def prompt_of(inputs: Any, new: int, batch: int, device: torch.device) -> Prompt:
    """Read the prompt off a running batch; `new` is how many tokens its first step has."""
    tensors = getattr(inputs, "tensors", {})
    mask, ids = tensors.get("attention_mask"), tensors.get("input_ids")
    length = new if ids is None else ids.shape[1]
    if mask is None:
        every = torch.zeros(batch, dtype=torch.long, device=device)
        return Prompt(every, every + length, length, _pictures(inputs, length, batch, device))
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CorelensError(
            f"an attention mask of shape {list(getattr(mask, 'shape', []))} under sparse inference",
            "one of [batch, pos]: which tokens are real; causality is the model's, sparsity the "
            "pattern's",
            "give the mask that the processor makes",
        )
    real = mask.bool().to(device)
    # each sample sampled several times
    real = real.repeat_interleave(batch // real.shape[0], dim=0)
    length = real.shape[1]
    first = real.int().argmax(dim=1)
    end = length - real.int().flip(1).argmax(dim=1)
    if not torch.equal(real.sum(1), end - first):
        raise CorelensError(
            "an attention mask with holes under sparse inference",
            "padding on the left or on the right only",
            "leave the tokens out that are not to be seen, or cut the edges to them with "
            "cl.knockout",
        )
    return Prompt(first, end, length, _pictures(inputs, length, batch, device))


def _pictures(
    inputs: Any, length: int, batch: int, device: torch.device
) -> Int[Tensor, "batch pos"] | None:
    """Which picture each position is of, as far as the inputs say it."""
    token_maps = getattr(inputs, "token_maps", None)
    if not token_maps or any(tm.pictures is None for tm in token_maps):
        return None
    numbers = torch.full((len(token_maps), length), -1, dtype=torch.long)
    for sample, token_map in enumerate(token_maps):
        count = 0
        for picture in token_map.pictures:
            if picture.frames is None:
                numbers[sample, picture.positions] = count
                count += 1
            else:  # tokens of the same frames belong together
                _, group = picture.frames[:, 0].unique(return_inverse=True)
                numbers[sample, picture.positions] = count + group
                count += int(group.max()) + 1
    return numbers.repeat_interleave(batch // len(token_maps), dim=0).to(device)
