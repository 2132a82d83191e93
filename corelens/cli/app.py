"""The command `corelens`: each command is a few lines around the public surface.

A user's mistake is one message, not a trace; the exit code is then 2.
"""

import json as json_module
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.ablate import add_ablate
from corelens.cli.doctor import add_doctor
from corelens.cli.explore import add_explore
from corelens.cli.patch import add_patch
from corelens.cli.rows import FILE, add_rows, measured, print_advice, print_short
from corelens.cli.shared import (
    BatchSize,
    Data,
    Dtype,
    Fresh,
    Json,
    Metric,
    Model,
    Seed,
    open_data,
    open_model,
    open_scores,
    scored_on,
)
from corelens.cli.show import add_show
from corelens.cli.study import add_study
from corelens.errors import CorelensError

app = typer.Typer(
    help="Find the attention heads that fetch visual evidence, test them causally, see what they save.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
console, errors = Console(), Console(stderr=True)


@app.callback()
def _commands() -> None:
    """Find the attention heads that fetch visual evidence, test them causally, see what they save."""


@app.command()
def models(json: Json = False) -> None:
    """The bundled models, what they are and how well they answer held-out scenes.

    Example: `corelens models`
    """
    from corelens.demo import list_demos, read_card

    cards = {name: read_card(name) for name in list_demos()}
    if json:
        typer.echo(json_module.dumps(cards))
        return
    table = Table("name", "what it is", "world", "held-out accuracy (95% CI)")
    for name, card in cards.items():
        size = f"{card['architecture']}, {card['layers']} × {card['heads']} heads, {card['parameters'] / 1e6:.1f} M"
        for row in card["held_out"]:
            if row["split"] == "test":
                low, high = row["ci95"]
                found = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {row['n']} samples"
                asked = ", ".join(f"{key}={value}" for key, value in row.get("options", {}).items())
                table.add_row(name, size, escape(f"{row['world']} {asked}".strip()), escape(found))
    console.print(table)


@app.command()
def score(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Run folder; a run that was stopped goes on from there.")] = Path("run"),
    metric: Annotated[
        list[str] | None, typer.Option(help="Once for each metric; 'ram[rows=last]' sets options.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many samples of a synthetic world.", min=1)] = 200,
    seed: Seed = 1,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    rows: Annotated[bool, typer.Option(help="Also measure which rows the answer hangs on.")] = True,
    json: Json = False,
) -> None:
    """Score every head of a model; several processes share the work under `accelerate launch`.

    RAM is read as published: the mean over the question's tokens. Whether the answer hangs on these rows is measured
    beside it (`corelens rows` says more), and said.

    Example: `corelens score qwen3vl-s refer --metric ram --metric lift --out run`

    Example: `accelerate launch -m corelens score Qwen/Qwen3-VL-4B-Instruct my_samples --out run`
    """
    from corelens.metrics.score import score_heads

    hooked = open_model(model, dtype)
    samples = open_data(data, n, seed)
    options: dict[str, Any] = {"batch_size": batch_size, "out": out, "progress": not json, "data": Path(data).name}
    scores = score_heads(hooked, samples, metric or ["ram"], **options)
    costs = measured(hooked, samples) if rows and int(os.environ.get("RANK", 0)) == 0 else None
    if costs is not None:
        costs.save(out / FILE)
    if json:
        typer.echo(json_module.dumps({key: ranking.values.tolist() for key, ranking in scores.items()}))
        return
    for key, ranking in scores.items():
        console.print(f"{key}: {', '.join(map(str, ranking.top(0.05)))} …", highlight=False, markup=False)
    if costs is not None:
        print_short(costs)
        print_advice(costs, list(scores.values()))
    console.print(f"scores: {out / 'scores'}", highlight=False)


@app.command()
def heads(
    run: Annotated[Path, typer.Argument(help="A run folder of `corelens score`, or a score file.")],
    top: Annotated[float, typer.Option(help="Share of all heads.", min=0, max=1)] = 0.05,
    metric: Metric = None,
    json: Json = False,
) -> None:
    """The best heads of a run, with intervals over samples.

    Example: `corelens heads run --top 0.05`
    """
    scores = open_scores(run, metric)
    best = scores.top(top)
    if json:
        typer.echo(json_module.dumps(best.to_json()))
        return
    low, high = scores.ci() if scores.per_sample is not None and len(scores.per_sample) > 1 else (scores.values,) * 2
    table = Table("head", escape(str(scores.meta.get("key", "score"))), "95% CI")
    for head in best:
        table.add_row(str(head), f"{scores.values[head]:.3f}", escape(f"[{low[head]:.3f}, {high[head]:.3f}]"))
    console.print(table)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A run folder or score file.")],
    b: Annotated[Path, typer.Argument(help="Another one, of a model with as many heads.")],
    metric: Annotated[str | None, typer.Option(help="Which of the runs' metrics.")] = None,
    json: Json = False,
) -> None:
    """How far two scores agree on the same heads: Spearman, overlap of the top 5%, rank-biased overlap.

    Example: `corelens compare run/scores/ram.safetensors run/scores/lift.safetensors`
    """
    found = open_scores(a, metric).agreement(open_scores(b, metric))
    if json:
        typer.echo(json_module.dumps(found._asdict()))
        return
    table = Table("measure", "value")
    for name, value in found._asdict().items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(table)


@app.command()
def speed(
    model: Model,
    data: Data,
    heads: Annotated[
        Path, typer.Option("--scores", "--heads", help="A run folder of `corelens score`, or a score file.")
    ],
    top: Annotated[float, typer.Option(help="Share of all heads that attend fully.", min=0, max=1)] = 0.05,
    metric: Metric = None,
    sink: Annotated[int, typer.Option(help="First tokens that every head sees.")] = 128,
    window: Annotated[int | None, typer.Option(help="Last tokens that the other heads see. [default: 1024]")] = None,
    last: Annotated[int, typer.Option(help="Last rows of the prompt that see everything.")] = 0,
    kv_budget: Annotated[
        int | None, typer.Option(help="Keys kept a KV head, shared out by the scores; alone unless --window is given.")
    ] = None,
    decode: Annotated[str, typer.Option(help="full, or streaming: sparse KV heads forget.")] = "full",
    engine: Annotated[str, typer.Option(help="auto, or a prefill engine by name.")] = "auto",
    n: Annotated[int, typer.Option(help="How many samples of a synthetic world.", min=1)] = 100,
    seed: Fresh = 2,
    rounds: Annotated[int, typer.Option(help="How often each sample is timed.", min=1)] = 5,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for speed.html and speed.json.")] = None,
    json: Json = False,
) -> None:
    """Dense against sparse inference with the top heads kept full: times, memory, accuracy.

    Example: `corelens speed qwen3vl-s refer --scores run --metric 'ram[rows=last]' --sink 1 --window 16`

    Example: `corelens speed Qwen/Qwen3-VL-4B-Instruct my_samples --scores run --kv-budget 256`
    """
    from corelens.evaluation.evaluate import evaluate
    from corelens.evaluation.sparse_run import check_scores
    from corelens.sparse import KVBudget, SparseInference, Streaming

    scores = open_scores(heads, metric)
    budget = KVBudget(scores, kv_budget) if kv_budget is not None else None
    pattern = None if budget and window is None else Streaming(sink, 1024 if window is None else window, last)
    options: dict[str, Any] = {"kv_budget": budget, "decode": decode, "engine": engine}
    sparse = SparseInference(scores.top(top) if pattern and top else None, pattern, **options)
    hooked = open_model(model, dtype)
    check_scores(scores, hooked.cfg)
    samples = open_data(data, n, seed)
    report = evaluate(hooked, samples, batch_size=batch_size, sparse=sparse, rounds=rounds).speed
    assert report is not None
    if seen := scored_on(scores, samples, data):
        report.notes.append(f"The heads were scored on {seen} of these samples: choose other ones.")
    if out is not None:
        report.save(out / "speed.json")
        report.save(out / "speed.html")
    if json:
        typer.echo(json_module.dumps(report.to_json()))
        return
    report.show()
    if out is not None:
        console.print(f"report: {out / 'speed.html'}", highlight=False)


data_app = typer.Typer(help="Your copies of public data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    path: Annotated[Path, typer.Argument(help="A folder: a public set's, or one with samples.jsonl.")],
    json: Json = False,
) -> None:
    """Which set a folder holds, what of it is whole, what is missing where, which pictures are broken.

    Exits with 1 if nothing in it can be used.

    Example: `corelens data check data/refcocog`
    """
    from corelens.data.check import check

    report = check(path)
    if json:
        typer.echo(json_module.dumps(report.to_json()))
    else:
        table = Table("part", "samples", "with regions", "missing", title=f"{report.path}: {report.set}")
        for part in report.parts:
            said = "; ".join([part.missing or "nothing", *part.notes])
            table.add_row(part.name, str(part.samples), str(part.regions), escape(said))
        console.print(table)
        console.print(f"{len(report.broken)} of {report.pictures} pictures cannot be read", highlight=False)
        for name, why in report.broken.items():
            console.print(f"  {name}: {why}", highlight=False, markup=False)
    if not report.usable:
        raise typer.Exit(1)


add_ablate(app)
add_doctor(app)
add_patch(app)
add_rows(app)
add_show(app)
add_explore(app)
add_study(app, open_model, open_data)


def main() -> None:
    """Run the command line; a CorelensError is printed and exits with 2, Ctrl-C with 130."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # our own bars say what takes time
    try:
        app(standalone_mode=True)
    except CorelensError as error:
        errors.print(f"[bold red]corelens:[/bold red] {escape(str(error))}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
