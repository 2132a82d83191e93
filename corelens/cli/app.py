"""The command `corelens`: each command is a few lines around the public surface.

A user's mistake is one message, not a trace; the exit code is then 2.
"""

import json as json_module
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.ablate import add_ablate
from corelens.cli.compare import add_compare
from corelens.cli.doctor import add_doctor
from corelens.cli.eval import add_eval
from corelens.cli.explore import add_explore
from corelens.cli.opening import check_model, open_data, open_model, open_scores
from corelens.cli.options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Json,
    Limit,
    Metric,
    Model,
    Seed,
)
from corelens.cli.patch import add_patch
from corelens.cli.rows import FILE, add_rows, measured, print_advice, print_short
from corelens.cli.show import add_show
from corelens.cli.speed import add_speed
from corelens.cli.study import add_study
from corelens.errors import CorelensError

app = typer.Typer(
    help="Find the attention heads that fetch visual evidence, test them causally, see what they "
    "save.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)


def _version(wanted: bool | None) -> None:
    if wanted:
        from corelens import __version__

        typer.echo(f"corelens {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool | None,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = None,
) -> None:
    """Find the attention heads that fetch visual evidence, test them causally, see what they
    save."""


@app.command()
def models(json: Json = False) -> None:
    """The bundled models, what they are and how well they answer held-out scenes.

    Example: `corelens models`
    """
    from corelens import demo

    cards = {name: demo.read_card(name) for name in demo.list_demos()}
    if json:
        typer.echo(json_module.dumps(cards))
        return
    table = Table("name", "what it is", "world", "held-out accuracy (95% CI)")
    for name, card in cards.items():
        shown = f"{name} (default)" if name == demo.DEFAULT else name
        counts = f"{card['layers']} × {card['heads']} heads, {card['parameters'] / 1e6:.1f} M"
        for row in card["held_out"]:
            if row["split"] == "test":
                low, high = row["ci95"]
                accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {row['n']} samples"
                asked = ", ".join(f"{key}={value}" for key, value in row.get("options", {}).items())
                world = f"{row['world']} {asked}".strip()
                size = f"{card['architecture']}, {counts}"
                table.add_row(shown, size, escape(world), escape(accuracy))
    console.print(table)
    if "smol-vlm" not in cards:
        console.print(
            escape("smol-vlm, whose decoder learned from text, needs the extra corelens[smol]")
        )


@app.command()
def score(
    model: Model,
    data: Data,
    out: Annotated[
        Path, typer.Option(help="Run folder; a run that was stopped goes on from there.")
    ] = Path("run"),
    metric: Annotated[
        list[str] | None, typer.Option(help="Once for each metric; 'ram[rows=last]' sets options.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many samples of a synthetic world.", min=1)] = 200,
    limit: Limit = None,
    seed: Seed = 1,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    rows: Annotated[bool, typer.Option(help="Also measure which rows the answer hangs on.")] = True,
    device: Device = None,
    json: Json = False,
) -> None:
    """Score every head of a model; several processes share the work under `accelerate launch`.

    RAM is read as published: the mean over the question's tokens. Whether the answer hangs on these
    rows is measured, too, and printed (`corelens rows` says more).

    Example: `corelens score qwen3vl-qs refer --metric ram --metric lift --out run`

    Example: `accelerate launch -m corelens score Qwen/Qwen3-VL-4B-Instruct my_samples --out run`
    """
    check_model(model)
    from corelens.metrics.registry import metric as metric_of
    from corelens.metrics.score import check_samples, score_heads

    wanted = [metric_of(key) for key in metric or ["ram"]]
    samples = open_data(data, n, seed, limit)
    check_samples(samples, wanted)
    hooked = open_model(model, dtype, device)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "out": out,
        "progress": not json,
        "data": Path(data).name,
    }
    scores = score_heads(hooked, samples, wanted, **options)
    if not json:
        for key, ranking in scores.items():
            words = f"{key}: {', '.join(map(str, ranking.top(0.05)))} …"
            console.print(words, highlight=False, markup=False)
    costs = None
    if rows:
        costs = measured(hooked, samples, not json, out)
    if costs is not None and int(os.environ.get("RANK", 0)) == 0:
        costs.save(out / FILE)
    if json:
        values = {key: ranking.values.tolist() for key, ranking in scores.items()}
        typer.echo(json_module.dumps(values))
        return
    if costs is not None:
        print_short(costs)
        print_advice(costs, list(scores.values()))
    console.print(f"scores: {out / 'scores'}", highlight=False)


@app.command()
def heads(
    run: Annotated[Path, typer.Argument(help="A run folder of `corelens score`, or a score file.")],
    top: Annotated[float, typer.Option(help="Share of all heads.", min=0, max=1)] = 0.05,
    k: Annotated[
        int | None, typer.Option(help="How many heads, instead of a share.", min=1)
    ] = None,
    metric: Metric = None,
    json: Json = False,
) -> None:
    """The best heads of a run, with intervals over samples.

    Example: `corelens heads run --top 0.05`
    """
    scores = open_scores(run, metric)
    best = scores.top(k=k) if k is not None else scores.top(float(top))
    if json:
        typer.echo(json_module.dumps(best.to_json()))
        return
    several = scores.per_sample is not None and len(scores.per_sample) > 1
    low, high = scores.ci() if several else (scores.values, scores.values)
    table = Table("head", escape(str(scores.meta.get("key", "score"))), "95% CI")
    for head in best:
        table.add_row(
            str(head), f"{scores.values[head]:.3f}", escape(f"[{low[head]:.3f}, {high[head]:.3f}]")
        )
    console.print(table)


add_compare(app)


data_app = typer.Typer(help="Your copies of public data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    path: Annotated[
        Path, typer.Argument(help="A folder: a public set's, or one with samples.jsonl.")
    ],
    json: Json = False,
) -> None:
    """Which set a folder holds, what of it is whole, what is missing where, which pictures are
    broken.

    Exits with 1 if nothing in it can be used.

    Example: `corelens data check data/refcocog`
    """
    from corelens.data.check import check

    report = check(path)
    if json:
        typer.echo(json_module.dumps(report.to_json()))
    else:
        table = Table(
            "part", "samples", "with regions", "missing", title=f"{report.path}: {report.set}"
        )
        for part in report.parts:
            missing = "; ".join([part.missing or "nothing", *part.notes])
            table.add_row(part.name, str(part.samples), str(part.regions), escape(missing))
        console.print(table)
        words = f"{len(report.broken)} of {report.pictures} pictures cannot be read"
        console.print(words, highlight=False)
        for name, why in report.broken.items():
            console.print(f"  {name}: {why}", highlight=False, markup=False)
    if not report.usable:
        raise typer.Exit(1)


add_speed(app)
add_ablate(app)
add_doctor(app)
add_eval(app)
add_patch(app)
add_rows(app)
add_show(app)
add_explore(app)
add_study(app)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, without the line of source that it came from."""
    errors.print(f"[bold]note:[/bold] {escape(str(message))}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; a warning is printed as a note, a CorelensError exits with 2, Ctrl-C
    with 130."""
    # Before torch is loaded: its threads wait asleep. If they spin, a small model crawls beside
    # another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app(standalone_mode=True)
    except CorelensError as error:
        errors.print(f"[bold red]corelens:[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
