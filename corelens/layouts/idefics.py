"""Idefics3 and SmolVLM: tiles of a scaled and squashed picture row by row, then the whole picture;
shuffled patches."""

import math
from collections.abc import Sequence
from typing import Any

from corelens.errors import CorelensError
from corelens.layouts.base import Layout, edge, grid, image_option, in_frames, patches, shrunk_to
from corelens.tokens.cells import THUMBNAIL, Cells

MAX_SIDE = 4096  # transformers' MAX_IMAGE_SIZE


class Idefics3(Layout):
    """A view has (tile / patch / scale_factor)² tokens."""

    model_types = ("idefics3",)
    first_position = 0

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """Tiles divide the picture evenly: it is squashed onto whole tiles."""
        (width, height), rows, columns = size, 0, 0
        tile = edge(image_option(processor, features, "max_image_size"), "longest_edge")
        if image_option(processor, features, "do_image_splitting"):
            longest = edge(image_option(processor, features, "size"), "longest_edge")
            resized = image_option(processor, features, "do_resize") is not False
            rows, columns = _tiles(*(_scaled(width, height, longest) if resized else size), tile)
        whole, n = (0.0, 0.0, float(width), float(height)), _side(config, tile)
        views = [whole]
        if rows * columns > 1:
            x, y = width / columns, height / rows
            views = [
                (c * x, r * y, c * x + x, r * y + y) for r in range(rows) for c in range(columns)
            ] + [whole]
        shrunk = shrunk_to(size, (max(columns, 1) * tile, max(rows, 1) * tile))
        numbers = [*range(len(views) - 1), THUMBNAIL]
        return patches(*(grid(n, n, *view) for view in views), shrunk=shrunk, views=numbers)


class SmolVLM(Idefics3):
    """As Idefics3; frames of a video are not tiled and stand under the image token."""

    model_types = ("smolvlm",)

    def placeholders(self, config: Any) -> tuple[int, int]:
        """Frames use the image token."""
        return config.image_token_id, config.image_token_id

    def check_batch(self, pictures: Sequence[Sequence[Any]]) -> None:
        """Its processor gives frames under the images' name, and writes the longest video's length
        into all prompts."""
        lengths = {
            len(picture) if isinstance(picture, list) else 0 for row in pictures for picture in row
        }
        if len(lengths) > 1:
            raise CorelensError(
                "a batch of "
                + ("images and videos" if 0 in lengths else f"videos of {sorted(lengths)} frames"),
                "images only, or videos of one length: this processor mixes others up",
                "prepare them in batches of their own",
            )

    def video_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
        n_frames: int,
    ) -> Cells:
        """One view a frame."""
        side = _side(config, edge(processor.video_processor.max_image_size, "longest_edge"))
        return in_frames(grid(side, side, 0, 0, *size), n_frames)


def _side(config: Any, tile: int) -> int:
    """Tokens along a side of a view."""
    return tile // config.vision_config.patch_size // config.scale_factor


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height after the long edge was scaled, up or down, to `longest`; the short one is
    made even."""
    long, short = max(width, height), min(width, height)
    short = int(longest / (width / height)) if width >= height else int(longest * (width / height))
    short, long = max(short + short % 2, 1), longest
    if long > MAX_SIDE:
        short, long = max(int(MAX_SIDE * short / long), 1), MAX_SIDE
    return (long, short) if width >= height else (short, long)


def _tiles(width: int, height: int, tile: int) -> tuple[int, int]:
    """Rows and columns of tiles: the long side up to whole tiles, the short one with it, then up to
    whole tiles."""
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / (width / height)) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * (width / height)) / tile)
