"""Figures of the findings' notebooks: overlaps, depth profiles, clouds of heads, what kept heads
keep."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from corelens.heads.scores import HeadScores
from corelens.viz import style

COLOURS, MARKERS = (style.PURPLE, style.GOLD, style.BLUE, style.GREY), ("v", "P", "s", "D")


def overlap(
    scores: Mapping[str, HeadScores], fraction: float, chance: float, ax: Axes | None = None
) -> Figure:
    """How far the same heads score high in several worlds.

    Args:
        scores: {world: scores of one model}.
        fraction: of the heads in the top sets.
        chance: the Jaccard overlap that 95% of random pairs of sets do not exceed; what exceeds it
            is set bold.
    Returns:
        A matrix: Spearman's rank correlation above the diagonal, Jaccard overlap of the top sets
        below it.
    """
    names = list(scores)
    n = len(names)
    values = np.full((n, n), np.nan)
    with style.axes(ax, 0.95 * n + 1.6, 0.72 * n + 1.1) as ax:
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                if i != j:
                    agreement = scores[a].agreement(scores[b], fraction)
                    values[i, j] = agreement.spearman if i < j else agreement.jaccard
        scale = LinearSegmentedColormap.from_list("one", style.LIGHT_STOPS)
        ax.pcolormesh(
            np.clip(values, 0, 1), cmap=scale, vmin=0, vmax=1, edgecolors="#ffffff", linewidth=2
        )
        for i, j in np.argwhere(~np.isnan(values)):
            strong = values[i, j] > (0.5 if i < j else chance)
            ax.text(
                j + 0.5, i + 0.5, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=9.5,
                color="#ffffff" if values[i, j] > 0.55 else style.INK,
                fontweight="bold" if strong else "normal",
            )  # fmt: skip
        ax.invert_yaxis()
        ax.set_xticks(np.arange(n) + 0.5, names, rotation=20, ha="right")
        ax.set_yticks(np.arange(n) + 0.5, names)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(
            "ρ above, Jaccard below the diagonal",
            fontweight="normal",
            fontsize=8.5,
            color=style.SOFT,
        )
    return style.figure_of(ax)


def depth_profiles(
    profiles: Mapping[str, Sequence[float]], depths: Mapping[str, float], ax: Axes | None = None
) -> Figure:
    """Where models of several scales hold their score: each layer's share of it over relative
    depth.

    Args:
        profiles: {model: mean score of each layer}; drawn times the number of layers, so that 1 is
            an even spread.
        depths: {model: mean relative depth of its top heads}, marked on the line.
    """
    with style.axes(ax, 6.4, 2.9) as ax:
        ax.axhline(1, color=style.SOFT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        for i, (name, profile) in enumerate(profiles.items()):
            share = np.array(profile) / max(float(np.sum(profile)), 1e-12) * len(profile)
            depth, cycle = np.linspace(0, 1, len(profile)), i % len(style.CYCLE)
            ax.plot(depth, share, color=style.CYCLE[cycle], linewidth=1.4, label=name)
            here, marker = np.interp(depths[name], depth, share), style.MARKERS[cycle]
            ax.plot(
                depths[name],
                here,
                marker,
                color=style.CYCLE[cycle],
                markersize=8,
                markeredgecolor="white",
            )
        ax.set(
            xlabel="relative depth (0: first layer, 1: last)",
            ylabel="layer's share, times even",
            ylim=(0, None),
        )
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.4)
    return style.figure_of(ax)


def head_cloud(
    spread: np.ndarray, precision: np.ndarray, marked: np.ndarray, ax: Axes | None = None
) -> Figure:
    """Every head by how widely it looks over the picture (x) and how precisely (y); the chosen ones
    are marked."""
    with style.axes(ax, 4.6, 3.0) as ax:
        ax.scatter(
            spread[~marked],
            precision[~marked],
            s=16,
            color=style.GREY,
            alpha=0.6,
            linewidth=0,
            label="others",
        )
        ax.scatter(
            spread[marked],
            precision[marked],
            s=34,
            color=style.HOT,
            edgecolor="white",
            linewidth=0.6,
            label="top heads",
        )
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(
            xlabel="share of the picture it spreads over",
            ylabel="precision",
            xlim=(0, 1.02),
            ylim=(0, 1.02),
        )
        named = [
            (f"L{i}H{j}", float(spread[i, j]), float(precision[i, j]))
            for i, j in np.argwhere(marked)[:8]
        ]
        style.name_points(ax, named, style.HOT)
        ax.legend(loc="upper right")
    return style.figure_of(ax)


def kept_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    clean: float,
    blind: float,
    ax: Axes | None = None,
) -> Figure:
    """Accuracy when only some heads see the picture, one line a choice of heads, 95% intervals as
    bands."""
    with style.axes(ax, 5.2, 3.1) as ax:
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        for i, (label, line) in enumerate(curves.items()):
            x, mean, low, high = np.array(sorted(line), dtype=float).T
            ax.fill_between(x, low, high, color=COLOURS[i], alpha=0.16, linewidth=0)
            ax.plot(x, mean, color=COLOURS[i], marker=MARKERS[i], markersize=5, label=label)
        for level, words in ((clean, "all see"), (blind, "none sees")):
            ax.axhline(level, color=style.SOFT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
            ax.annotate(
                words, (1, level), (4, 0), xycoords=("axes fraction", "data"),
                textcoords="offset points", va="center",
                fontsize=8, color=style.SOFT, annotation_clip=False,
            )  # fmt: skip
        shares = sorted({point[0] for line in curves.values() for point in line})
        ax.set_xscale("log")
        ax.set_xticks(shares, [f"{100 * share:.3g}" for share in shares])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(
            xlabel="heads that see the picture, % of all",
            ylabel="accuracy (95% CI)",
            ylim=(-0.02, 1.02),
        )
        ax.legend(loc="best", handlelength=1.6)
    return style.figure_of(ax)
