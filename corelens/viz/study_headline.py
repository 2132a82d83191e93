"""The first screen of a study's report: what hiding the evidence from the top heads costs, beside
as many random ones, and the sweep over shares of heads."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from corelens.viz import page as p
from corelens.viz import style

Numbers = Mapping[str, Any]
DONE = {"knockout": "the evidence hidden from", "zero": "without the output of"}
ROLES = {
    "top": (style.HOT, "o", "top"),
    "random": (style.GREY, "D", "random, mean"),
    "bottom": (style.BLUE, "s", "bottom"),
}


def headline(report: Numbers) -> list[Markup]:
    """The strip of three numbers and the sweep of each model's first world that was tested; of
    several models one table."""
    tested = list(_tested(report))
    if len(report["models"]) > 1:
        return _tables(tested)
    parts = []
    for _, world, part, numbers in tested[:1]:
        parts.append(_strip(part, numbers))
        points = numbers.get("curves", {}).get("points")
        if points:
            parts.append(
                p.figure(sweep_figure(points, part["clean"]["value"]), _caption(world, part))
            )
    return parts


def sweep_figure(points: Numbers, clean: float, ax: Axes | None = None) -> Figure:
    """Accuracy over the share of heads whose output is set to zero.

    Args:
        points: {"top", "bottom" or "random": [[share of heads, accuracy], …]}.
        clean: the accuracy with no head masked, at the left end of each line.
    """
    with style.axes(ax, 5.6, 2.5) as ax:
        ax.grid(axis="y")
        ax.set_axisbelow(True)
        for role, (colour, marker, words) in ROLES.items():
            if points.get(role):
                shares, accuracies = zip(*[(0.0, clean), *points[role]], strict=True)
                ax.plot(shares, accuracies, color=colour, marker=marker, markersize=5, label=words)
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="share of heads masked", ylabel="accuracy", ylim=(-0.02, 1.04))
        ax.legend(title="heads", loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.8)
    return style.figure_of(ax)


def _tested(report: Numbers) -> Iterator[tuple[str, str, Numbers, Numbers]]:
    """Model, world, its part of the report, and what masking heads costs there."""
    for name, model in report["models"].items():
        for world, part in model["worlds"].items():
            if "F5" in part["numbers"] and part["clean"] is not None:
                yield name, world, part, part["numbers"]["F5"]


def _kind(numbers: Numbers) -> str | None:
    """The intervention that the strip shows: hiding the evidence, if it was tested."""
    top = numbers[numbers["judged"]]["top"]
    return next((kind for kind in DONE if kind in top and numbers["random"].get(kind)), None)


def _cells(part: Numbers, numbers: Numbers, kind: str) -> tuple[str, str, str]:
    """Accuracy in percent: clean, with the top heads cut, and with random ones (their range)."""
    clean = part["clean"]["value"]
    random = [clean * (1 - lost) for lost in numbers["random"][kind]]
    ends = dict.fromkeys(f"{100 * end:.0f}" for end in (min(random), max(random)))
    top = numbers[numbers["judged"]]["top"][kind]["accuracy"]
    return f"{100 * clean:.0f}%", f"{100 * top:.0f}%", " to ".join(ends) + "%"


def three_numbers(report: Numbers) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Of each model and world that was tested, what was done, and to which heads: none, the top
    ones, random ones; beside each the accuracy, and a note on it."""
    for name, world, part, numbers in _tested(report):
        if (kind := _kind(numbers)) is not None:
            yield f"{name}, {world}, {DONE[kind]}", _three(part, numbers, kind)


def _three(part: Numbers, numbers: Numbers, kind: str) -> list[tuple[str, str, str]]:
    clean, top, random = _cells(part, numbers, kind)
    k, draws = numbers[numbers["judged"]]["k"], len(numbers["random"][kind])
    total = sum(len(layer) for layer in part["scores"][numbers["judged"]])
    cost = numbers[numbers["judged"]]["top"][kind]
    lost = (
        f"{100 * cost['value']:.0f} points lost [{100 * cost['low']:.0f}, {100 * cost['high']:.0f}]"
    )
    return [
        ("no head", clean, f"of {part['tested']} samples"),
        (f"the top {k} of {total} heads", top, lost),
        (f"{k} random heads", random, f"{draws} draws"),
    ]


def _strip(part: Numbers, numbers: Numbers) -> Markup:
    kind = _kind(numbers)
    if kind is None:
        return Markup("")
    (_, clean, samples), *cut = _three(part, numbers, kind)
    tiles = [(f"{DONE[kind]} {heads}", accuracy, note) for heads, accuracy, note in cut]
    return p.tiles([("answers right, nothing changed", clean, samples), *tiles], hot=1)


def _tables(tested: list[tuple[str, str, Numbers, Numbers]]) -> list[Markup]:
    """One table for each intervention, a row for each model and world that was tested by it."""
    columns = ["model and world", "no head", "the top heads", "random heads"]
    tables = []
    for kind, done in DONE.items():
        rows = [
            [f"{name}, {world}", *_cells(part, numbers, kind)]
            for name, world, part, numbers in tested
            if _kind(numbers) == kind
        ]
        if rows:
            tables.append(p.table(columns, rows, f"Answers right, {done} these heads:"))
    return tables


def _caption(world: str, part: Numbers) -> str:
    return (
        f"Whole heads masked (output set to zero), {world}, {part['tested']} samples. This asks "
        "something else than hiding the evidence: a head that never looks at the evidence may "
        "still be needed."
    )
