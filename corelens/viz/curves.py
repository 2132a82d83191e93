"""Lines with their uncertainty: scores from the highest head to the lowest, and what ablating heads
costs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.viz import style

LOOK = {  # the controls look the same in every report
    "top": (style.HOT, "o"),
    "given": (style.HOT, "o"),
    "bottom": (style.BLUE, "s"),
    "random": (style.GREY, "D"),
    "layer-matched": (style.GREEN, "^"),
}


def sorted_scores(
    scores: HeadScores, fraction: float = 0.05, ax: Axes | None = None, name_heads: int = 4
) -> Figure:
    """Scores sorted from the highest head to the lowest; the top `fraction` is marked with what it
    holds of the whole.

    The band is each head's 95% bootstrap interval over samples, where per-sample scores are known.
    """
    order = scores.top(1.0)
    values = np.array([scores.values[head] for head in order])
    rank = np.arange(1, len(values) + 1)
    k = len(scores.top(fraction))
    with style.axes(ax, 4.6, 2.9) as ax:
        if scores.per_sample is not None and len(scores.per_sample) > 1:
            low, high = scores.ci()
            low, high = (np.array([bound[head] for head in order]) for bound in (low, high))
            ax.fill_between(
                rank, low, high, color=style.GREY, alpha=0.28, linewidth=0, label="95% CI"
            )
        ax.plot(rank, values, color=style.GREY, linewidth=1.2)
        ax.plot(
            rank[:k], values[:k], color=style.HOT, marker="o", markersize=4.5 if k < 25 else 2.5,
            linewidth=1.4,
            label=f"top {fraction:.0%}: {k} of {len(values)} heads, "
                f"{scores.mass_of_top(fraction):.0%} of the sum",
        )  # fmt: skip
        ax.set(xlabel="heads, from the highest to the lowest", ylabel=style.axis_label(scores))
        ax.set_xlim(0, len(values) + 1)
        if values.min() >= 0:
            ax.set_ylim(0)
        ax.legend(
            loc="upper right",
            title=style.words(scores)[2] or None,
            title_fontsize=8.5,
            alignment="left",
        )
        _name(ax, [str(head) for head in order[: min(k, name_heads)]], values)
    return style.figure_of(ax)


def cost_bars(labels: Sequence[str], costs: Sequence[tuple[float, float, float]]) -> Figure:
    """What each group of rows costs when the evidence is cut off from it: (accuracy lost, low,
    high), one bar each."""
    value, low, high = np.array(costs).T
    heights = np.arange(len(labels))[::-1]
    with style.axes(None, 4.6, 0.6 + 0.24 * len(labels)) as ax:
        errors = np.clip([value - low, high - value], 0, None)
        ax.barh(
            heights,
            value,
            xerr=errors,
            color=style.HOT,
            ecolor=style.INK,
            height=0.62,
            error_kw={"linewidth": 0.9},
        )
        ax.set(yticks=heights, yticklabels=labels, xlabel="accuracy lost, 95% interval")
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.axvline(0, color=style.SOFT, linewidth=0.7)
    return style.figure_of(ax)


def recall_curve(recall: Sequence[tuple[float, float, float]], random: Sequence[float]) -> Figure:
    """Recall at k = 1, 2, …: (value, low, high) each, and what pages in random order give."""
    value, low, high = np.array(recall).T
    k = np.arange(1, len(value) + 1)
    with style.axes(None, 3.6, 2.7) as ax:
        ax.fill_between(k, low, high, color=style.HOT, alpha=0.2, linewidth=0, label="95% CI")
        ax.plot(
            k,
            value,
            color=style.HOT,
            marker="o",
            markersize=4,
            label="pages by the heads' attention",
        )
        ax.plot(k, random, color=style.GREY, linestyle="--", label="pages in random order")
        ax.set(
            xlabel="k, pages read", ylabel="recall of evidence pages at k", xticks=k, ylim=(0, 1.05)
        )
        ax.legend(loc="lower right")
    return style.figure_of(ax)


def _name(ax: Axes, names: list[str], values: np.ndarray) -> None:
    """Write names beside the first points, pushed down where two would stand on one another."""
    points = 72 / style.figure_of(ax).dpi
    above = np.inf
    for i, name in enumerate(names):
        y = ax.transData.transform((i + 1, values[i]))[1] * points
        above = min(y, above - 10)
        ax.annotate(
            name,
            (i + 1, values[i]),
            (8, above - y),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=style.HOT,
        )


def ablation_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]],
    baseline: float | None = None,
    chance: float | None = None,
    ax: Axes | None = None,
    ylabel: str = "accuracy",
) -> Figure:
    """What ablating a share of all heads costs, one line a choice of heads, 95% intervals as bands.

    Where there is one share only, the choices stand side by side.

    Args:
        curves: {"top": [(fraction, mean, low, high), …], "bottom": …, "random": …, "layer-matched":
            …}; other labels get colours of their own. Fractions, means and bounds between 0 and 1.
        baseline: accuracy with no head ablated; chance: accuracy of guessing.
    """
    if not curves or any(not points for points in curves.values()):
        raise CorelensError(
            "no curves, or one without points",
            "{label: [(fraction, mean, low, high), …]}",
            "run a sweep",
        )
    spare = iter(
        [*zip((style.PURPLE, style.GOLD, "#56b4e9", style.INK), ("v", "P", "X", "*"), strict=True)]
        * 4
    )
    with style.axes(ax, 4.8, 3.1) as ax:
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        shares = sorted({point[0] for points in curves.values() for point in points})
        for number, (label, points) in enumerate(curves.items()):
            colour, marker = LOOK[label] if label in LOOK else next(spare)
            x, mean, low, high = np.array(sorted(points), dtype=float).T
            if len(shares) == 1:
                x = np.array([float(number)])
                ax.vlines(x, low, high, color=colour, linewidth=1.6)
            # each line a little to the side of the last: lines that agree would hide one another
            else:
                x = x + (number - (len(curves) - 1) / 2) * 0.012 * (shares[-1] - shares[0])
            ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
            ax.plot(
                x,
                mean,
                color=colour,
                marker=marker,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                label=label,
            )
        for level, words in ((baseline, "no ablation"), (chance, "chance")):
            if level is not None:
                ax.axhline(level, color=style.SOFT, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
                ax.annotate(
                    words, (1, level), (4, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    va="center", fontsize=8, color=style.SOFT, annotation_clip=False,
                )  # fmt: skip
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(ylabel=f"{ylabel} (95% CI)", ylim=(0, 1.02))
        if len(shares) == 1:
            ax.set_xticks(range(len(curves)), list(curves))
            ax.set(
                xlabel=f"heads ablated, {100 * shares[0]:.3g}% of all",
                xlim=(-0.5, len(curves) - 0.5),
            )
        else:
            ax.set_xticks(shares, [f"{share:.3g}" for share in np.array(shares) * 100])
            ax.set_xlabel("heads ablated, % of all")
            ax.legend(loc="best", handlelength=1.6)
    return style.figure_of(ax)
