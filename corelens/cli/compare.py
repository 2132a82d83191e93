"""`corelens compare`: how far two scores agree on the same heads."""

import json as json_module
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import open_scores, score_files
from corelens.cli.options import Json
from corelens.errors import CorelensError


def add_compare(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command()
    def compare(
        a: Annotated[Path, typer.Argument(help="A run folder or score file.")],
        b: Annotated[Path, typer.Argument(help="Another one, of a model with as many heads.")],
        metric: Annotated[str | None, typer.Option(help="Which of the runs' metrics.")] = None,
        metrics: Annotated[
            str | None,
            typer.Option(help="Several of them: 'ram,lift'. [default: all that both runs have]"),
        ] = None,
        json: Json = False,
    ) -> None:
        """How far two scores agree on the same heads: Spearman, overlap of the top 5%, rank-biased
        overlap.

        Example: `corelens compare run other_run --metrics ram,lift`

        Example: `corelens compare run/scores/ram.safetensors run/scores/lift.safetensors`
        """
        keys = _compared(a, b, metric, metrics)
        agreements = {
            key: open_scores(a, key).agreement(open_scores(b, key))._asdict() for key in keys
        }
        if json:
            single = metrics is None and len(keys) == 1
            typer.echo(json_module.dumps(agreements[keys[0]] if single else agreements))
            return
        table = Table("measure", *(escape(key or "value") for key in keys))
        for name in agreements[keys[0]]:
            values = [agreements[key][name] for key in keys]
            table.add_row(
                name,
                *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values),
            )
        Console().print(table)


def _compared(a: Path, b: Path, metric: str | None, metrics: str | None) -> list[str | None]:
    """Which metrics to compare; None stands for the one that a score file holds."""
    if metrics is not None:
        return list(re.split(r",(?![^\[]*\])", metrics))  # (not at commas inside brackets)
    if metric is not None or not (a.is_dir() and b.is_dir()):
        return [metric]
    of_a, of_b = score_files(a), score_files(b)
    in_both = [key for key in of_a if key in of_b]
    if not in_both:
        raise CorelensError(
            f"{a} with {', '.join(of_a)} and {b} with {', '.join(of_b)}",
            "runs with a metric in common",
            "score the same metrics, or give two score files",
        )
    return [*in_both]
