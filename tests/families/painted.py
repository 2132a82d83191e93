"""Whether a token map is right: paint where a token's cell is, and see which token moves.

Cells of each view are painted: those in its corners, the middle one, one at an edge. Of all tokens
of that view, the one that moves most at the decoder's first layer (attention in the tower off) must
be the cell's own. (Views that the map does not tell apart are told by the size of their cells.)
The same is asked of the map with every cell moved to its neighbour's place: a
check that let that pass would say nothing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

import corelens as cl
from corelens.hf import attention_off
from corelens.model.probing import first_layer_input, tower_modules

SIZE = (224, 160)
INNER = 0.9  # of a cell's width and height, what is painted of it
ALIKE = 0.4  # of two cells of one view: how far the logarithms of their sides lie apart, at most
SAME = 0.6  # the overlap from which on two tokens share a cell (queries of one window do)
VIEWS = 3  # at most so many: the first, one between, the last

Box = tuple[float, ...]


@dataclass(frozen=True)
class Painted:
    """Of how many painted cells the own token moved most, of the map and of the map shifted by
    one."""

    cells: int
    right: int
    shifted: int
    shifted_right: int

    @property
    def holds(self) -> bool:
        """Whether every cell is right, and no cell of the shifted map is."""
        return 0 < self.cells == self.right and not self.shifted_right


def painted(model: Any, size: tuple[int, int] = SIZE) -> Painted:
    """Paint cells of a picture of this size where the model's token map has them, and where the
    shifted map has them. The model needs its processor."""
    canvas = Canvas(model, size)
    (picture,) = canvas.token_map._pictures()
    box = picture.box
    views = torch.zeros(len(box), dtype=torch.long) if picture.views is None else picture.views
    right = [canvas.moves_most(token, box, views) for token in chosen_tokens(box, views)]
    moved = shifted(box, views)
    shifted_right = [
        canvas.moves_most(token, moved, views)
        for token in chosen_tokens(box, views)
        if not torch.equal(moved[token], box[token])
    ]
    return Painted(len(right), sum(right), len(shifted_right), sum(shifted_right))


def smooth(size: tuple[int, int]) -> Image.Image:
    """A picture without edges."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(70, 186, (size[1] // 16 + 1, size[0] // 16 + 1, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


class Canvas:
    """A picture in the model's prompt, and how far each visual token moves when a part of it is
    painted."""

    def __init__(self, model: Any, size: tuple[int, int]):
        self.model, self.plain = model, np.asarray(smooth(size)).astype(np.int16)
        self.decoder = model.layout.decoder(model.hf)
        self.token_map = self._prepared(self.plain).token_maps[0]
        self.before = self._seen(self.plain)
        self.most = self._moved(slice(None), slice(None)).clamp(min=1e-9)
        self.moves: dict[Box, Float[Tensor, " token"]] = {}

    def moves_most(
        self, token: int, box: Float[Tensor, "token 4"], views: Int[Tensor, " token"]
    ) -> bool:
        """Whether painting this token's box moves it more than any other of its view and size, each
        compared with how far it moves when the whole picture is painted."""
        extent = box[:, 2:] - box[:, :2]
        alike = ((extent / extent[token]).log().abs() < ALIKE).all(1) & (views == views[token])
        others = alike.nonzero()[:, 0]
        moves = self._moved_by(tuple(box[token].tolist()))[others]
        most = others[int(moves.argmax())]
        return float(moves.max()) > 0 and _overlap(box[most], box[token]) > SAME

    def _moved_by(self, box: Box) -> Float[Tensor, " token"]:
        if box not in self.moves:
            x0, y0, x1, y1 = box
            width, height = (x1 - x0) * (1 - INNER) / 2, (y1 - y0) * (1 - INNER) / 2
            rows = slice(round(y0 + height), max(round(y1 - height), round(y0 + height) + 1))
            columns = slice(round(x0 + width), max(round(x1 - width), round(x0 + width) + 1))
            self.moves[box] = self._moved(rows, columns) / self.most
        return self.moves[box]

    def _moved(self, rows: slice, columns: slice) -> Float[Tensor, " token"]:
        pixels = self.plain.copy()
        pixels[rows, columns] += _noise(pixels.shape)[rows, columns]
        return (self._seen(pixels) - self.before).float().norm(dim=-1)

    def _prepared(self, pixels: np.ndarray) -> Any:
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        return self.model.prepare(cl.Sample([picture], "What is it?"))

    def _seen(self, pixels: np.ndarray) -> Float[Tensor, "token d_model"]:
        tensors = self._prepared(pixels).tensors
        with attention_off(tower_modules(self.model.hf, self.decoder)), torch.no_grad():
            x = first_layer_input(self.model.hf, self.decoder, tensors)
        return x[0, self.token_map.visual]


def sample_of(size: tuple[int, int] = SIZE) -> cl.Sample:
    """A question about such a picture, with a region in its middle and an answer."""
    x, y = size[0] // 2, size[1] // 2
    region = cl.Box(x - 12, y - 12, x + 12, y + 12)
    return cl.Sample([smooth(size)], "What is it?", answer="7", regions=[region])


def chosen_tokens(box: Float[Tensor, "token 4"], views: Int[Tensor, " token"]) -> list[int]:
    """Of each of some views the tokens in the corners, the middle, and the middle of an edge."""
    numbers = views.unique(sorted=True).tolist()
    numbers = sorted({numbers[i * (len(numbers) - 1) // max(VIEWS - 1, 1)] for i in range(VIEWS)})
    chosen: list[int] = []
    for number in numbers:
        tokens = ((views == number) & (box[:, 2] > box[:, 0])).nonzero()[:, 0]
        middle = (box[tokens, :2] + box[tokens, 2:]) / 2
        low, high = middle.min(0).values, middle.max(0).values
        centre = (low + high) / 2
        spots = [low, high, torch.stack([low[0], high[1]]), torch.stack([high[0], low[1]]),
                 centre, torch.stack([centre[0], low[1]])]  # fmt: skip
        for spot in spots:
            token = int(tokens[int((middle - spot).norm(dim=1).argmin())])
            chosen += [token] * (token not in chosen)
    return chosen


def shifted(
    box: Float[Tensor, "token 4"], views: Int[Tensor, " token"]
) -> Float[Tensor, "token 4"]:
    """Each token in the place of its neighbour: the next cell of its view to the right, at the
    right border the one to the left; where a view is one cell wide, below or above."""
    middle, extent = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]
    moved = box.clone()
    for token in (extent[:, 0] > 0).nonzero()[:, 0].tolist():
        apart = (middle - middle[token]) / extent[token]  # in cells
        apart[(views != views[token]) | (extent[:, 0] <= 0)] = torch.inf
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            steps = sign * apart[:, axis]
            beside = (apart[:, 1 - axis].abs() < 0.5) & (steps > 0.5) & steps.isfinite()
            if bool(beside.any()):
                nearest = int(steps.masked_fill(~beside, torch.inf).argmin())
                moved[token] = box[nearest]
                break
    return moved


def _overlap(a: Float[Tensor, "4"], b: Float[Tensor, "4"]) -> float:
    """Intersection over union of two boxes."""
    inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0).prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    """Blocks of 4 pixels, a colour each."""
    rng = np.random.default_rng(0)
    blocks = rng.choice([-64, 64], (-(-shape[0] // 4), -(-shape[1] // 4), 3)).astype(np.int16)
    return np.kron(blocks, np.ones((4, 4, 1), dtype=np.int16))[: shape[0], : shape[1]]
