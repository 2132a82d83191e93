"""Which token of a row is which stretch of which sound, in seconds from the sound's start."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.tokens.regions import Span


@dataclass(frozen=True, eq=False)
class Heard:
    """The audio tokens of one sound: their positions, and the seconds (start, end) that each
    covers."""

    positions: Int[Tensor, " token"]
    seconds: Float[Tensor, "token 2"]

    def covered(self, span: Span) -> Float[Tensor, " token"]:
        """The fraction of each token's stretch that a span covers."""
        start, end = self.seconds.unbind(1)
        common = end.clamp(max=span.end) - start.clamp(min=span.start)
        return (common.clamp(min=0) / (end - start)).float()

    def moved(self, by: int) -> "Heard":
        """The same in a row that begins `by` positions later."""
        return replace(self, positions=self.positions + by)


def heard(
    positions: Int[Tensor, " token"], seconds: Float[Tensor, "token 2"], length: float
) -> Heard:
    """The tokens of a sound of `length` seconds: those that begin after its end hear padding, and
    are left out."""
    inside = (seconds[:, 0] < length) & (seconds[:, 1] > seconds[:, 0])
    return Heard(positions[inside], seconds[inside].clamp(max=length))


def positions_of(heard_sounds: list[Heard]) -> Int[Tensor, " token"]:
    """The positions of all these sounds' tokens, ascending."""
    none = torch.empty(0, dtype=torch.long)
    return torch.cat([none, *(sound.positions for sound in heard_sounds)]).sort().values
