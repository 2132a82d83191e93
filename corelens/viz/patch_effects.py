"""What patching did: a heat map over layers, heads or positions, with the picture where a position
is a patch."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from corelens.errors import CorelensError
from corelens.tokens.token_map import TokenMap
from corelens.viz import style
from corelens.viz.heat import cells, panels

WORDS = {"effect": "effect: ", "recovered": "share recovered: ", "values": ""}
MOST_PICTURES = 6  # layers whose effects are laid over the picture
MOST_PATCHES = 400  # more of them, cut out side by side, show nothing


def patch_heatmap(
    result: Any,
    inputs: Any = None,
    tokens: Sequence[str] | None = None,
    what: str = "effect",
    row: int = 0,
    ax: Axes | None = None,
) -> Figure:
    """The mean over samples under each patch: a grid for two axes, bars (with the standard error)
    for one.

    Args:
        result: a PatchResult of one or two axes; of more, a part: `result.select(layer=3)`.
        inputs: what was patched. Where positions were swept, the patches of the picture are then
            shown as pictures:
            cut out on the axis, and with their effects laid over the whole picture.
        tokens: the row's tokens as strings, `model.to_str_tokens(inputs)`: the axis then names
            them.
        what: "effect" (the metric's unit), "recovered" (0: nothing, 1: the other run), or "values"
            (the metric's unit).
        row: which row of `inputs` is shown.
        ax: axes to draw the grid on; the picture is then left out.
    """
    if what not in WORDS:
        raise CorelensError(f"what={what!r}", "'effect', 'recovered' or 'values'", "choose one")
    if not 1 <= len(result.axes) <= 2:
        raise CorelensError(
            f"a picture of {len(result.axes)} axes",
            "one or two",
            "take a part with result.select(layer=3)",
        )
    mean, names = np.nanmean(getattr(result, what), axis=0), dict(result.axes)
    if len(names) == 1 and (grid := _as_grid(mean, *names.values())):
        mean, names = grid
    label = WORDS[what] + str(result.meta.get("metric", ""))
    to = ", ".join(result.meta.get("receivers", []))
    site = result.meta.get("site", to and f"paths to {to}")
    title = f"{result.meta.get('direction', '')} {site}".strip()
    last = list(names)[-1]
    if inputs is not None and last == "position" and ax is None:
        return _with_picture(mean, names, inputs, row, tokens, label, title)
    width = 1.6 + 0.32 * mean.shape[-1]
    height = 2.6 if mean.ndim == 1 else 1.1 + 0.3 * mean.shape[0]
    with style.axes(ax, float(np.clip(width, 3, 12)), float(np.clip(height, 2, 10))) as ax:
        if mean.ndim == 1:
            error = getattr(result, what).std(0) / max(1, len(result.base)) ** 0.5
            ax.bar(range(len(mean)), mean, yerr=error, color=style.BLUE, ecolor=style.SOFT)
            ax.axhline(0, color=style.SOFT, linewidth=0.7)
            ax.set_ylabel(label)
        else:
            _mesh(ax, mean, names)
            style.figure_of(ax).colorbar(ax.collections[0], ax=ax).set_label(label)
        labels = names[last]
        if last == "position" and tokens is not None:
            labels = [f"{tokens[int(position)].strip()} {position}" for position in labels]
        _ticks(ax.xaxis, labels, 0.5 if mean.ndim == 2 else 0.0)
        ax.set_xlabel(last)
        ax.set_title(title)
    return style.figure_of(ax)


def _mesh(ax: Axes, mean: Float[np.ndarray, "down across"], names: dict[str, list[str]]) -> None:
    scale, low, high = style.colormap(mean[np.isfinite(mean)])
    edge = 0.4 if mean.shape[1] <= 60 else 0
    ax.pcolormesh(mean, cmap=scale, vmin=low, vmax=high, edgecolors="#ffffff", linewidth=edge)
    ax.invert_yaxis()
    ax.set_ylabel(next(iter(names)))
    _ticks(ax.yaxis, next(iter(names.values())), 0.5)


def _with_picture(
    mean: Float[np.ndarray, "*down across"], names: dict[str, list[str]], inputs: Any, row: int,
    tokens: Sequence[str] | None, label: str, title: str,
) -> Figure:  # fmt: skip
    """Above: the effects of the patches over the picture, a picture a layer. Below: the grid,
    patches cut out."""
    token_map, positions = inputs.token_maps[row], [int(position) for position in names["position"]]
    grid = mean if mean.ndim == 2 else mean[None]
    down = next(iter(names.items())) if mean.ndim == 2 else ("", [""])
    shown = panels(inputs.pictures[row], token_map, 1)
    panel = max(
        shown, key=lambda panel: len(set(positions) & set(token_map.images[panel[1]].tolist()))
    )
    image, token_cells = (
        panel[0],
        {p: cell for p, cell in cells(token_map, panel).items() if p in positions},
    )
    rows = (
        sorted({round(i) for i in np.linspace(0, len(grid) - 1, min(MOST_PICTURES, len(grid)))})
        if token_cells
        else []
    )
    scale, low, high = style.colormap(grid[np.isfinite(grid)])
    width = float(np.clip(0.13 * len(positions) + 1.8, 7, 13))
    side = min(1.9, (width - 0.2) / max(len(rows), 1)) if rows else 0
    tall = side * min(1.6, image.height / image.width) + 0.35 if rows else 0
    strip = float(np.clip(0.17 * len(grid), 0.5, 3.2))
    with style.axes(None, width, tall + strip + 1.35) as first:
        figure = style.figure_of(first)
        first.remove()
        below: Any = figure
        if rows:
            halves = figure.add_gridspec(2, 1, height_ratios=[tall, strip + 1.35])
            above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
            for ax, line in zip(above.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
                values = {p: float(grid[line, positions.index(p)]) for p in token_cells}
                _over(ax, image, token_cells, values, scale, low, high)
                ax.set_title(f"{down[0]} {down[1][line]}".strip() or title, fontsize=8.5)
        # patches about as high as a column is wide
        patch = float(np.clip((width - 1.2) / len(positions), 0.1, 0.4))
        ax, foot = below.subplots(
            2, 1, height_ratios=[strip, patch], sharex=True, gridspec_kw={"hspace": 0}
        )
        _mesh(ax, grid, {down[0]: down[1]})
        ax.tick_params(bottom=False, labelbottom=False)
        bar = figure.colorbar(
            ScalarMappable(Normalize(low, high), scale), ax=[ax, foot], fraction=0.03, pad=0.01
        )
        bar.set_label(label, fontsize=8)
        bar.outline.set_visible(False)
        _foot(foot, positions, token_map, inputs.pictures[row], tokens)
        ax.set_title(title)
    return figure


def _over(
    ax: Axes,
    image: Image.Image,
    token_cells: dict[int, Any],
    values: dict[int, float],
    scale: Any,
    low: float,
    high: float,
) -> None:
    """Each patch tinted by its value, the more the further from zero."""
    grey = np.asarray(image.convert("L"), dtype=float) / 255
    ax.imshow(0.4 + 0.55 * grey, cmap="gray", vmin=0, vmax=1)
    end = max(abs(low), abs(high))
    for position, (x0, y0, x1, y1) in token_cells.items():
        value = values[position]
        if np.isfinite(value):
            alpha = 0.95 * min(1.0, abs(value) / end) ** 0.6
            ax.add_patch(
                Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    color=scale((value - low) / (high - low)),
                    alpha=alpha,
                    linewidth=0,
                )
            )
    ax.set(xlim=(0, image.width), ylim=(image.height, 0))
    ax.set_axis_off()


def _foot(
    ax: Axes,
    positions: list[int],
    token_map: TokenMap,
    pictures: Sequence[Any],
    tokens: Sequence[str] | None,
) -> None:
    """Under each column of the grid: the patch it is, or its token."""
    visual, texts = set(token_map.visual.tolist()), []
    for column, position in enumerate(positions):
        if position not in visual:
            texts.append(column)
            continue
        if len(positions) > MOST_PATCHES:
            continue
        number = next(i for i, of in enumerate(token_map.images) if position in of.tolist())
        frames, cell = token_map.frames(position), token_map.cell(position)[1:]
        image = pictures[number][frames[0]] if frames else pictures[number]
        part = image.crop(tuple(round(edge) for edge in cell)).resize((24, 24)).convert("RGB")
        ax.imshow(np.asarray(part), extent=(column, column + 1, 0, 1), aspect="auto")
    words = [
        (tokens[positions[i]].replace("\n", "↵").strip() or "␣")
        if tokens is not None
        else str(positions[i])
        for i in texts
    ]
    ax.set_xticks([i + 0.5 for i in texts], words, rotation=90, fontsize=6.5, parse_math=False)
    ax.set(xlim=(0, len(positions)), ylim=(0, 1), yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_xlabel(
        "position" + (" (patches of the picture cut out)" if len(texts) < len(positions) else "")
    )


def _ticks(axis: Any, labels: Sequence[str], offset: float) -> None:
    step = max(1, -(-len(labels) // 24))
    shown = range(0, len(labels), step)
    axis.set_ticks([i + offset for i in shown], [labels[i] for i in shown])
    if axis.axis_name == "x" and max(len(label) for label in labels) > 3:
        axis.set_tick_params(rotation=60)


def _as_grid(
    mean: np.ndarray, labels: Sequence[str]
) -> tuple[np.ndarray, dict[str, list[str]]] | None:
    """Values whose labels are heads ("L3H5"), as [layer, head] with NaN where there is none; None
    for other labels."""
    heads = [re.fullmatch(r"L(\d+)H(\d+)", label) for label in labels]
    if len(heads) < 12 or not all(heads):
        return None
    layer_heads = [(int(head[1]), int(head[2])) for head in heads if head]
    grid = np.full([1 + max(axis) for axis in zip(*layer_heads, strict=True)], np.nan)
    for layer_head, value in zip(layer_heads, mean, strict=True):
        grid[layer_head] = value
    return grid, {
        "layer": [str(i) for i in range(len(grid))],
        "head": [str(i) for i in range(grid.shape[1])],
    }
