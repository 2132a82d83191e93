"""Attention as a wash of colour on the pixels of a picture, and the pictures and frames there
are to draw on."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.cells import Picture
from corelens.tokens.regions import Box, Mask, Shape, Span, Tube
from corelens.tokens.token_map import TokenMap

# one hue, from paper to the orange of all marks
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7f4f0", "#f3c9a4", "#e8914f", "#d55e00"])
WASH = (0.835, 0.369, 0.0)  # its last colour
SMALLEST = 320  # pictures are enlarged to this many pixels a side, so that outlines stay thin
LARGEST = 600  # and photographs drawn at about this many


Panel = tuple[Image.Image, int, int | None]  # a picture, its number, and of a video its frame


def attention_map(
    token_map: TokenMap,
    weights: Float[Tensor, " key"],
    size: tuple[int, int],
    image_index: int = 0,
    frame: int | None = None,
    smooth: bool = False,
) -> Float[np.ndarray, "height width"]:
    """How much attention each pixel of a picture gets, in attention a patch (of the finest view).

    Where several views cover a pixel (tile and thumbnail, overlapping tiles) their densities add
    up, so that the sum over the picture is the attention on all its tokens whatever the views.

    Args:
        size: width, height of the original picture. frame: of a video, the frame; None for an
            image.
        smooth: blur the patches' edges by half a patch; the sum stays, the peak gets lower.
    """
    picture = _picture(token_map, image_index)
    values = weights.detach().float().cpu()
    if values.shape[0] < int(picture.positions.max()) + 1:
        raise CorelensError(
            f"{values.shape[0]} weights for a row of {token_map.length} tokens",
            "one weight a key",
            "give a row of a pattern",
        )
    width, height = size
    density = np.zeros((height, width))
    boxes, inside = picture.box.numpy(), tokens_in_frame(picture, frame)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # a token that sees padding only has no area, and nothing to show
    for token in np.flatnonzero(inside.numpy() & (areas > 0)):
        x0, y0, x1, y1 = np.round(boxes[token]).astype(int)
        density[max(y0, 0) : y1, max(x0, 0) : x1] += (
            float(values[picture.positions[token]]) / areas[token]
        )
    heat = density * areas[areas > 0].min()
    return (
        gaussian_filter(heat, float(np.median(boxes[:, 2] - boxes[:, 0])) / 2) if smooth else heat
    )


def attention_image(
    image: Image.Image,
    heat: Float[np.ndarray, "height width"] | None,
    regions: Iterable[Shape] = (),
    frame: int | None = None,
    peak: float | None = None,
) -> Image.Image:
    """The picture, faded, with the attention as a wash of one colour, and white-and-black lines
    around the regions.

    Args:
        heat: from `attention_map`; None shows the picture as it is.
        peak: the attention shown strongest; by default the highest of this picture. Share it
            between pictures that are compared, or an ordinary head looks as eager as the one that
            finds the evidence.
    """
    scale = max(1, round(SMALLEST / max(1, min(image.size))))
    # of a photograph every second, third … pixel is enough
    step = max(1, min(image.size) // LARGEST)
    size = (-(-image.width // step) * scale, -(-image.height // step) * scale)
    full = (
        np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
        / 255
    )
    mixed = full.copy() if heat is None else _lit(full, heat[::step, ::step], peak)
    for region in regions:
        outline(mixed, region_pixels(region, image.size, frame)[::step, ::step], scale)
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def _lit(
    full: Float[np.ndarray, "y x 3"], heat: Float[np.ndarray, "height width"], peak: float | None
) -> Float[np.ndarray, "y x 3"]:
    scale = len(full) // len(heat)
    grey = (full @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    level = np.clip(np.kron(heat, np.ones((scale, scale))) / (peak or heat.max() or 1), 0, 1)
    level = level[..., None]
    # faded where nobody looks, its own colours under a light wash where attention falls, so that
    # what is looked at can still be read
    faded = 0.45 * (0.5 * full + 0.5 * grey) + 0.55
    base = faded + (full - faded) * level**0.5
    cover = 0.55 * level**0.7
    return base * (1 - cover) + np.array(WASH, dtype=np.float32) * cover


def outline(
    pixels: Float[np.ndarray, "y x 3"], inside: Bool[np.ndarray, "height width"], scale: int
) -> None:
    """Draw a region's edge into an enlarged picture: a white line within a black one, seen on any
    background."""
    if not inside.any():
        return
    inside = np.kron(inside, np.ones((scale, scale), dtype=bool))
    line = max(2, round(min(inside.shape) / 130))
    edge = binary_erosion(inside)
    inner = binary_erosion(edge, iterations=line)
    core = binary_erosion(inner)
    pixels[np.logical_xor(inside, edge)] = pixels[np.logical_xor(inner, core)] = 0.05
    pixels[np.logical_xor(edge, inner)] = 1.0


def region_pixels(
    region: Shape, size: tuple[int, int], frame: int | None = None
) -> Bool[np.ndarray, "height width"]:
    """True where a region covers a pixel of its picture (of frame `frame`, for a tube)."""
    if isinstance(region, Mask):
        return region.mask
    inside = np.zeros((size[1], size[0]), dtype=bool)
    box = region if isinstance(region, Box) else region.boxes.get(-1 if frame is None else frame)
    if isinstance(box, Box):
        x0, y0 = max(0, round(box.x0)), max(0, round(box.y0))
        inside[y0 : max(round(box.y1), y0 + 1), x0 : max(round(box.x1), x0 + 1)] = True
    return inside


def panels(pictures: Sequence[Any], token_map: TokenMap, frames: int) -> list[Panel]:
    """Everything there is to show of a sample; of a video at most `frames`, evenly spaced.

    Args:
        pictures: as in `Inputs.pictures`: images first, then each video as its list of frames.
    """
    every: list[Panel] = []
    for number, content in enumerate(pictures):
        used = _picture(token_map, number).frames
        if used is None:
            every.append((content, number, None))
            continue
        seen = sorted({frame for row in used.tolist() for frame in row if frame >= 0})
        picked = sorted(
            {seen[round(i)] for i in np.linspace(0, len(seen) - 1, min(frames, len(seen)))}
        )
        every += [(content[frame], number, frame) for frame in picked]
    if not every:
        raise CorelensError(
            "a sample without a picture",
            "a sample with images or a video",
            "give one with pictures",
        )
    return every


def of_panel(regions: Iterable[Shape], image_index: int, frame: int | None) -> list[Shape]:
    if frame is not None:
        return [region for region in regions if isinstance(region, Tube) and frame in region.boxes]
    return [
        region
        for region in regions
        if not isinstance(region, Span | Tube) and region.image == image_index
    ]


def cells(token_map: TokenMap, panel: Panel) -> dict[int, tuple[float, ...]]:
    """{position: x0, y0, x1, y1} of the patches of a panel; of several views of a picture only the
    finest."""
    _, number, frame = panel
    picture = _picture(token_map, number)
    areas = (picture.box[:, 2] - picture.box[:, 0]) * (picture.box[:, 3] - picture.box[:, 1])
    # (a tile's patches are the many; the whole picture's, beside them, are four times as large or
    # more)
    shown = tokens_in_frame(picture, frame) & (areas > 0) & (areas < 2.5 * areas.median())
    return {
        int(p): tuple(box)
        for p, box in zip(picture.positions[shown], picture.box[shown].tolist(), strict=True)
    }


def _picture(token_map: TokenMap, image_index: int) -> Picture:
    images = token_map.images  # raises if the geometry of this model is not known
    if not 0 <= image_index < len(images):
        raise CorelensError(
            f"image_index={image_index}",
            f"0 to {len(images) - 1}",
            "count the sample's pictures from 0",
        )
    assert token_map.pictures is not None
    return token_map.pictures[image_index]


def tokens_in_frame(picture: Picture, frame: int | None) -> Bool[Tensor, " token"]:
    """Which of a picture's tokens are shown: all of an image's, those that cover `frame` of a
    video's."""
    if picture.frames is None:
        return torch.ones(len(picture.positions), dtype=torch.bool)
    if frame is None:
        raise CorelensError(
            "a video without a frame",
            "frame=…, counted in the sample's video",
            "say which frame to show",
        )
    return (picture.frames == frame).any(1)
