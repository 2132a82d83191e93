"""Which positions a name means: "question", "last+answer", 17, [3, 4] … for every sample of the
running batch.

Hooks are made before any input exists; a name is looked up when they run, in the token maps of the
running batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.token_map import check_name

Where = str | int | Sequence[int] | Tensor  # a name, or positions in the padded row


def check_where(where: Where) -> Where:
    """The same, after checking what can be checked before any input exists: that names are known,
    numbers whole."""
    if isinstance(where, str):
        for name in where.split("+"):
            check_name(name.strip())
        return where
    try:
        numbers = torch.as_tensor(where)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0, dtype=torch.bool)
    wrong = numbers.dtype == torch.bool or (numbers.is_floating_point() and numbers.numel() > 0)
    if wrong or (numbers.ndim < 2 and bool((numbers < 0).any())):
        raise CorelensError(
            f"the positions {str(where)[:60]}",
            "a name such as 'question', or whole numbers from 0, counted in the padded row",
            "token maps give both; for the last row say 'last', for a boolean mask give "
            "mask.nonzero()[:, 0]",
        )
    return where


def resolve(
    where: Where, inputs: Any, new: Int[Tensor, " pos"], batch: int, rows: bool
) -> Int[Tensor, "batch n"]:
    """The positions that `where` means, one line a sample, −1 where a sample has fewer than
    another.

    Args:
        where: a name of TokenMap.positions, or positions: one list for all samples, or [batch, n]
            with −1 as padding.
        inputs: the running batch (its `token_maps` are read), or None when the model runs on bare
            tensors.
        new: the positions of this step's tokens; those past the prompt were generated.
        batch: how many sequences run (a multiple of the samples when each is sampled several
            times).
        rows: look for rows: "answer" then means the rows that predict the answer, generated ones
            included.
    """
    if not isinstance(where, str):
        numbers = torch.as_tensor(where, dtype=torch.long)
        numbers = numbers.reshape(1, -1).expand(batch, -1) if numbers.ndim < 2 else numbers
        if numbers.shape[0] != batch:
            raise CorelensError(
                f"positions for {numbers.shape[0]} samples",
                f"{batch} lines, one a sample of the batch",
                "give [batch, n]",
            )
        return numbers.to(new.device)
    token_maps = getattr(inputs, "token_maps", None)
    if not token_maps:
        raise CorelensError(
            f"the position name {where!r} in a run on bare tensors",
            "inputs whose token maps say where it is",
            "run on model.prepare(sample), or give positions as numbers",
        )
    rows_of_samples = [
        _line(where, token_maps[i * len(token_maps) // batch], new, rows) for i in range(batch)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows_of_samples, batch_first=True, padding_value=-1).to(
        new.device
    )


def _line(where: str, token_map: Any, new: Tensor, rows: bool) -> Int[Tensor, " n"]:
    named = token_map.positions(where, rows=rows)
    names = {name.strip() for name in where.split("+")}
    if names & {"answer", "all", "text"}:  # tokens that were generated come after the prompt
        # (a generated token is text of the answer; as a row it predicts the next one)
        named = torch.cat([named, new[new >= token_map.length].to(named.device)])
    return named


def within(positions: Int[Tensor, "batch n"], new: Int[Tensor, " pos"]) -> Int[Tensor, "batch m"]:
    """Keep those of this step's tokens (the others become −1), packed to the left."""
    keep = (positions >= new[0]) & (positions <= new[-1])
    packed = [line[mask] for line, mask in zip(positions, keep, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(packed, batch_first=True, padding_value=-1)


def member(positions: Int[Tensor, "batch n"], length: int) -> Tensor:
    """A boolean table [batch, length]: is this position among them?"""
    table = torch.zeros(positions.shape[0], length + 1, dtype=torch.bool, device=positions.device)
    # the last column is thrown away
    inside = torch.where((positions >= 0) & (positions < length), positions, length)
    return table.scatter_(1, inside, True)[:, :length]


def with_positions(inputs: Any, first: int | None) -> Any:
    """The same batch; padded on the left, it gets position ids that count each row's own tokens
    from `first`.

    A model that is given none counts the padding too: its logits are the same (rotary is relative),
    but rotated q and k are then not those of the sample run alone.
    """
    mask = inputs.tensors["attention_mask"]
    if first is None or bool(mask[:, 0].all()):
        return inputs
    positions = (mask.cumsum(-1) - 1).clamp(min=0) + first
    return replace(inputs, tensors={**inputs.tensors, "position_ids": positions})
