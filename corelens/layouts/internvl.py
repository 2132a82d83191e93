"""InternVL: tiles on the grid of the closest aspect ratio, then a thumbnail; 2 × 2 patches shuffled
into a token."""

from typing import Any

from corelens.layouts.base import Layout, edge, grid, image_option, in_frames, patches, shrunk_to
from corelens.tokens.cells import THUMBNAIL, Cells


class InternVL(Layout):
    """InternVL 3 and 3.5 in transformers' format. Frames of a video stand under the image token,
    one view each."""

    model_types = ("internvl",)
    first_position = 0

    def placeholders(self, config: Any) -> tuple[int, int]:
        """Frames use the image token."""
        return config.image_token_id, config.image_token_id

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """Tiles row by row, then the whole picture once more if there is more than one tile."""
        (width, height), side, columns, rows = size, _side(config), 1, 1
        pixels = image_option(processor, features, "size")
        tile = edge(pixels, "width"), edge(pixels, "height")
        if image_option(processor, features, "crop_to_patches"):
            least = image_option(processor, features, "min_patches")
            columns, rows = _tiles(
                size, tile, least, image_option(processor, features, "max_patches")
            )
        x, y = width / columns, height / rows
        views = [(c * x, r * y, c * x + x, r * y + y) for r in range(rows) for c in range(columns)]
        numbers = list(range(len(views)))
        if len(views) > 1:
            views.append((0, 0, width, height))
            numbers.append(THUMBNAIL)
        shrunk = shrunk_to(size, (columns * tile[0], rows * tile[1]))
        return patches(*(grid(side, side, *view) for view in views), shrunk=shrunk, views=numbers)

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
        return in_frames(grid(_side(config), _side(config), 0, 0, *size), n_frames)


def _side(config: Any) -> int:
    """Tokens along a side of a view."""
    vision = config.vision_config
    return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio)


def _tiles(size: tuple[int, int], tile: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """Columns and rows of the ratio closest to the picture's; of equals the larger, unless twice
    too large."""
    (width, height), best, distance = size, (1, 1), float("inf")
    counts = range(1, most + 1)
    grids = sorted(
        ((c, r) for c in counts for r in counts if least <= c * r <= most),
        key=lambda g: g[0] * g[1],
    )
    for columns, rows in grids:
        far = abs(width / height - columns / rows)
        large_enough = width * height > 0.5 * tile[0] * tile[1] * columns * rows
        if far < distance or (far == distance and large_enough):
            best, distance = (columns, rows), far
    return best
