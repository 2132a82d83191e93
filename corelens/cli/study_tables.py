"""What `corelens study` and `corelens demo` print: what the verdicts rest on, then the verdicts."""

import json as json_module
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.heads.intervals import percent_interval

console = Console()


def show_study(result: Any, json: bool) -> None:
    """What the verdicts rest on (the rows that the answer hangs on, and what heads cost), the
    verdicts, and at the end what one wants to know first: three numbers, and where the report is.
    """
    from corelens.viz.study_headline import three_numbers  # matplotlib, slow to import

    if json:
        typer.echo(json_module.dumps(result.to_json()))
        return
    for name, model in result.data["models"].items():
        console.print(f"{name}: {_reading(model)}", highlight=False)
        if model["left_out"]:
            console.print(
                f"{name}: left out at the limit of core-hours: {'; '.join(model['left_out'])}",
                highlight=False,
            )
        for world, part in model["worlds"].items():
            if "F5" in part["numbers"]:
                console.print(_costs(f"{name}, {world}", part))
    verdicts = Table("finding", "number", "verdict", show_lines=True)
    for concluded in result.findings:
        overall = concluded.overall
        words = f"{overall}: {overall.reason}" if overall.reason else str(overall)
        verdicts.add_row(
            f"{concluded.id} {concluded.finding.title}", escape(overall.number), escape(words)
        )
    console.print(verdicts)
    for title, numbers in three_numbers(result.data):
        console.print(f"\nRight answers, {escape(title)}", highlight=False)
        console.print(_three(numbers))
    console.print(f"The report: {result.report}", highlight=False, soft_wrap=True)


def _three(numbers: Sequence[Sequence[str]]) -> Table:
    """What is right with nothing changed, without the top heads, without random ones."""
    table = Table(box=None, show_header=False)
    table.add_column(justify="right", no_wrap=True, style="bold")
    table.add_column()
    for heads, accuracy, note in numbers:
        table.add_row(accuracy, escape(f"{heads} ({note})"))
    return table


def _reading(model: dict[str, Any]) -> str:
    """Which heads are judged, and what cutting the evidence from each group of rows costs."""
    reading = model["reading"]
    costs = []
    for world, part in model["worlds"].items():
        if part["row_costs"]:
            lost = ", ".join(
                f"{rows} {100 * cost['value'] + 0.0:.0f}"
                for rows, cost in part["row_costs"].items()
            )
            costs.append(f"cutting the evidence costs in {world}, by rows (points): {lost}")
    judged = (
        f"judged by {reading['words']}"
        if reading["key"]
        else f"no ranking can be judged: {reading['reason']}"
    )
    return "; ".join([judged, *costs])


def _costs(title: str, part: dict[str, Any]) -> Table:
    """Points lost by the top, the bottom and random heads, under each intervention."""
    numbers = part["numbers"]["F5"]
    kinds = list(numbers["random"])
    clean, tested = part["clean"]["value"], part["tested"]
    table = Table(
        title=f"{title}: points lost of {100 * clean:.0f} on {tested} samples",
        caption="exact 95% intervals; heads were scored on other samples",
    )
    table.add_column("heads")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    for key in (key for key in part["scores"] if key in numbers):
        for role in ("top", "bottom"):
            cells = [escape(percent_interval(numbers[key][role][kind])) for kind in kinds]
            table.add_row(
                escape(f"{role} {numbers[key]['k']} by {key}"),
                *cells,
                style="bold" if role == "top" else None,
            )
    highest = [
        f"up to {100 * clean * max(numbers['random'][kind], default=0.0):.0f}"
        f" ({len(numbers['random'][kind])} sets)"
        for kind in kinds
    ]
    table.add_row(f"{numbers[numbers['judged']]['k']} random heads", *highest)
    return table
