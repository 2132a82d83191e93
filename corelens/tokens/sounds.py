"""The audio tokens of a sound, and the seconds from the sound's start that each covers."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.tokens.regions import Span


@dataclass(frozen=True, eq=False)
class SoundTokens:
    """The audio tokens of one sound: their positions, and the seconds (start, end) that each
    covers."""

    positions: Int[Tensor, " token"]
    seconds: Float[Tensor, "token 2"]

    def covered(self, span: Span) -> Float[Tensor, " token"]:
        """The fraction of each token's stretch that a span covers."""
        start, end = self.seconds.unbind(1)
        common = end.clamp(max=span.end) - start.clamp(min=span.start)
        return (common.clamp(min=0) / (end - start)).float()

    def moved(self, by: int) -> "SoundTokens":
        """These tokens with positions that are larger by `by`: of a padded row."""
        return replace(self, positions=self.positions + by)


def tokens_of_sound(
    positions: Int[Tensor, " token"], seconds: Float[Tensor, "token 2"], length: float
) -> SoundTokens:
    """The tokens of a sound of `length` seconds, without those that begin after its end (these
    encode padding)."""
    inside = (seconds[:, 0] < length) & (seconds[:, 1] > seconds[:, 0])
    return SoundTokens(positions[inside], seconds[inside].clamp(max=length))


def positions_of(heard_sounds: list[SoundTokens]) -> Int[Tensor, " token"]:
    """The positions of all these sounds' tokens, ascending."""
    none = torch.empty(0, dtype=torch.long)
    return torch.cat([none, *(sound.positions for sound in heard_sounds)]).sort().values
