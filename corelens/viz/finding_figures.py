"""The small figures of a study's report: measured values with intervals, their controls and their
threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corelens.viz import style

Numbers = Mapping[str, Any]


@dataclass
class Mark:
    """One line of the figure: a value, the interval around it, and the controls that it is compared
    with.

    Args:
        name: a world, a pair of worlds, a budget.
        value, low, high: the measured value; low and high are the value itself where there is no
            interval.
        controls: values of random sets, drawn as small ticks.
        other: a second value on the line (the bottom heads), hollow.
    """

    name: str
    value: float
    low: float
    high: float
    controls: Sequence[float] = field(default_factory=tuple)
    other: float | None = None


@dataclass
class Panel:
    """What a finding's figure shows: marks, the threshold, and the axis."""

    marks: list[Mark]
    threshold: float | None
    label: str
    limits: tuple[float, float] | None = (0.0, 1.0)


def finding_figure(id: str, model: Numbers, thresholds: Mapping[str, float]) -> Figure | None:
    """The figure of a finding on a model, from their part of report.json; None where nothing was
    measured.

    Args:
        id: "F1" to "F8".
        model: report["models"][name].
        thresholds: {finding: the value that is drawn as a dashed line}.
    """
    panel = PANELS[id](model, thresholds.get(id))
    return marks_figure(panel) if panel.marks else None


def marks_figure(panel: Panel, ax: Axes | None = None) -> Figure:
    """Values with intervals, one line each, controls as ticks, the threshold dashed."""
    with style.axes(ax, 2.7, 0.42 + 0.26 * len(panel.marks)) as ax:
        for y, mark in enumerate(panel.marks):
            ax.plot(
                mark.controls,
                np.full(len(mark.controls), y),
                "|",
                color=style.GREY,
                markersize=6,
                alpha=0.5,
            )
            ax.plot([mark.low, mark.high], [y, y], color=style.HOT, linewidth=1.6)
            ax.plot(mark.value, y, "o", color=style.HOT, markersize=5)
            if mark.other is not None:
                ax.plot(mark.other, y, "o", color=style.BLUE, markersize=5, fillstyle="none")
        if panel.threshold is not None:
            ax.axvline(panel.threshold, color=style.INK, linestyle=(0, (3, 3)), linewidth=0.9)
        if panel.limits is not None:
            ax.set_xlim(panel.limits[0] - 0.03, panel.limits[1] + 0.03)
        ax.set_ylim(len(panel.marks) - 0.5, -0.5)
        ax.set_yticks(range(len(panel.marks)), _short([mark.name for mark in panel.marks]))
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(panel.label)
    return style.figure_of(ax)


def _short(names: Sequence[str]) -> list[str]:
    """Names of at most 18 characters, so that they leave room for the axis; whole where two would
    become alike."""
    cut = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    return [name if cut.count(short) > 1 else short for name, short in zip(names, cut, strict=True)]


def _measured(model: Numbers, id: str) -> list[tuple[str, Numbers]]:
    return [
        (name, world["numbers"][id])
        for name, world in model["worlds"].items()
        if id in world["numbers"]
    ]


def _sparsity(model: Numbers, threshold: float | None) -> Panel:
    marks = [Mark(name, **x[x["judged"]]["half_in"]) for name, x in _measured(model, "F1")]
    return Panel(marks, threshold, "share of heads with half the excess", (0.0, 0.5))


def _stability(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F2"):
        own = numbers["transfer"].get(name, {}).get("value", 0.0)
        others = [cost["value"] for other, cost in numbers["transfer"].items() if other != name]
        if own > 0 and others:
            shares = [cost / own for cost in others]
            marks.append(Mark(name, min(shares), min(shares), min(shares), shares))
    return Panel(marks, threshold, "cost of other worlds' heads; dot: the least")


def _layers(model: Numbers, threshold: float | None) -> Panel:
    marks = [Mark(name, **x[x["judged"]]["depth"]) for name, x in _measured(model, "F3")]
    return Panel(marks, threshold, "relative depth")


def _localisation(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F4"):
        x = numbers[numbers["judged"]]
        marks.append(Mark(name, x["precision"], x["precision"], x["precision"], x["matched"]))
    return Panel(marks, None, "precision; ticks: matched heads")


def _necessity(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F5"):
        top, bottom = (numbers[numbers["judged"]][role]["zero"] for role in ("top", "bottom"))
        scale = top["relative"] / top["value"] if top["value"] else 1.0
        ends = top["low"] * scale, top["high"] * scale
        marks.append(
            Mark(name, top["relative"], *ends, numbers["random"]["zero"], bottom["relative"])
        )
    return Panel(marks, threshold, "share lost; ticks: random, hollow: bottom")


def _sufficiency(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F6"):
        clean = numbers["clean"] or 1.0
        for which in ("alone", "with feeders"):
            if numbers[which] is not None:
                value, low, high = (numbers[which][end] / clean for end in ("value", "low", "high"))
                random = [accuracy / clean for accuracy in numbers[which]["random"]]
                label = name if which == "alone" else f"{name}, fed"
                marks.append(Mark(label, value, low, high, random))
    return Panel(marks, threshold, "share kept; ticks: random")


def _acceleration(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F7"):
        for plan in numbers["plans"]:
            if "value" in plan:
                ends = plan["value"], plan["low"], plan["high"]
                marks.append(Mark(f"{name}, {plan['window']}", *ends, plan["random"]))
    return Panel(marks, threshold, "accuracy lost; ticks: random")


def _visual_heads(model: Numbers, threshold: float | None) -> Panel:
    marks = []
    for name, numbers in _measured(model, "F8"):
        for gain in numbers["budgets"]:
            marks.append(
                Mark(f"{name}, {gain['keys']} keys", gain["value"], gain["low"], gain["high"])
            )
    return Panel(marks, threshold, "nats gained over equal budgets", None)


PANELS = {
    "F1": _sparsity, "F2": _stability, "F3": _layers, "F4": _localisation,
    "F5": _necessity, "F6": _sufficiency, "F7": _acceleration, "F8": _visual_heads,
}  # fmt: skip
DRAWN = {  # finding → the meaning of the threshold that its figure draws begins with these words
    "F1": "half of the positive excess", "F2": "cost of another world's", "F3": "mean relative "
        "depth",
    "F5": "share of the clean accuracy that masking the top", "F6": "share of the clean accuracy "
        "with only",
    "F7": "accuracy lost with", "F8": "log-probability that budgets",
}  # fmt: skip


def drawn_thresholds(criteria: Sequence[Numbers]) -> dict[str, float]:
    """{finding: the threshold that its figure draws}, of report["criteria"]."""
    return {
        criterion["finding"]: criterion["value"]
        for criterion in criteria
        if criterion["meaning"].startswith(DRAWN.get(criterion["finding"], "\0"))
    }
