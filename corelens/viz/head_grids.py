"""The layer × head grid: a static picture, and an interactive one that names head, score and
interval on hover."""

from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores, HeadSet
from corelens.viz import style
from corelens.viz.view import LiveFigure, View, beside, live_script

STEPS = 32  # colours on the interactive grid's scale


def head_grid(
    scores: HeadScores, highlight: HeadSet | None = None, ax: Axes | None = None
) -> Figure:
    """Every head's score as a colour: layers downwards, heads across; `highlight` outlines some
    heads.

    The scale begins at zero (two-way around zero if a good part of the scores is negative); its
    unit stands at the bar.

    Returns:
        A matplotlib figure. A notebook shows `head_grid_html` in its place;
        `figure.save_html(path)` writes that.
    """
    layers, heads = scores.values.shape
    own = ax is None
    scale, low, high = style.colormap(scores.values)
    cell = min(0.3, 6.2 / heads, 6.6 / layers)
    with style.axes(ax, max(2.9, heads * cell + 1.5), max(1.5, layers * cell + 0.75)) as ax:
        mesh = ax.pcolormesh(
            scores.values, cmap=scale, vmin=low, vmax=high, edgecolors="#ffffff",
            linewidth=min(0.8, cell * 3),
            rasterized=scores.values.size > 3000,
        )  # fmt: skip
        ax.set_aspect("equal")
        ax.invert_yaxis()
        for axis, count in ((ax.xaxis, heads), (ax.yaxis, layers)):
            shown = style.ticks(count)
            axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
        ax.tick_params(length=0)
        ax.set(xlabel="head", ylabel="layer")
        ax.spines[:].set_visible(False)
        for layer, head in (highlight or HeadSet()).check(layers, heads):
            ax.add_patch(
                Rectangle(
                    (head, layer), 1, 1, fill=False, edgecolor=style.HOT, linewidth=1.8, zorder=3
                )
            )
        bar = style.figure_of(ax).colorbar(
            mesh, ax=ax, fraction=0.05, pad=0.025, aspect=max(8, layers * 1.4)
        )
        ax.set_title(style.words(scores)[2], fontweight="normal", fontsize=8.5, color=style.SOFT)
        bar.set_label(style.axis_label(scores))
        bar.outline.set_visible(False)
        bar.ax.locator_params(nbins=5)
    figure = style.figure_of(ax)
    if own and isinstance(figure, LiveFigure):
        caption = "Hover a head for its score and its 95% interval over samples."
        title = f"{style.words(scores)[0]} of every head"
        figure.make_view = lambda: View(title, Markup(head_grid_html(scores, highlight)), caption)
    return figure


def head_grid_html(
    scores: HeadScores,
    highlight: HeadSet | None = None,
    ci: "tuple[np.ndarray, np.ndarray] | None" = None,
) -> str:
    """The grid as offline HTML: hovering (or tabbing to) a head shows "L3H5  RAM 0.42 [0.38,
    0.47]".

    Args:
        highlight: heads to outline.
        ci: (low, high), each [layer, head]; computed from the samples if not given and there are
            any.
    Returns:
        One HTML element with its style and a few lines of script; no file and no network behind it.
    """
    layers, heads = scores.values.shape
    if ci is None and scores.per_sample is not None and len(scores.per_sample) > 1:
        ci = scores.ci()
    if ci is not None and (
        ci[0].shape != scores.values.shape or ci[1].shape != scores.values.shape
    ):
        raise CorelensError(
            f"an interval of shape {ci[0].shape}",
            f"{scores.values.shape}",
            "use the scores' own ci()",
        )
    name, _, detail = style.words(scores)
    _, low, high = style.colormap(scores.values)
    index = np.clip(
        np.round((scores.values - low) / (high - low) * (STEPS - 1)), 0, STEPS - 1
    ).astype(int)
    highlighted = (highlight or HeadSet()).mask(layers, heads)
    # the colours of a light page stand in the cells: some viewers of notebooks drop style sheets
    colours = style.hexes(scores.values, STEPS)
    side, gap, left, top = round(np.clip(620 / heads, 13, 30)), 2, 40, 34  # pixels
    width, height = left + heads * (side + gap), top + layers * (side + gap)
    cells = []
    for layer in range(layers):
        for head in range(heads):
            label = f"L{layer}H{head}  {name} {scores.values[layer, head]:.3g}"
            if ci is not None:
                label += f" [{ci[0][layer, head]:.3g}, {ci[1][layer, head]:.3g}]"
            mark = " on" if highlighted[layer, head] else ""
            cells.append(
                f'<rect x="{left + head * (side + gap)}" y="{top + layer * (side + gap)}" '
                f'width="{side}" height="{side}" rx="2" fill="{colours[index[layer, head]]}" '
                f'class="c{index[layer, head]}{mark}"><title>{escape(label)}</title></rect>'
            )
    labels = [
        _label(left + i * (side + gap) + side / 2, top - 6, "middle", i) for i in style.ticks(heads)
    ]
    labels += [
        _label(left - 6, top + i * (side + gap) + side / 2 + 3.5, "end", i)
        for i in style.ticks(layers)
    ]
    labels.append(_label(left, 12, "start", "head"))
    labels.append(
        f'<g transform="translate(10 {top}) rotate(-90)">{_label(0, 0, "end", "layer")}</g>'
    )
    stops = "".join(
        f'<i class="b{i}" style="background:{colour}"></i>' for i, colour in enumerate(colours)
    )
    words = " · ".join(part for part in (style.axis_label(scores), detail) if part)
    marked = '<span class="key"><i></i>highlighted</span>' if highlighted.any() else ""
    return (
        f'<div class="cl-live cl-grid {_scale(scores.values)}" '
        f"data-tips><style>{_css(scores.values)}</style>"
        f'<div class="wide"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" '
        f'aria-label="{escape(name)} of {layers} layers by {heads} heads">'
        f"{''.join(labels)}{''.join(cells)}</svg></div>"
        f'<div class="legend"><span>{low:.3g}</span><span '
        f'class="bar">{stops}</span><span>{high:.3g}</span>'
        f"<span>{escape(words)}</span>{marked}</div>"
        f'<output class="tip" hidden></output>{live_script()}</div>'
    )


def _label(x: float, y: float, anchor: str, text: Any) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>'


def _scale(values: np.ndarray) -> str:
    """Grids of both scales may stand in one notebook: each has the class of its own."""
    return "cl-two" if style.colormap(values)[1] < 0 else "cl-one"


def _css(values: np.ndarray) -> str:
    light, dark, view = (
        style.hexes(values, STEPS),
        style.hexes(values, STEPS, dark=True),
        _scale(values),
    )
    both = [f"light-dark({a},{b})" for a, b in zip(light, dark, strict=True)]
    scale = "".join(
        f".{view} .c{i}{{fill:{colour}}}.{view} .b{i}{{background:{colour}!important}}"
        for i, colour in enumerate(both)
    )
    return f"{scale}{beside('live.css')}"
