"""Attention laid over the picture it looks at, patch by patch, with the evidence outlined."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads import HeadSet
from corelens.regions import Box, Mask, Region, Tube
from corelens.tokens import Picture, TokenMap
from corelens.viz import style

HEAT = LinearSegmentedColormap.from_list("heat", ["#5b2a8c", "#b5367a", "#ee5a52", "#fd9a4e", "#fde49b"])
SMALLEST = 320  # pictures are enlarged to this many pixels a side, so that outlines stay thin


def attention_map(
    token_map: TokenMap,
    weights: Float[Tensor, " key"],
    size: tuple[int, int],
    image_index: int = 0,
    frame: int | None = None,
    smooth: bool = False,
) -> Float[np.ndarray, "height width"]:
    """How much attention each pixel of a picture gets, in attention a patch (of the finest view).

    Where several views cover a pixel (tile and thumbnail, overlapping tiles) their densities add up, so that the
    sum over the picture is the attention on all its tokens whatever the views.

    Args:
        size: width, height of the original picture. frame: of a video, the frame; None for an image.
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
    boxes, chosen = picture.box.numpy(), _in_frame(picture, frame)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    # a token that sees padding only has no area, and nothing to show
    for token in np.flatnonzero(chosen.numpy() & (areas > 0)):
        x0, y0, x1, y1 = np.round(boxes[token]).astype(int)
        density[max(y0, 0) : y1, max(x0, 0) : x1] += float(values[picture.positions[token]]) / areas[token]
    heat = density * areas[areas > 0].min()
    return gaussian_filter(heat, float(np.median(boxes[:, 2] - boxes[:, 0])) / 2) if smooth else heat


def attention_image(
    image: Image.Image,
    heat: Float[np.ndarray, "height width"] | None,
    regions: Iterable[Region] = (),
    frame: int | None = None,
    peak: float | None = None,
) -> Image.Image:
    """The picture, dimmed, with the attention glowing on it, and white-and-black lines around the regions.

    Args:
        heat: from `attention_map`; None shows the picture as it is.
        peak: the attention shown brightest; by default the highest of this picture. Share it between pictures that
            are compared, or an ordinary head looks as eager as the one that finds the evidence.
    """
    scale = max(1, round(SMALLEST / max(1, min(image.size))))
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    full = np.asarray(large, dtype=np.float32) / 255
    mixed = full.copy() if heat is None else _lit(full, heat, peak)
    for region in regions:
        outline(mixed, region, image.size, scale, frame)
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def _lit(
    full: Float[np.ndarray, "y x 3"], heat: Float[np.ndarray, "height width"], peak: float | None
) -> Float[np.ndarray, "y x 3"]:
    scale = len(full) // len(heat)
    grey = (full @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
    level = np.clip(np.kron(heat, np.ones((scale, scale))) / (peak or heat.max() or 1), 0, 1)[..., None]
    # dimmed where nobody looks, its own colours where attention falls, so that what is looked at can still be read
    dim = (0.65 * full + 0.35 * grey) * 0.6
    base = dim + (full - dim) * level**0.5
    cover = 0.58 * level**0.7
    return base * (1 - cover) + HEAT(level[..., 0])[..., :3] * cover


def outline(
    pixels: Float[np.ndarray, "y x 3"], region: Region, size: tuple[int, int], scale: int, frame: int | None = None
) -> None:
    """Draw a region's edge into an enlarged picture: a white line within a black one, seen on any background."""
    inside = region_pixels(region, size, frame)
    if not inside.any():
        return
    inside = np.kron(inside, np.ones((scale, scale), dtype=bool))
    line = max(2, round(min(inside.shape) / 130))
    edge = binary_erosion(inside)
    inner = binary_erosion(edge, iterations=line)
    core = binary_erosion(inner)
    pixels[np.logical_xor(inside, edge)] = pixels[np.logical_xor(inner, core)] = 0.05
    pixels[np.logical_xor(edge, inner)] = 1.0


def region_pixels(region: Region, size: tuple[int, int], frame: int | None = None) -> Bool[np.ndarray, "height width"]:
    """True where a region covers a pixel of its picture (of frame `frame`, for a tube)."""
    if isinstance(region, Mask):
        return region.mask
    inside = np.zeros((size[1], size[0]), dtype=bool)
    box = region if isinstance(region, Box) else region.boxes.get(-1 if frame is None else frame)
    if isinstance(box, Box):
        x0, y0 = max(0, round(box.x0)), max(0, round(box.y0))
        inside[y0 : max(round(box.y1), y0 + 1), x0 : max(round(box.x1), x0 + 1)] = True
    return inside


def attention_overlay(
    image: Image.Image,
    token_map: TokenMap,
    weights: Float[Tensor, " key"],
    image_index: int = 0,
    regions: Sequence[Region] = (),
    smooth: bool = False,
    ax: Axes | None = None,
    title: str | None = None,
    frame: int | None = None,
    peak: float | None = None,
) -> Figure:
    """One row of attention over one picture.

    Args:
        image: the original picture (or the frame of a video).
        token_map: the sample's.
        weights: attention on every key of the padded row, for instance one row of a pattern.
        image_index: which picture of the sample this is (a video stands behind the images).
        regions: regions to outline; those of other pictures are passed over.
        smooth: blur the patches' edges. frame: of a video, which frame. peak: brightest attention, to share a scale.
    Returns:
        A matplotlib figure; its colour bar gives attention a patch.
    """
    heat = attention_map(token_map, weights, image.size, image_index, frame, smooth)
    top = peak or float(heat.max()) or 1.0
    shown = attention_image(image, heat, _of(regions, image_index, frame), frame, top)
    with style.axes(ax, 3.2 * image.width / image.height + 0.7, 3.3) as ax:
        ax.imshow(shown, interpolation="antialiased")
        ax.set_axis_off()
        if title:
            ax.set_title(title)
        scale = ScalarMappable(Normalize(0, top), HEAT)
        bar = style.figure_of(ax).colorbar(scale, ax=ax, fraction=0.045, pad=0.02, aspect=18)
        bar.set_label("attention a patch")
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=4)
    return style.figure_of(ax)


def overlay(
    model: Any,
    sample: Any,
    heads: Any,
    rows: str = "question",
    reduce: str = "max",
    smooth: bool = False,
    frames: int = 8,
) -> Figure:
    """Where chosen heads look in a sample: one line a head, one column a picture (or a frame of the video).

    Args:
        model: a HookedMLLM. sample: a Sample. heads: a HeadSet, or what makes one.
        rows: whose attention: "question", "last", "answer", or a sum.
        reduce: "max" shows the row that RAM counts, the one that puts most on the region (on the picture, if there
            is no region); "mean" the mean of the rows.
        frames: at most so many frames of a video, evenly spaced.
    Returns:
        A matplotlib figure. Over each line stand the head and what attention it puts on the region, on the pictures
        and on the brightest patch; a line's pictures share one scale.
    """
    heads = HeadSet(heads)
    inputs = model.prepare(sample)
    token_map = inputs.token_maps[0]
    names = [f"blocks.{layer}.attn.hook_pattern_rows" for layer in heads.by_layer()]
    with model.pattern_rows(rows):
        _, cache = model.run_with_cache(inputs, names_filter=names, return_type=None)
    panels = _panels(sample, token_map, frames)
    shape = max(image.width / image.height for image, _, _ in panels)
    across, down = len(panels), len(heads)
    with style.axes(None, 2.3 * shape * across + 0.3, 2.65 * down) as first:
        figure = style.figure_of(first)
        first.remove()
        grid = figure.subplots(down, across, squeeze=False)
        for line, head in enumerate(heads):
            pattern = cache[f"blocks.{head.layer}.attn.hook_pattern_rows"][0, head.head].float().cpu()
            weights, seen = chosen_row(pattern, token_map, reduce)
            heats = [
                attention_map(token_map, weights, image.size, index, frame, smooth) for image, index, frame in panels
            ]
            peak = max(float(heat.max()) for heat in heats) or 1.0
            for ax, heat, (image, index, frame) in zip(grid[line], heats, panels, strict=True):
                shown = attention_image(image, heat, _of(sample.regions, index, frame), frame, peak)
                ax.imshow(shown, interpolation="antialiased")
                ax.set_axis_off()
                if frame is not None and line == 0:
                    ax.text(0.5, -0.02, f"frame {frame}", transform=ax.transAxes, ha="center", va="top", fontsize=8)
            grid[line, 0].set_title(f"{head}   {seen}, brightest patch {peak:.2g}", fontsize=8.5)
    return figure


def chosen_row(pattern: Float[Tensor, "row key"], token_map: TokenMap, reduce: str = "max") -> tuple[Tensor, str]:
    """The row that RAM counts (or the mean of the rows), and in words what it puts on the region and the picture."""
    region = token_map.region if token_map.regions else None
    target = token_map.visual if region is None else region
    if reduce == "mean":
        weights = pattern.mean(0)
    elif reduce == "max":
        weights = pattern[int(pattern[:, target].sum(-1).argmax())]
    else:
        raise CorelensError(f"reduce={reduce!r}", "'max' or 'mean'", "'max' shows the row that looks hardest")
    said = [] if region is None else [f"region {float(weights[region].sum()):.2f}"]
    return weights, ", ".join([*said, f"picture {float(weights[token_map.visual].sum()):.2f}"])


def _panels(sample: Any, token_map: TokenMap, frames: int) -> list[tuple[Image.Image, int, int | None]]:
    """(picture, its number, its frame or None) of everything to show."""
    pictures = list(getattr(sample, "images", None) or _images_of(sample))
    panels: list[tuple[Image.Image, int, int | None]] = [(image, i, None) for i, image in enumerate(pictures)]
    if getattr(sample, "video", None):
        number = len(pictures)
        used = _picture(token_map, number).frames
        seen = sorted({f for row in ([] if used is None else used.tolist()) for f in row if f >= 0})
        picked = sorted({seen[round(i)] for i in np.linspace(0, len(seen) - 1, min(frames, len(seen)))})
        panels += [(sample.video[frame], number, frame) for frame in picked]
    if not panels:
        raise CorelensError("a sample without a picture", "a sample with images or a video", "give one with pictures")
    return panels


def _images_of(sample: Any) -> list[Image.Image]:
    """The pictures in a chat's messages."""
    parts = [part for message in sample.messages or [] for part in message["content"] if isinstance(part, dict)]
    return [part["image"] for part in parts if isinstance(part.get("image"), Image.Image)]


def _of(regions: Iterable[Region], image_index: int, frame: int | None) -> list[Region]:
    if frame is not None:
        return [region for region in regions if isinstance(region, Tube)]
    return [region for region in regions if not isinstance(region, Tube) and region.image == image_index]


def _picture(token_map: TokenMap, image_index: int) -> Picture:
    images = token_map.images  # raises if the geometry of this model is not known
    if not 0 <= image_index < len(images):
        raise CorelensError(
            f"image_index={image_index}", f"0 to {len(images) - 1}", "count the sample's pictures from 0"
        )
    assert token_map.pictures is not None
    return token_map.pictures[image_index]


def _in_frame(picture: Picture, frame: int | None) -> Bool[Tensor, " token"]:
    if picture.frames is None:
        return torch.ones(len(picture.positions), dtype=torch.bool)
    if frame is None:
        raise CorelensError(
            "a video without a frame", "frame=…, counted in the sample's video", "say which frame to show"
        )
    return (picture.frames == frame).any(1)
