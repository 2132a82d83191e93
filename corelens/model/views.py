"""Tiles and thumbnail of a picture whose cells were measured: which token belongs to which view."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelens.tokens.cells import THUMBNAIL

WHOLE = 0.9  # of the picture's width and height: what a thumbnail covers


def views_of(
    box: Float[Tensor, "token 4"],
    positions: Int[Tensor, " token"],
    size: tuple[int, int],
) -> Int[Tensor, " token"] | None:
    """The number of each token's tile, from 0 in the order of the prompt, THUMBNAIL where it is a
    token of the whole picture; None where the picture is shown once, or its views cannot be told
    apart.

    Tokens of a view come row by row. A view begins where the next token lies higher up, where rows
    begin to span other columns, or behind other tokens, unless these stand behind every row.

    Args:
        box: the tokens' cells. positions: where they stand in the row. size: of the picture.
    """
    middle = (box[:, 1] + box[:, 3]) / 2
    tall, wide = box[:, 3] - box[:, 1], box[:, 2] - box[:, 0]
    higher = middle.diff() < -tall[1:] / 2
    row = torch.cat([torch.tensor([True]), higher | (middle.diff() > tall[1:] / 2)])
    starts = row.nonzero()[:, 0]
    left = box[starts, 0]
    other_columns = torch.zeros(len(box), dtype=torch.bool)
    other_columns[starts[1:]] = left.diff().abs() > wide[starts[1:]] / 2
    gap = torch.cat([torch.tensor([True]), positions.diff() > 1])
    begins = torch.cat([torch.tensor([True]), higher]) | other_columns
    if int((gap & row).sum()) < len(starts):  # not a break behind every row
        begins |= gap & row
    part = begins.cumsum(0) - 1
    count = int(part[-1]) + 1
    if count == 1:
        return None
    whole = [_covers(box[part == number], size) for number in range(count)]
    if sum(whole) > 1:
        return None
    tiles = [number for number in range(count) if not whole[number]]
    lengths = {int((part == number).sum()) for number in tiles}
    if len(lengths) > 1 or not tiles:  # what was cut is no tile
        return None
    numbers = torch.full((count,), THUMBNAIL)
    numbers[torch.tensor(tiles)] = torch.arange(len(tiles))
    return numbers[part]


def _covers(box: Float[Tensor, "token 4"], size: tuple[int, int]) -> bool:
    extent = box[:, 2:].max(0).values - box[:, :2].min(0).values
    return bool((extent > WHOLE * torch.tensor(size, dtype=extent.dtype)).all())


def all_views(
    box: Float[Tensor, "token 4"],
    visual: Bool[Tensor, " token"],
    positions: Int[Tensor, " token"],
    size: tuple[int, int],
) -> Int[Tensor, " token"] | None:
    """As `views_of`, for all placeholders of a picture, those among them that are no patch too."""
    if int(visual.sum()) < 2:
        return None
    views = views_of(box[visual], positions[visual], size)
    if views is None:
        return None
    numbers = torch.full((len(visual),), THUMBNAIL)
    numbers[visual] = views
    return numbers
