"""Which token is which part of which picture: token maps, regions, positions. Pure geometry, no
model."""

from typing import TYPE_CHECKING, Any

from corelens.tokens.regions import Box, Mask, Tube

if TYPE_CHECKING:
    from corelens.tokens.token_map import TokenMap

__all__ = ["Box", "Mask", "TokenMap", "Tube"]


def __getattr__(name: str) -> Any:
    if name != "TokenMap":
        raise AttributeError(f"module 'corelens.tokens' has no attribute {name!r}")
    from corelens.tokens.token_map import TokenMap  # (it needs torch)

    return TokenMap
