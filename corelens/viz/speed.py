"""What sparse inference gains and costs: speed-ups beside their limits, accuracy over what is left
out."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from corelens.errors import CorelensError
from corelens.viz import style
from corelens.viz.curves import LOOK

if TYPE_CHECKING:
    from corelens.evaluation.speed_report import SpeedReport

SPEED_LOOK = LOOK | {
    "by score": LOOK["top"],
    "uniform": LOOK["bottom"],
    "dealt at random": LOOK["random"],
    "no full head": (style.PURPLE, "v"),
}
Points = Sequence[tuple[float, float, float, float]]  # (x, accuracy, low, high)


def speed_bars(report: "SpeedReport") -> Figure:
    """Left: each phase's speed-up with its quartiles, and what the operation count allows. Right:
    both accuracies."""
    from corelens.evaluation.speed_report import PHASES

    with plt.rc_context(style.RC):
        figure, (left, right) = plt.subplots(
            1,
            2,
            figsize=(7.6, 0.45 * len(report.phases) + 1.3),
            width_ratios=(3.2, 1),
            layout="constrained",
        )
        plt.close(figure)
        names = report.phases[::-1]
        for y, phase in enumerate(names):
            ratio, limit = report.speedup(phase), report.limit(phase)
            colour = style.BLUE if ratio.high < 1 else style.HOT if ratio.low > 1 else style.GREY
            left.plot(
                [1, ratio.median],
                [y, y],
                color=colour,
                linewidth=6,
                alpha=0.25,
                solid_capstyle="butt",
            )
            left.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=1.6)
            left.plot(
                ratio.median, y, marker="o", color=colour, markersize=6, markeredgecolor="white"
            )
            left.annotate(
                f"{ratio.median:.2f}x",
                (ratio.median, y),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
            if limit is not None:
                left.plot(limit, y, marker="|", color=style.INK, markersize=14, markeredgewidth=1.6)
        if any(report.limit(phase) is not None for phase in names):
            left.plot(
                [],
                [],
                "|",
                color=style.INK,
                markersize=10,
                markeredgewidth=1.6,
                label="what the operation count allows",
            )
            left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), borderpad=0)
        left.axvline(1, color=style.SOFT, linewidth=0.9)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        low, high = left.get_xlim()
        left.set(
            yticks=range(len(names)),
            yticklabels=[PHASES[n] for n in names],
            ylim=(-0.6, len(names) - 0.2),
        )
        left.set(
            xlabel="speed-up: dense time / sparse time, quartiles",
            xlim=(min(low, 0.7), max(high, 1.45)),
        )
        left.grid(axis="y", visible=False)
        for x, (interval, colour) in enumerate(
            ((report.dense.accuracy, style.GREY), (report.sparse.accuracy, style.HOT))
        ):
            right.plot([x, x], [interval.low, interval.high], color=colour, linewidth=1.6)
            right.plot(
                x, interval.value, marker="o", color=colour, markersize=6, markeredgecolor="white"
            )
            right.annotate(
                f"{interval.value:.2f}",
                (x, interval.value),
                (8, 0),
                textcoords="offset points",
                va="center",
            )
        right.set(xticks=(0, 1), xticklabels=("dense", "sparse"), xlim=(-0.5, 1.8), ylim=(0, 1.05))
        right.set(ylabel="accuracy (95% CI)")
        right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def speed_curves(
    panels: Mapping[str, Mapping[str, Points]],
    xlabel: str,
    baseline: float | None = None,
    chance: float | None = None,
    ylabel: str = "accuracy",
    columns: int = 4,
    percent: bool = True,
) -> Figure:
    """Accuracy over what is kept: a panel a share of full heads (or whatever `panels` names), a
    line a choice of heads.

    Args:
        panels: {title: {line: [(x, value, low, high), …]}}; lines of one name look the same in
            every panel.
        xlabel: what x is (a window, tokens kept …), drawn in powers of two.
        baseline: dense; chance: of guessing.
    """
    if not panels or any(not points for curves in panels.values() for points in curves.values()):
        raise CorelensError(
            "no panels, or a line without points",
            "{title: {line: [(x, …), …]}}",
            "measure something",
        )
    looks = _looks(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(style.RC):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(max(2.5 * columns + 0.9, 6.0), 2.3 * rows + 1.0),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        plt.close(figure)
        for ax in grid.flat[len(panels) :]:
            ax.set_visible(False)
        for ax, (title, curves) in zip(grid.flat, panels.items(), strict=False):
            _panel(ax, curves, looks)
            for level, words in ((baseline, "dense"), (chance, "chance")):
                if level is not None:
                    ax.axhline(
                        level, color=style.SOFT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1
                    )
                    ax.annotate(
                        words, (0.01, level), (0, 2), xycoords=("axes fraction", "data"),
                        textcoords="offset points",
                        fontsize=7.5, color=style.SOFT,
                    )  # fmt: skip
            ax.set_title(title)
            if percent:
                ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
                ax.set_ylim(0, 1.06)
        for ax in grid[:, 0]:
            ax.set_ylabel(f"{ylabel} (95% CI)")
        for ax in grid[-1]:
            ax.set_xlabel(xlabel)
        handles: dict[Any, Any] = {}
        for ax in grid.flat:
            curves_of_panel, labels = ax.get_legend_handles_labels()
            handles |= dict(zip(labels, curves_of_panel, strict=True))
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center",
            ncols=min(5, len(handles)),
            handlelength=1.8,
        )  # fmt: skip
    return figure


def _looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each line: the controls look as in every report."""
    spare = iter(
        [*zip((style.GOLD, "#56b4e9", style.INK, style.PURPLE), ("P", "X", "*", "v"), strict=True)]
        * 8
    )
    return {name: SPEED_LOOK.get(name) or next(spare) for name in names}


def _panel(ax: Axes, curves: Mapping[str, Points], looks: Mapping[str, tuple[str, str]]) -> None:
    """Each line a little to the side of the last: lines that agree would hide one another."""
    ticks = sorted({point[0] for points in curves.values() for point in points})
    octaves = np.log2(ticks)
    # octaves
    apart = min(0.035 * np.ptp(octaves), 0.1 * np.diff(octaves).min()) if len(ticks) > 1 else 0.1
    for number, (name, points) in enumerate(curves.items()):
        colour, marker = looks[name]
        x, value, low, high = np.array(sorted(points), dtype=float).T
        x = x * 2 ** ((number - (len(curves) - 1) / 2) * apart)
        ax.vlines(x, low, high, color=colour, alpha=0.55, linewidth=1.4)
        ax.plot(
            x, value, color=colour, marker=marker, markersize=4.5, markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=1.2, label=name,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_axisbelow(True)


def trade_off(
    curves: Mapping[str, Sequence[tuple[float, float, float, float, int]]],
    dense: float,
    target: float,
    xlabel: str,
    picked: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy over speed, one line a share of full heads, each point named by its window.

    Args:
        curves: {share: [(speed-up, accuracy, low, high, window), …]}.
        dense: its accuracy. target: what may be lost of it, drawn as a band.
        picked: (speed-up, accuracy) of the setting to ring.
    """
    looks = dict(zip(curves, cycle(zip(style.CYCLE, style.MARKERS, strict=True)), strict=False))
    with style.axes(ax, 5.4, 3.4) as ax:
        ax.axhspan(dense - target, 1.06, color=style.GREEN, alpha=0.08, linewidth=0)
        ax.axhline(dense, color=style.SOFT, linestyle=(0, (4, 3)), linewidth=0.9)
        ax.annotate("dense", (0.01, dense), (0, 2), xycoords=("axes fraction", "data"),
                    textcoords="offset points", fontsize=7.5, color=style.SOFT)  # fmt: skip
        for number, (name, points) in enumerate(curves.items()):
            colour, marker = looks[name]
            x, value, low, high, window = np.array(
                sorted(points, key=lambda point: point[4]), dtype=float
            ).T
            ax.vlines(x, low, high, color=colour, alpha=0.3, linewidth=1.2)
            ax.plot(
                x,
                value,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=name,
            )
            for i in range(len(x)):
                ax.annotate(
                    f"{window[i]:g}",
                    (x[i], value[i]),
                    (0, -12 - 8 * number),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color=colour,
                )
        if picked is not None:
            ax.plot(
                *picked,
                marker="o",
                markersize=13,
                markerfacecolor="none",
                color=style.INK,
                linestyle="none",
            )
        ax.axvline(1, color=style.SOFT, linewidth=0.7)
        ax.set(xlabel=xlabel, ylabel="accuracy (95% CI)", ylim=(0, 1.06))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.legend(title="heads", title_fontsize=8.5, alignment="left")
    return style.figure_of(ax)
