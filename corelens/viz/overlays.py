"""Attention laid over the picture it looks at, patch by patch, with the evidence outlined."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadSet
from corelens.tokens.regions import Shape
from corelens.tokens.token_map import TokenMap
from corelens.viz import style
from corelens.viz.heat import HEAT, Panel, attention_image, attention_map, of_panel, panels


def attention_overlay(
    image: Image.Image,
    token_map: TokenMap,
    weights: Float[Tensor, " key"],
    image_index: int = 0,
    regions: Sequence[Shape] = (),
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
        smooth: blur the patches' edges. frame: of a video, which frame. peak: strongest attention,
            to share a scale.
    Returns:
        A matplotlib figure; its colour bar gives attention a patch.
    """
    heat = attention_map(token_map, weights, image.size, image_index, frame, smooth)
    top = peak or float(heat.max()) or 1.0
    shown = attention_image(image, heat, of_panel(regions, image_index, frame), frame, top)
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
    rows: Any = "question",
    reduce: str = "max",
    smooth: bool = False,
    frames: int = 8,
) -> Figure:
    """Where chosen heads look in a sample: the picture, then every head's attention on it.

    Several pictures, or the frames of a video, make a table: one column a picture, one line a head.

    Args:
        model: a HookedMLLM. sample: a Sample. heads: a HeadSet, or what makes one.
        rows: whose attention: "question", "last", "answer", a sum of names, or positions.
        reduce: "max" shows one row, the one that puts most on the region (on the picture, if there
            is no region); "mean" the mean of the rows.
        smooth: blur the patches' edges; by default a patch is a square.
        frames: at most so many frames of a video, evenly spaced.
    Returns:
        A matplotlib figure. Under a head's name stand what attention it puts on the region, on the
        pictures and on its strongest patch. All heads share one scale, from 0 to the strongest
        patch of any of them.
    """
    inputs, seen_by, where = looks(model, sample, heads, rows, reduce)
    token_map = inputs.token_maps[0]
    words_above = f"{sample.question or 'a chat'}   ·   {where}"
    return _table(
        panels(inputs.pictures[0], token_map, frames),
        seen_by,
        token_map,
        sample.regions,
        words_above,
        smooth,
    )


def head_pictures(
    model: Any,
    sample: Any,
    heads: Any,
    rows: Any = "question",
    reduce: str = "max",
    smooth: bool = False,
) -> list[tuple[Image.Image, str]]:
    """The same for a page: (picture, words below it), the pictures as they are first, then every
    head's."""
    inputs, seen_by, _ = looks(model, sample, heads, rows, reduce)
    token_map, captioned = inputs.token_maps[0], []
    shown = [
        (*panel, of_panel(sample.regions, *panel[1:]))
        for panel in panels(inputs.pictures[0], token_map, 4)
    ]
    for image, _, frame, regions in shown:
        captioned.append((attention_image(image, None, regions, frame), "the picture"))
    heats_of, top = _heats([panel[:3] for panel in shown], seen_by, token_map, smooth)
    for (name, row, seen, _), heats in zip(seen_by, heats_of, strict=True):
        peak = max(float(heat.max()) for heat in heats)
        for heat, (image, _, frame, regions) in zip(heats, shown, strict=True):
            words = f"**{name}** {f'{row} · ' if row else ''}{seen}, peak {peak:.2g}"
            captioned.append((attention_image(image, heat, regions, frame, top), words))
    return captioned


def _heats(
    shown: "list[Panel]", seen_by: "list[Line]", token_map: TokenMap, smooth: bool
) -> tuple[list[list[np.ndarray]], float]:
    """Every head's map on every picture, and the strongest patch of all."""
    heats = [
        [
            attention_map(token_map, weights, image.size, index, frame, smooth)
            for image, index, frame in shown
        ]
        for _, _, _, weights in seen_by
    ]
    return heats, max((float(heat.max()) for row in heats for heat in row), default=1.0) or 1.0


# a head, the row it looks from, what it sees in words, its attention on every key
Line = tuple[str, str, str, Tensor]


def looks(
    model: Any, sample: Any, heads: Any, rows: Any, reduce: str
) -> tuple[Any, list[Line], str]:
    """Run the model: (inputs, one line a head, the rows in words)."""
    heads = HeadSet(heads).check(model.cfg.n_layers, model.cfg.n_heads)
    answer = isinstance(rows, str) and "answer" in rows
    inputs = model.prepare(sample, answer=True) if answer else model.prepare(sample)
    token_map = inputs.token_maps[0]
    names = [f"blocks.{layer}.attn.hook_pattern_rows" for layer in heads.by_layer()]
    positions = token_map.positions(rows, rows=True).tolist()
    with torch.no_grad(), model.pattern_rows(positions):
        _, cache = model.run_with_cache(inputs, names_filter=names, return_type=None)
    tokens = model.to_str_tokens(inputs)
    several = len(positions) > 1
    seen_by = []
    for head in heads:
        pattern = cache[f"blocks.{head.layer}.attn.hook_pattern_rows"][0, head.head].float().cpu()
        weights, seen = chosen_row(pattern, token_map, reduce)
        picked = several and reduce == "max"
        row = (
            f"from ‘{tokens[positions[looks_hardest(pattern, token_map)]].strip()}’"
            if picked
            else ""
        )
        seen_by.append((str(head), row, seen, weights))
    where = (
        f"{rows} row{'s' * several}"
        if isinstance(rows, str)
        else f"row{'s' * several} {', '.join(map(str, positions))}"
    )
    return inputs, seen_by, f"{f'{reduce} over ' * several}{where}"


def _table(
    shown: "list[Panel]", seen_by: list[Line], token_map: TokenMap, regions: Sequence[Shape],
    words_above: str, smooth: bool,
) -> Figure:  # fmt: skip
    """The pictures as they are, then a line a head; a single picture's heads fill the lines from
    left to right."""
    cells = len(shown) * (1 + len(seen_by))
    across = len(shown) if len(shown) > 1 else -(-cells // -(-cells // 5))
    down = -(-cells // across)
    ratio = max(image.width / image.height for image, _, _ in shown)
    height = min(2.0, 3.2 / ratio)
    # in inches: every cell, the words above it, the line above all, the scale at the right
    wide, words, top, right = max(height * ratio, 1.75), 0.42, 0.28, 0.95
    size = (across * (wide + 0.12) + right, down * (height + words) + top + 0.05)
    with style.axes(None, *size) as first:
        figure = style.figure_of(first)
        figure.set_layout_engine("none")
        first.remove()

        def panel_axes(number: int) -> Axes:
            y, x = divmod(number, across)
            left, bottom = x * (wide + 0.12) + 0.05, size[1] - top - (y + 1) * (height + words)
            ax = figure.add_axes(
                (left / size[0], bottom / size[1], wide / size[0], height / size[1])
            )
            ax.set_axis_off()
            ax.set_anchor("W")
            return ax

        for number, (image, index, frame) in enumerate(shown):
            ax, outlined = panel_axes(number), of_panel(regions, index, frame)
            ax.imshow(attention_image(image, None, outlined, frame), interpolation="antialiased")
            name = (
                f"frame {frame}"
                if frame is not None
                else f"image {index}"
                if len(shown) > 1
                else "the picture"
            )
            _entitle(ax, name, "", "region outlined" if outlined else "")
        heats_of, top_patch = _heats(shown, seen_by, token_map, smooth)
        for number, ((name, row, seen, _), heats) in enumerate(
            zip(seen_by, heats_of, strict=True), 1
        ):
            peak = max(float(heat.max()) for heat in heats)
            for column, (heat, (image, index, frame)) in enumerate(zip(heats, shown, strict=True)):
                ax = panel_axes(number * len(shown) + column)
                lit = attention_image(
                    image, heat, of_panel(regions, index, frame), frame, top_patch
                )
                ax.imshow(lit, interpolation="antialiased")
                if not column:
                    _entitle(ax, name, row, f"{seen}, peak {peak:.2g}")
        scale = figure.add_axes(
            (
                1 - (right - 0.1) / size[0],
                1 - (top + words + height) / size[1],
                0.1 / size[0],
                height / size[1],
            )
        )
        shades = ScalarMappable(Normalize(0, top_patch), HEAT)
        bar = figure.colorbar(shades, cax=scale, ticks=[0, top_patch])
        scale.set_yticklabels(["0", f"{top_patch:.2g}"], fontsize=7.5)
        bar.set_label("attention a patch", labelpad=-8, fontsize=8)
        bar.outline.set_visible(False)
        # (a question is shown as it is: "$5 and $6" is no formula)
        figure.text(
            0.05 / size[0],
            1 - 0.18 / size[1],
            words_above,
            fontsize=9,
            color=style.SOFT,
            parse_math=False,
        )
    return figure


def _entitle(ax: Axes, name: str, row: str, seen: str) -> None:
    """A bold name, the row behind it, and numbers in small type between them and the picture."""
    title = ax.annotate(
        name, (0, 1), (0, 12), xycoords="axes fraction", textcoords="offset points",
        fontsize=10, fontweight="bold", parse_math=False,
    )  # fmt: skip
    small: Any = {
        "fontsize": 7.2,
        "color": style.SOFT,
        "parse_math": False,
        "textcoords": "offset points",
    }
    ax.annotate(row, (1, 0), (4, 1), xycoords=title, **small)
    ax.annotate(seen, (0, 1), (0, 3), xycoords="axes fraction", **small)


def looks_hardest(pattern: Float[Tensor, "row key"], token_map: TokenMap) -> int:
    """Which row puts most on the region (on the picture, if there is no region)."""
    target = token_map.region if token_map.regions else token_map.visual
    return int(pattern[:, target].sum(-1).argmax())


def chosen_row(
    pattern: Float[Tensor, "row key"], token_map: TokenMap, reduce: str = "max"
) -> tuple[Tensor, str]:
    """The row that puts most on the region (or the mean of rows), and in words what it puts on
    region and picture."""
    if reduce == "mean":
        weights = pattern.mean(0)
    elif reduce == "max":
        weights = pattern[looks_hardest(pattern, token_map)]
    else:
        raise CorelensError(
            f"reduce={reduce!r}", "'max' or 'mean'", "'max' shows the row that looks hardest"
        )
    words = [f"region {float(weights[token_map.region].sum()):.2f}"] if token_map.regions else []
    return weights, ", ".join([*words, f"picture {float(weights[token_map.visual].sum()):.2f}"])
