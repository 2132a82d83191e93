"""What each placeholder token of a picture covers, and how much of it a region covers.

Boxes are in pixels of the original picture: x0, y0, x1, y1.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.regions import Region, Shape, Span, Tube
from corelens.tokens.sounds import SoundTokens

# the number of the view that shows the whole picture, beside tiles that show parts of it
THUMBNAIL = -1


@dataclass
class Cells:
    """What the placeholder tokens of one picture or video cover, in the order in which they stand
    in the prompt.

    Args:
        box: x0, y0, x1, y1 in pixels of the original picture (of each frame, for a video).
        visual: False for placeholders that are no patch (newline, separator); their box means
            nothing.
        frames: for a video, the frames each token covers; −1 pads.
        shrunk: width and height to which the picture had to be shrunk because it exceeds the
            processor's limit.
        views: for a picture that is shown in several views, the number of each token's tile, from 0
            in the order in which they stand in the prompt, THUMBNAIL (−1) where it is a token of
            the whole picture.
    """

    box: Float[Tensor, "token 4"]
    visual: Bool[Tensor, " token"]
    frames: Int[Tensor, "token frame"] | None = None
    shrunk: tuple[int, int] | None = None
    views: Int[Tensor, " token"] | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """The visual tokens of one image or video: their positions and boxes; frames and views as in
    Cells."""

    positions: Int[Tensor, " token"]
    box: Float[Tensor, "token 4"]
    frames: Int[Tensor, "token frame"] | None = None
    views: Int[Tensor, " token"] | None = None

    def covered(self, region: Shape) -> Float[Tensor, " token"]:
        """The fraction of each token's cell that a region covers; over a video, the mean over the
        token's frames."""
        boxes = [tuple(box) for box in self.box.tolist()]
        if self.frames is None:
            return torch.tensor([_fraction(region, box) for box in boxes], dtype=torch.float32)
        means = []
        for box, row in zip(boxes, self.frames.tolist(), strict=True):
            fractions = [_fraction(region, box, frame) for frame in row if frame >= 0]  # (−1 pads)
            means.append(sum(fractions) / len(fractions))
        return torch.tensor(means, dtype=torch.float32)


def covered_tokens(
    pictures: list[Picture],
    regions: Iterable[Region],
    weights: Literal["touch", "fraction"],
    label: str = "the sample",
    sounds: Sequence[SoundTokens] = (),
) -> list[tuple[Tensor, Tensor]]:
    """Per region the positions of the tokens whose cell it touches, in every view and frame, and
    their weights.

    Errors: a region that touches no token (a processor that crops the border away, for instance).
    """
    images = [picture for picture in pictures if picture.frames is None]
    videos = [picture for picture in pictures if picture.frames is not None]
    result = []
    for region in regions:
        picture: Any
        if isinstance(region, Span):
            picture = sounds[region.audio]
        else:
            picture = (videos if isinstance(region, Tube) else images)[region.image]
        fraction = picture.covered(region)
        touched = fraction > 1e-9  # less is rounding at the common edge of a region and a cell
        if not touched.any():
            raise CorelensError(
                f"{label}: {_short(region)} covers no "
                f"{'audio' if isinstance(region, Span) else 'visual'} token",
                "a region that the model can see or hear",
                "look at inputs.show(): this model's processor may crop the picture's border away",
            )
        positions, order = picture.positions[touched].sort()
        result.append(
            (
                positions,
                fraction[touched][order] if weights == "fraction" else torch.ones(len(positions)),
            )
        )
    return result


def _fraction(region: Shape, box: tuple[float, ...], frame: int | None = None) -> float:
    if not (box[2] > box[0] and box[3] > box[1]):  # a token that sees padding only
        return 0.0
    return region.covered((box[0], box[1], box[2], box[3]), frame)


def _short(region: Region) -> str:
    return (
        f"{type(region).__name__} "
        f"{getattr(region, 'bounds', None) or dict(getattr(region, 'boxes', {}))}"
    )
