"""The command `corelens`: each command is a few lines around the public surface. A user's mistake is one line, not a trace."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.errors import CorelensError

app = typer.Typer(
    help="Find the attention heads that fetch visual evidence, test them causally, see what they save.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)

Out = Annotated[Path, typer.Option(help="Folder for report.html and report.json.")]
Seed = Annotated[int, typer.Option(help="Of the scenes and of the random controls.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")]


@app.callback()
def _commands() -> None:
    """Find the attention heads that fetch visual evidence, test them causally, see what they save."""


@app.command()
def demo(
    out: Out = Path("report"),
    seed: Seed = 1,
    full: Annotated[bool, typer.Option("--full", help="1,000 test scenes, five draws, all curves (minutes).")] = False,
    model: Annotated[str, typer.Option(help="A bundled model, see `corelens models`.")] = "qwen3vl-s",
    json: Json = False,
) -> None:
    """The CoRe study on a bundled model and fresh scenes: a table here, a page in --out.

    Example: [bold]corelens demo --out report[/bold]
    """
    from corelens.data import synthetic
    from corelens.demo import load_demo
    from corelens.study import KINDS, study

    hooked = load_demo(model)
    options = f"{' --full' if full else ''} --seed {seed}" + (f" --model {model}" if model != "qwen3vl-s" else "")
    samples = synthetic("refer", 1400 if full else 160, seed=seed)
    result = study(
        hooked,
        {"refer": samples},
        out=out,
        draws=5 if full else 2,
        fractions=(0.01, 0.02, 0.05, 0.1, 0.2) if full else (0.02, 0.05, 0.1),
        sweep_kinds=KINDS if full else ("mean",),
        score_share=400 / 1400 if full else 60 / 160,
        seed=seed,
        command=f"corelens demo{options}",
        progress=not json,
    )
    if json:
        typer.echo(json_module.dumps(result.to_json()))
        return
    for world in result.worlds:
        table = Table(
            title=f"{world.evaluated} fresh scenes of {world.name!r}, clean accuracy {world.clean.ci}",
            caption="accuracy with 95% bootstrap intervals; heads were scored on other scenes",
        )
        table.add_column("heads ablated")
        for kind in KINDS:
            table.add_column(kind, justify="right")
        for selection in world.selections:
            k = selection.points["zero"].k
            name = f"top {result.fraction:.0%} ({k}): {selection.name}" if selection.role == "top" else selection.name
            style = "bold" if selection.role == "top" else None
            table.add_row(name, *[escape(str(selection.points[kind].accuracy)) for kind in KINDS], style=style)
        console.print(table)
        console.print(f"the top heads by RAM: {', '.join(map(str, world.ram.top(result.fraction)))}", highlight=False)
    console.print(f"report: {result.report}", highlight=False)


@app.command()
def models(json: Json = False) -> None:
    """The bundled models, what they are and how well they answer held-out scenes.

    Example: [bold]corelens models[/bold]
    """
    from corelens.demo import list_demos, read_card

    cards = {name: read_card(name) for name in list_demos()}
    if json:
        typer.echo(json_module.dumps(cards))
        return
    table = Table("name", "architecture", "held-out accuracy")
    for name, card in cards.items():
        table.add_row(name, str(card.get("architecture", "")), escape(str(card.get("held_out", ""))))
    console.print(table)


@app.command("train-demo")
def train_demo(
    name: Annotated[str, typer.Argument(help="Which bundled model to train again, for instance qwen3vl-s.")],
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; it resumes from there.")] = None,
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe.")] = None,
) -> None:
    """Train a demo model from scratch with its committed recipe (resumable; about 1.5 core-hours for qwen3vl-s).

    Example: [bold]corelens train-demo qwen3vl-s --seed 0 --out runs/mine[/bold]
    """
    from corelens.demo.train import train_demo as train

    console.print(f"trained: {train(name, seed=seed, out=out, steps=steps)}", highlight=False)


def main() -> None:
    """Run the command line; a CorelensError is printed and exits with 2, Ctrl-C with 130."""
    try:
        app(standalone_mode=True)
    except CorelensError as error:
        errors.print(f"[bold red]corelens:[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
