"""LLaVA 1.5, NeXT and OneVision: a centre crop; tiles on a padded canvas with newline tokens;
pooled video."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corelens.hf import ENCODED, visual_features
from corelens.layouts.base import Layout, cross, edge, grid, image_option, patches, shrunk_to
from corelens.tokens.cells import THUMBNAIL, Cells


class Llava(Layout):
    """LLaVA 1.5: the short edge scaled to the tower's size, the centre cropped: the borders are
    lost."""

    model_types = ("llava",)
    first_position = 0

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """One square view; its cells follow the steps of the image processor backwards."""
        (width, height), tower = size, config.vision_config
        left = top = 0
        if image_option(processor, features, "do_pad"):  # to a square, around the middle
            left, top = (max(size) - width) // 2, (max(size) - height) // 2
            width = height = max(size)
        target = image_option(processor, features, "size")
        try:
            short = edge(target, "shortest_edge")
            long = int(short * max(width, height) / min(width, height))
            resized = (long, short) if width > height else (short, long)
        except ValueError:
            resized = edge(target, "width"), edge(target, "height")
        side = tower.image_size // tower.patch_size
        seen = side * tower.patch_size
        crop = [0, 0]
        if image_option(processor, features, "do_center_crop"):
            crop = [int((length - tower.image_size) / 2) for length in resized]
        scale = resized[0] / width, resized[1] / height
        x0, y0 = crop[0] / scale[0] - left, crop[1] / scale[1] - top
        box = grid(side, side, x0, y0, x0 + seen / scale[0], y0 + seen / scale[1])
        return patches(_clip(box, size), shrunk=shrunk_to(size, resized))


class LlavaNext(Layout):
    """The squashed picture, then the best of several canvases in tiles, its padding cut off, a
    newline token a row."""

    model_types = ("llava_next",)
    first_position = 0

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """Base view, then the canvas row by row with a newline (not visual) at the end of each
        row."""
        tile, side, patch = _tower(config)
        base = _squashed(side, tile, patch, size)
        canvas = _best_canvas(size, image_option(processor, features, "image_grid_pinpoints"))
        columns, rows, tiles, scale = _unpadded(size, canvas, tile, side, patch)
        columns, rows = self.pooled(config, columns, rows, side)
        of_column, of_row = _thinned(tiles[0], len(columns)), _thinned(tiles[1], len(rows))
        # newlines: any
        views = of_row[:, None] * (canvas[0] // tile) + nn.functional.pad(of_column, (0, 1))[None]
        box = _clip(cross(columns, rows), size)
        grid_of_boxes = box.reshape(len(rows), len(columns), 4)
        with_newlines = torch.cat(
            [grid_of_boxes, torch.zeros(len(rows), 1, 4, dtype=box.dtype)], dim=1
        ).reshape(-1, 4)
        newline = torch.zeros(len(rows), len(columns) + 1, dtype=torch.bool)
        newline[:, -1] = True
        visual = torch.cat([torch.ones(len(base), dtype=torch.bool), ~newline.reshape(-1)])
        shrunk = shrunk_to(size, (size[0] * scale, size[1] * scale))
        views = torch.cat([torch.full((len(base),), THUMBNAIL), views.reshape(-1)])
        return Cells(
            box=torch.cat([base, with_newlines]), visual=visual, shrunk=shrunk, views=views
        )

    def patches_among(
        self, processor: Any, config: Any, tensors: Mapping[str, Any]
    ) -> dict[int, Bool[Tensor, " placeholder"]] | None:
        """All but the newlines: where these stand depends on the pictures' sizes, which the model
        is given."""
        # (without a processor the model's own config says how pictures are cut)
        source = processor or SimpleNamespace(image_processor=config)
        sizes = tensors.get("image_sizes")
        features = dict(tensors)
        flags = []
        if sizes is not None:
            features.setdefault("batch_num_images", [1] * len(sizes))
            for index, (height, width) in enumerate(torch.as_tensor(sizes).tolist()):
                cells = self.image_cells(source, config, features, index, (width, height))
                flags.append(cells.visual)
        image, video = self.placeholders(config)
        masks = {image: torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool)}
        if video >= 0:
            masks[video] = _but_last(self.video_lengths(config, tensors))
        return masks

    def video_lengths(self, config: Any, tensors: Mapping[str, Any]) -> list[int]:
        """How many placeholders each video of a batch has; the last of them is a newline."""
        return []

    def pooled(
        self,
        config: Any,
        columns: Float[Tensor, "column 2"],
        rows: Float[Tensor, "row 2"],
        side: int,
    ) -> tuple[Float[Tensor, "pooled_column 2"], Float[Tensor, "pooled_row 2"]]:
        """The column and row spans of the canvas's tokens, in pixels of the picture."""
        return columns, rows


class LlavaOnevision(LlavaNext):
    """As NeXT, with large canvases scaled down; several pictures of one sample, and frames, get one
    view each."""

    model_types = ("llava_onevision",)

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """A picture that is not alone in its sample has its base view and one newline only."""
        count = torch.as_tensor(features["batch_num_images"])
        if int(count.repeat_interleave(count)[index]) == 1:
            return super().image_cells(processor, config, features, index, size)
        tile, side, patch = _tower(config)
        shrunk = shrunk_to(size, (tile, tile))
        return _with_newline(
            patches(_squashed(side, tile, patch, size), shrunk=shrunk, views=[THUMBNAIL])
        )

    def pooled(
        self,
        config: Any,
        columns: Float[Tensor, "column 2"],
        rows: Float[Tensor, "row 2"],
        side: int,
    ) -> tuple[Float[Tensor, "pooled_column 2"], Float[Tensor, "pooled_row 2"]]:
        """A canvas of much more than the limit's tiles is scaled down bilinearly."""
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(len(rows) * len(columns) / (most * side**2))
        if ratio <= 1.1:
            return columns, rows
        return _bilinear(columns, int(len(columns) // ratio)), _bilinear(
            rows, int(len(rows) // ratio)
        )

    def video_lengths(self, config: Any, tensors: Mapping[str, Any]) -> list[int]:
        """Frames of half as many tokens a side, and a newline."""
        pixels, encoded = tensors.get("pixel_values_videos"), tensors.get(ENCODED) or {}
        if pixels is None:
            output = encoded.get("video")
            return (
                [] if output is None else [video.shape[0] for video in visual_features(output)[0]]
            )
        half = math.ceil(_tower(config)[1] / 2)
        return [video.shape[0] * half * half + 1 for video in pixels]

    def video_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
        n_frames: int,
    ) -> Cells:
        """Each frame's view scaled down to half as many tokens a side; one newline after the last
        frame."""
        tile, side, patch = _tower(config)
        spans = _squashed(side, tile, patch, size)
        half = math.ceil(side / 2)
        columns, rows = spans[:side, [0, 2]], spans[::side, [1, 3]]
        box = cross(_bilinear(columns, half), _bilinear(rows, half)).repeat(n_frames, 1)
        frames = torch.arange(n_frames).repeat_interleave(half * half)[:, None]
        return _with_newline(Cells(box, torch.ones(len(box), dtype=torch.bool), frames))


def _tower(config: Any) -> tuple[int, int, int]:
    """Pixels along a tile, tokens along a tile, pixels along a token."""
    vision = config.vision_config
    return vision.image_size, vision.image_size // vision.patch_size, vision.patch_size


def _squashed(side: int, tile: int, patch: int, size: tuple[int, int]) -> Float[Tensor, "token 4"]:
    """A view of the whole picture; what is left of the tile past the last whole patch is not
    seen."""
    seen = side * patch / tile
    return grid(side, side, 0, 0, size[0] * seen, size[1] * seen)


def _best_canvas(size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """Width and height of the canvas that keeps most of the picture's pixels, then wastes least."""

    def quality(canvas: list[int]) -> tuple[int, int]:
        height, width = canvas
        scale = min(width / size[0], height / size[1])
        pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return pixels, pixels - width * height

    height, width = max(pinpoints, key=quality)
    return width, height


def _unpadded(
    size: tuple[int, int], canvas: tuple[int, int], tile: int, side: int, patch: int
) -> tuple[Float[Tensor, "column 2"], Float[Tensor, "row 2"], tuple[Tensor, Tensor], float]:
    """What the model keeps of the canvas: spans of its columns and rows in pixels of the picture,
    the tile column and tile row in which each lies, and the picture's scale."""
    scales = canvas[0] / size[0], canvas[1] / size[1]
    narrow = scales[0] < scales[1]  # the picture fills the canvas's width; padding above and below
    resized = [canvas[0], canvas[1]]
    other = 1 if narrow else 0
    resized[other] = min(math.ceil(size[other] * min(scales)), canvas[other])
    counts = [length // tile * side for length in canvas]
    # The model decides by the ratio of tokens which side was padded; where it cuts, it cuts the
    # same at both ends.
    cut = 1 if size[0] / size[1] > counts[0] / counts[1] else 0
    uncut = int(round(size[cut] * (counts[1 - cut] / size[1 - cut]), 7))
    padding = [0, 0]
    padding[cut] = (counts[cut] - uncut) // 2
    spans, tiles = [], []
    for axis in (0, 1):
        token = torch.arange(padding[axis], counts[axis] - padding[axis])
        start = (
            token // side * tile + token % side * patch - (canvas[axis] - resized[axis]) // 2
        ).double()
        spans.append(torch.stack([start, start + patch], dim=1) * (size[axis] / resized[axis]))
        tiles.append(token // side)
    return spans[0], spans[1], (tiles[0], tiles[1]), min(scales)


def _thinned(tiles: Int[Tensor, " token"], count: int) -> Int[Tensor, " pooled"]:
    """The tile in which the middle lies of each of `count` tokens that these are scaled down to."""
    return tiles[((torch.arange(count) + 0.5) * (len(tiles) / count)).long()]


def _bilinear(spans: Float[Tensor, "token 2"], count: int) -> Float[Tensor, "pooled 2"]:
    """What `count` tokens read that torch's bilinear interpolation makes of these: two neighbours
    each, or one."""
    middle = ((torch.arange(count).double() + 0.5) * (len(spans) / count) - 0.5).clamp(min=0)
    low = middle.floor().long().clamp(max=len(spans) - 1)
    high = torch.where(middle - low > 1e-6, low + 1, low).clamp(max=len(spans) - 1)
    return torch.stack([spans[low, 0], spans[high, 1]], dim=1)


def _with_newline(cells: Cells) -> Cells:
    """One more placeholder at the end that is no patch."""
    box = torch.cat([cells.box, torch.zeros(1, 4, dtype=cells.box.dtype)])
    frames = cells.frames
    if frames is not None:
        frames = torch.cat([frames, torch.full((1, frames.shape[1]), -1)])
    views = None if cells.views is None else torch.cat([cells.views, cells.views[-1:]])
    return Cells(box, torch.cat([cells.visual, torch.tensor([False])]), frames, cells.shrunk, views)


def _but_last(lengths: Sequence[int]) -> Bool[Tensor, " placeholder"]:
    """True for all tokens of each of these runs but its last."""
    mask = torch.ones(sum(lengths), dtype=torch.bool)
    if lengths:
        mask[torch.tensor(lengths).cumsum(0) - 1] = False
    return mask


def _clip(box: Float[Tensor, "token 4"], size: tuple[int, int]) -> Float[Tensor, "token 4"]:
    """Cells end where the picture ends; one that sees padding only is empty."""
    limits = torch.tensor([*size, *size], dtype=box.dtype)
    return box.clamp(min=0).minimum(limits)
