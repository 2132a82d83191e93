"""How CoreLens's pictures look: colours that survive colour blindness, print and dark pages, and
words with units."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from corelens.viz.view import LiveFigure

# Okabe and Ito 2008, "Color universal design": told apart under every common colour blindness
INK, SOFT, RULE = "#22262b", "#6b7177", "#d9dcdf"
HOT, BLUE, GREEN, GREY, GOLD, PURPLE = (
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#7f858b",
    "#e69f00",
    "#a4568c",
)
CIVIDIS = matplotlib.colormaps["cividis"]
MARKS = ListedColormap(["#ececea", HOT])
CYCLE = (HOT, BLUE, GREEN, GREY, PURPLE, GOLD)
MARKERS = ("o", "s", "^", "D", "v", "P")  # lines differ in form too: print may be grey

# one-way scales from the page's colour to its opposite; luminance falls (rises) all the way, so
# grey print is readable
LIGHT_STOPS = ("#f4f4f1", "#dbe8c6", "#93cfb1", "#45a5b4", "#2a6b9f", "#1d2a64")
DARK_STOPS = ("#23272e", "#2b3f6d", "#2c6f96", "#43a59d", "#9fd58c", "#f6f2a8")
# two-way: blue below zero, orange above
LIGHT_TWO = ("#0b4a7d", "#5f9fcb", "#f4f4f1", "#ee9a52", "#a33b00")
DARK_TWO = ("#7cc3f2", "#2f6b99", "#23272e", "#b0561c", "#ffb070")

# the first of these that the machine has (matplotlib grumbles about each that it has not)
_FOUND = set(font_manager.get_font_names())
FONT = [
    f
    for f in ("Inter", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "Liberation Sans")
    if f in _FOUND
][:1]
RC: Any = {
    "font.family": [*FONT, "DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid.axis": "y",
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.dpi": 110,
    "savefig.dpi": 200,
}

# what a score is called in print, and its unit
NAMES = {
    "ram": ("RAM", "attention mass"),
    "calibrated_ram": ("calibrated RAM", "attention mass"),
    "visual_mass": ("visual mass", "attention mass"),
    "gaze": ("gaze", "attention mass"),
    "precision": ("precision", "share of visual mass"),
    "lift": ("lift", "times chance"),
    "value_mass": ("value mass", "norm"),
    "retrieval": ("retrieval score", "hits a token"),
    "visual_head": ("visual-head score", "share of all heads"),
    "qr": ("QRHead score", "attention mass"),
    "localization": ("localization", "share of samples"),
    "duo_attention": ("DuoAttention gate", "0 to 1"),
}


def colormap(values: np.ndarray, dark: bool = False) -> tuple[Colormap, float, float]:
    """A colour scale and its ends for these values: one-way from zero, two-way if a good part lies
    below zero."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if low < -0.1 * abs(high):
        end = max(-low, high) or 1.0
        return LinearSegmentedColormap.from_list("two", DARK_TWO if dark else LIGHT_TWO), -end, end
    return (
        LinearSegmentedColormap.from_list("one", DARK_STOPS if dark else LIGHT_STOPS),
        0.0,
        max(high, 0) or 1.0,
    )


def hexes(values: np.ndarray, steps: int, dark: bool = False) -> list[str]:
    """The `steps` colours of the scale, lowest first."""
    scale, _, _ = colormap(values, dark)
    return [to_hex(scale(i / (steps - 1))) for i in range(steps)]


def words(scores: Any) -> tuple[str, str, str]:
    """Name, unit and choice of rows of a HeadScores: ("RAM", "attention mass", "max over question
    rows")."""
    name, unit = NAMES.get(str(scores.meta.get("metric", "")), (scores.label, ""))
    rows, reduce = scores.meta.get("rows"), scores.meta.get("reduce")
    detail = f"{reduce} over {rows} rows" if rows and reduce else f"{rows} rows" if rows else ""
    detail = "last row" if rows == "last" else detail  # one row needs no reduction
    return name, str(scores.meta.get("unit", unit)), detail


def axis_label(scores: Any) -> str:
    """Name and unit in one line."""
    name, unit, _ = words(scores)
    return f"{name} ({unit})" if unit else name


@contextmanager
def axes(ax: Axes | None, width: float, height: float) -> Iterator[Axes]:
    """Axes to draw on: the given ones, or those of a new figure of this size in inches.

    A new figure is closed for pyplot at once, so that a notebook shows it once (as the cell's
    value), not twice.
    """
    with plt.rc_context(RC):
        if ax is None:
            figure, ax = plt.subplots(
                figsize=(width, height), layout="constrained", FigureClass=LiveFigure
            )
            plt.close(figure)
        yield ax


def figure_of(ax: Axes) -> Figure:
    """The figure that axes belong to."""
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def name_points(ax: Axes, points: Sequence[tuple[str, float, float]], colour: str) -> None:
    """Write names beside points (name, x, y), apart from one another; the axes' limits must be set.

    Names in the upper half are pushed down where two would stand on one another, names in the lower
    half up.
    """
    pixels = (
        ax.transData.transform([(x, y) for _, x, y in points]).reshape(-1, 2)
        * 72
        / figure_of(ax).dpi
    )
    middle = ax.transAxes.transform((0, 0.5))[1] * 72 / figure_of(ax).dpi
    taken: list[tuple[float, float]] = []
    for i in sorted(range(len(points)), key=lambda i: -abs(pixels[i, 1] - middle)):
        (across, up), step = pixels[i], -9 if pixels[i, 1] > middle else 9  # in points
        height = up + 3
        while any(abs(left - across) < 32 and abs(line - height) < 9 for left, line in taken):
            height += step
        taken.append((across, height))
        name, x, y = points[i]
        words = ax.annotate(
            name, (x, y), (8, height - up), textcoords="offset points", va="center", fontsize=7.5
        )
        # over other points too
        words.set(color=colour, path_effects=[withStroke(linewidth=2, foreground="white")])


def ticks(count: int) -> list[int]:
    """Which of `count` cells are numbered: at most sixteen, at a round distance."""
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 50) if count / s <= 16 or s == 50)
    return list(range(0, count, step))
