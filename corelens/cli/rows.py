"""The command `corelens rows`: which rows the answer hangs on; and what other commands say of
it."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import check_model, open_data, open_model, open_scores
from corelens.cli.options import BatchSize, Data, Device, Dtype, Json, Limit, Model, Open, Run, Seed
from corelens.cli.output import ending, show_page, write_picture
from corelens.disk.write import write_whole

FILE = "rows.json"  # in a run folder of `corelens score`
SAMPLES = 40  # of those that heads are scored on; each group of rows is one more run of them


def add_rows(app: typer.Typer) -> None:
    """Give the command line its `rows`."""

    @app.command()
    def rows(
        model: Model,
        data: Data,
        scores: Annotated[
            Path | None, typer.Option(help="A run folder of `corelens score`: is it read there?")
        ] = None,
        tokens: Annotated[bool, typer.Option(help="Also each token of the question alone.")] = True,
        n: Annotated[int, typer.Option(help="How many samples.", min=1)] = 100,
        limit: Limit = None,
        seed: Seed = 1,
        batch_size: BatchSize = 32,
        dtype: Dtype = "auto",
        device: Device = None,
        out: Annotated[
            Path | None,
            typer.Option(help="rows.json, rows.html, or a picture: png, pdf, svg, jpg."),
        ] = None,
        run: Run = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """Which rows the answer hangs on: the evidence is cut off from all heads, row group by row
        group.

        Heads should be ranked where a cut costs something: elsewhere they look, and the answer does
        not need it. Use the samples that heads are scored on (the default seed is that of `score`),
        not those that are tested.

        Example: `corelens rows qwen3vl-qs refer`
        """
        if out is not None:
            ending(out, "json")
        ranking = None if scores is None else open_scores(scores, None)
        check_model(model, *([] if ranking is None else [ranking.top(1.0)]))
        samples = open_data(data, n, seed, limit)[:n]
        from corelens.evaluation.where_read import check_marked, where_read

        check_marked(samples)
        hooked = open_model(model, dtype, device)
        costs = where_read(hooked, samples, tokens, batch_size, progress=not json, out=run)
        costs.meta |= {"model": model, "data": data, "seed": seed}
        if out is not None:
            _write(costs, out)
            show_page(out, open_page)
        if json:
            typer.echo(json_module.dumps(costs.to_json()))
            return
        print_costs(costs)
        if ranking is not None:
            print_advice(costs, [ranking])
        if out is not None:
            Console().print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)


def _write(costs: Any, out: Path) -> None:
    from corelens.viz import page as p

    if out.suffix.lower() == ".json":
        costs.save(out)
        return
    figure = costs.plot()
    if out.suffix.lower() != ".html":
        write_picture(figure, out)
        return
    table = p.table(
        ["rows", "n", "accuracy lost [95% CI]", "log-probability lost [95% CI]"],
        [list(row) for row in costs.table()],
        "Lost with the evidence cut off from all heads at these rows alone.",
    )
    costs_figure = p.figure(figure, "The same, with 95% intervals over samples.")
    meta = {name: costs.meta[name] for name in ("model", "data", "seed", "n")}
    subtitle = f"With nothing cut off: accuracy {costs.clean}"
    page = p.page(
        "Which rows the answer hangs on", [p.section("", table, costs_figure)], meta, subtitle
    )
    write_whole(out, page)


def measured(model: Any, samples: Any, progress: bool, run: Path) -> Any:
    """The RowCosts of the first samples that have a region and an answer, kept in a folder of the
    run; None if there are none."""
    from corelens.evaluation.where_read import where_read

    usable = [sample for sample in samples if sample.regions and sample.answer is not None][
        :SAMPLES
    ]
    if not usable:
        return None
    return where_read(model, usable, tokens=False, progress=progress, out=run / "rows")


def stored(run: Path) -> Any:
    """The RowCosts that `corelens score` left in its run folder; None if there are none."""
    from corelens.evaluation.where_read import RowCosts

    file = (run if run.is_dir() else run.parent.parent) / FILE
    return RowCosts.load(file) if file.is_file() else None


def print_costs(costs: Any) -> None:
    """A table of the groups that 80 columns hold, and what follows from it."""
    n = str(costs.meta["n"])
    caption = f"with 95% intervals, n={n}; accuracy with nothing cut off: {costs.clean}"
    if any(text.endswith("…") for text in costs.texts.values()):
        caption += "; … behind a token: the commonest, samples differ there"
    table = Table(caption=escape(caption), box=SIMPLE_HEAD)
    table.add_column("rows")
    for name in ("accuracy lost", "log-probability lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for group, samples, *lost in costs.table():
        label = group if samples == n else f"{group} (n={samples})"
        hurts = group == costs.rows and costs.hurts(group)
        table.add_row(*map(escape, (label, *lost)), style="bold" if hurts else None)
    console = Console(highlight=False)
    console.print(table)
    console.print(costs.conclusion, markup=False, soft_wrap=True)


def print_short(costs: Any) -> None:
    """One line: what each named group costs."""
    from corelens.evaluation.where_read import NAMES, points

    groups = ", ".join(
        f"{name} {points(costs.costs[name])}" for name in NAMES if name in costs.costs
    )
    of = f"(n={costs.meta['n']}, accuracy {costs.clean})"
    line = f"evidence cut off from all heads at these rows costs: {groups} {of}"
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


def print_advice(costs: Any, scores: list[Any]) -> None:
    """A warning for each ranking that is read at rows that the answer does not need; none twice."""
    for advice in dict.fromkeys(costs.advice(ranking) for ranking in scores):
        if advice:
            Console().print(f"[bold]note:[/bold] {escape(advice)}", highlight=False, soft_wrap=True)
