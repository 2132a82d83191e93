"""Which token covers which part of a picture: the patch grid over the picture, regions outlined,
tokens numbered."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image
from torch import Tensor

from corelens.tokens.cells import Picture
from corelens.tokens.regions import Mask, Shape, Tube
from corelens.tokens.token_map import TokenMap
from corelens.viz import style

MOST_NUMBERS = 400  # more numbers in one panel could not be read


def show_patches(
    token_map: TokenMap, pictures: Sequence[Any], regions: Sequence[Shape] = ()
) -> Figure:
    """One panel a view of a picture (whole picture, tiles), side by side; a video as a strip of its
    frames.

    Tokens of the regions are tinted; the number in a cell is the token's position in the padded
    row.

    Args:
        token_map: its boxes are drawn.
        pictures: as in `Inputs.pictures`: images first, then each video as its list of frames.
        regions: outlined as they were given.
    """
    panels = [
        panel
        for number in range(len(pictures))
        for panel in _panels(token_map, number, pictures[number])
    ]
    marked = set(token_map.region.tolist()) if token_map.covered else set()
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    tallest = min(2.0, max(panel[1].height / panel[1].width for panel in panels))
    with plt.rc_context(style.RC):
        size = (3.6 * columns, (3.6 * tallest + 0.6) * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, image, picture, shown, number, frame) in zip(
            axes.flat, panels, strict=False
        ):
            _draw(ax, title, image, picture, shown, marked)
            for region in regions:
                if isinstance(region, Tube) == (frame is not None) and region.image == number:
                    _outline(ax, region, frame)
        figure.tight_layout()
        # a notebook would show it twice otherwise: once as pyplot's, once as the cell's value
        plt.close(figure)
    return figure


Panel = tuple[str, Image.Image, Picture, Bool[Tensor, " token"], int, int | None]


def _panels(token_map: TokenMap, number: int, content: Any) -> list[Panel]:
    """Title, image, its tokens, which of them this panel shows, the picture's number among its
    kind, and the frame."""
    assert token_map.pictures is not None
    picture = token_map.pictures[number]
    if picture.frames is not None:
        videos = [p for p in token_map.pictures if p.frames is not None]
        video_number = next(i for i, video in enumerate(videos) if video is picture)
        shown = [(picture.frames == frame).any(1) for frame in range(len(content))]
        return [
            (f"frame {f}", image, picture, shown[f], video_number, f)
            for f, image in enumerate(content)
        ]
    areas = (picture.box[:, 2] - picture.box[:, 0]) * (picture.box[:, 3] - picture.box[:, 1])
    sizes = torch.unique((areas / areas.max()).round(decimals=2))
    whole = torch.ones(len(areas), dtype=torch.bool)
    views = [whole] if len(sizes) == 1 or not _overlap(picture) else _views(picture)
    titles = [
        f"image {number}" + (f", view {view}" if len(views) > 1 else "")
        for view in range(len(views))
    ]
    return [
        (title, content, picture, view, number, None)
        for title, view in zip(titles, views, strict=True)
    ]


def _overlap(picture: Picture) -> bool:
    """Whether the cells cover the picture more than once."""
    box = picture.box
    areas = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    extent = (box[:, 2].max() - box[:, 0].min()) * (box[:, 3].max() - box[:, 1].min())
    return bool(areas.sum() > 1.2 * extent)


def _views(picture: Picture) -> list[Bool[Tensor, " token"]]:
    """Tokens by the size of their cells: the tiles together make one view, the whole picture
    another."""
    width = picture.box[:, 2] - picture.box[:, 0]
    full = (width > 0.7 * width.max()) if width.max() > 1.3 * width.median() else (width < 0)
    tall = picture.box[:, 3] - picture.box[:, 1]
    full = full | (tall > 0.7 * tall.max()) if tall.max() > 1.3 * tall.median() else full
    return [view for view in (full, ~full) if view.any()]


def _draw(
    ax: Axes,
    title: str,
    image: Image.Image,
    picture: Picture,
    shown: Bool[Tensor, " token"],
    marked: set[int],
) -> None:
    ax.imshow(np.asarray(image), extent=(0, image.width, image.height, 0), interpolation="nearest")
    positions, boxes = picture.positions[shown].tolist(), picture.box[shown].tolist()
    cells = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]
    tint = [style.GOLD + "66" if position in marked else "#00000000" for position in positions]
    ax.add_collection(PatchCollection(cells, facecolor=tint, edgecolor="#ffffff99", linewidth=0.6))
    if len(positions) <= MOST_NUMBERS:
        size = max(2.5, min(7.0, 56 / max(1, len(positions)) ** 0.5))
        for position, (x0, _, _, y1) in zip(positions, boxes, strict=True):
            number = ax.text(
                x0, y1, f" {position}", ha="left", va="bottom", fontsize=size, color="white"
            )
            number.set_path_effects([Stroke(linewidth=1.2, foreground="#000000a0"), Normal()])
    ax.set(xlim=(0, image.width), ylim=(image.height, 0), title=f"{title}: {len(positions)} tokens")
    ax.tick_params(labelsize=7)
    ax.grid(False)


def _outline(ax: Axes, region: Shape, frame: int | None) -> None:
    """A white line within a dark one: seen on any picture."""
    for colour, width in (("#000000c0", 3.4), ("white", 1.6)):
        if isinstance(region, Mask):
            ax.contour(
                np.arange(region.mask.shape[1]) + 0.5,
                np.arange(region.mask.shape[0]) + 0.5,
                region.mask,
                levels=[0.5],
                colors=colour,
                linewidths=width,
            )
            continue
        box = region.boxes.get(frame) if isinstance(region, Tube) and frame is not None else region
        if box is not None and not isinstance(box, Tube):
            x0, y0, x1, y1 = box.bounds
            ax.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width)
            )
