"""What differs between the demo models' families in training: how pictures become the model's
inputs, and which modules see. The real processors do the same, one picture after another; a test
holds the two together."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import visual_features


class Family(NamedTuple):
    """One family's part in training; `images` are uint8 [batch, height, width, 3], all of one size
    (a video's: [batch, frames, height, width, 3]; as many for each row of ids), `ids` [batch, pos]
    padded on the right.

    Args:
        features: (model, images) → the visual tokens at the decoder's width [batch · tokens,
            width].
        inputs: (model, ids, images) → all that `model.model` is called with.
        tower: the modules that dense labels train.
    """

    features: Callable[[Any, Tensor], Tensor]
    inputs: Callable[[Any, Tensor, Tensor], dict[str, Any]]
    tower: Callable[[Any], list[nn.Module]]


def family_of(model: Any) -> Family:
    """The family of a demo model."""
    return FAMILIES[model.config.model_type]


def patches_of(images: Tensor) -> Tensor:
    """Pictures uint8 [batch, height, width, 3] → Qwen's patches [batch · patches, 3 · 16 · 16],
    normalised to −1..1.

    The order is the image processor's (2 × 2 patches of a visual token together), without the
    second, equal frame. Videos [batch, frames, height, width, 3] → [batch · patches, 3 · 2 · 16 ·
    16], two frames a patch.
    """
    *batch, height, width, _ = images.shape
    pixels = images.float().div_(127.5).sub_(1.0)
    pixels = pixels.view(
        -1, 2 if len(batch) == 2 else 1, height // 32, 2, 16, width // 32, 2, 16, 3
    )
    frames = pixels.shape[1]
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * frames * 16 * 16)


def views_of(images: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [batch, height, width, 3] with sides that are multiples of `side` → tiles
    [batch, tiles, 3, side, side], row by row, and thumbnails [batch, 1, 3, side, side], normalised
    to −1..1."""
    _, height, width, _ = images.shape
    if height % side or width % side:
        raise CorelensError(
            f"pictures of {width} × {height} px",
            f"sides that are multiples of {side} px, the tile's",
            "give the recipe such `sides`, equal ones: those between are drawn in steps of 32",
        )
    pixels = rearrange(images, "b h w c -> b c h w")
    tiles = rearrange(pixels, "b c (r h) (k w) -> b (r k) c h w", h=side, w=side)
    # Bytes are shrunk on a CPU alone, and there as the real processors do it.
    small = F.interpolate(pixels.cpu().contiguous(), (side, side), mode="bicubic", antialias=True)[
        :, None
    ]
    small = small.to(images.device)
    return tiles.float().div(127.5).sub(1.0), small.float().div(127.5).sub(1.0)


@torch.no_grad()
def begin(model: Any) -> None:
    """Fresh weights that a small tower learns from sooner: its positions begin as sines and cosines
    of row and column (Beyer et al. 2022, arXiv 2205.01580), so that patches find their neighbours.
    Qwen's tower rotates instead."""
    if model.config.model_type == "qwen3_vl":
        return
    embeddings = model.model.vision_tower.embeddings
    if model.config.model_type == "internvl":
        table = embeddings.position_embeddings[0, 1:]  # the first is of the class token
    else:
        table = embeddings.position_embedding.weight
        # No norm stands before this projector: of 0.02, its first layer would be as good as linear.
        nn.init.xavier_uniform_(model.model.multi_modal_projector.linear_1.weight)
    side, quarter = int(len(table) ** 0.5), table.shape[1] // 4
    angles = torch.arange(side)[:, None] * 10000.0 ** -(torch.arange(quarter) / (quarter - 1))
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    table.copy_(torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], 1))


def _qwen_visual(images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches, and the grid of each picture or video in patches."""
    *batch, height, width, _ = images.shape
    pairs = batch[1] // 2 if len(batch) == 2 else 1
    return patches_of(images), torch.tensor(
        [[pairs, height // 16, width // 16]] * batch[0], device=images.device
    )


def _qwen_features(model: Any, images: Tensor) -> Tensor:
    patches, grid = _qwen_visual(images)
    return visual_features(model.model.visual(patches, grid_thw=grid))[0]


def _qwen_inputs(model: Any, ids: Tensor, images: Tensor) -> dict[str, Any]:
    patches, grid = _qwen_visual(images)
    if images.ndim == 5:
        kinds = (ids[:1] == model.config.video_token_id).int() * 2
        pixels, grids = {"pixel_values_videos": patches}, {"video_grid_thw": grid}
    else:
        kinds = (ids[:1] == model.config.image_token_id).int()
        pixels, grids = {"pixel_values": patches}, {"image_grid_thw": grid}
    # All rows begin with as many pictures of one size: the first row's positions are everyone's.
    first_grid = {key: value[: len(images) // len(ids)] for key, value in grids.items()}
    positions, _ = model.model.get_rope_index(ids[:1], mm_token_type_ids=kinds, **first_grid)
    return {"input_ids": ids, "position_ids": positions.expand(3, *ids.shape), **pixels, **grids}


def _llava_visual(model: Any, images: Tensor) -> dict[str, Tensor]:
    """The thumbnail stands first, and sizes are told."""
    tiles, thumbnail = views_of(images, model.config.vision_config.image_size)
    sizes = torch.tensor([list(images.shape[1:3])] * len(images), device=images.device)
    return {"pixel_values": torch.cat([thumbnail, tiles], 1), "image_sizes": sizes}


def _intern_visual(model: Any, images: Tensor) -> dict[str, Tensor]:
    """The thumbnail stands last, and a single tile has none."""
    tiles, thumbnail = views_of(images, model.config.vision_config.image_size[0])
    views = torch.cat([tiles, thumbnail], 1) if tiles.shape[1] > 1 else tiles
    return {"pixel_values": views.flatten(0, 1)}


def _tiled(visual: Callable[[Any, Tensor], dict[str, Tensor]]) -> Family:
    """A family that cuts pictures into tiles, with a tower and a projector."""

    def features(model: Any, images: Tensor) -> Tensor:
        by_picture = visual_features(
            model.model.get_image_features(**visual(model, images), return_dict=True)
        )[0]
        return (
            torch.cat(by_picture)
            if isinstance(by_picture, list | tuple)
            else by_picture.flatten(0, 1)
        )

    def inputs(model: Any, ids: Tensor, images: Tensor) -> dict[str, Any]:
        return {"input_ids": ids, **visual(model, images)}

    return Family(
        features,
        inputs,
        lambda model: [model.model.vision_tower, model.model.multi_modal_projector],
    )


FAMILIES = {
    "qwen3_vl": Family(_qwen_features, _qwen_inputs, lambda model: [model.model.visual]),
    "llava_onevision": _tiled(_llava_visual),
    "internvl": _tiled(_intern_visual),
}
"""By the `model_type` of a model's config."""
