"""The command `corelens eval`: lmms-eval's tasks on a model, as it is and without some heads."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import check_model, named_heads, open_model, open_scores
from corelens.cli.options import BatchSize, Device, Dtype, Json, Metric, Model, check_word
from corelens.disk.write import write_whole

KINDS = ("zero", "uniform", "knockout")


def add_eval(app: typer.Typer) -> None:
    """Give the command line its `eval`."""

    @app.command(name="eval")
    def eval_tasks(
        model: Model,
        tasks: Annotated[
            list[str], typer.Option(help="A task of lmms-eval; once for each.", show_default=False)
        ],
        scores: Annotated[
            Path | None, typer.Option(help="A run folder of `corelens score`: its top heads.")
        ] = None,
        heads: Annotated[str | None, typer.Option(help="These heads instead: 'L3H5,L4H1'.")] = None,
        metric: Metric = None,
        top: Annotated[float, typer.Option(help="Share of all heads.", min=0, max=1)] = 0.05,
        kind: Annotated[
            str,
            typer.Option(
                help=f"One of {', '.join(KINDS)} (the picture out of these heads' sight: a task "
                "names no regions)."
            ),
        ] = "zero",
        limit: Annotated[int | None, typer.Option(help="Documents a task; all.", min=1)] = None,
        batch_size: BatchSize = 1,
        dtype: Dtype = "auto",
        device: Device = None,
        out: Annotated[Path | None, typer.Option(help="A JSON file for the scores.")] = None,
        json: Json = False,
    ) -> None:
        """The scores of lmms-eval's tasks, and the same without some heads; `pip install lmms-eval`
        beside CoreLens.

        Example: `corelens eval Qwen/Qwen3-VL-4B-Instruct --tasks mme --scores run --kind knockout`
        """
        check_word("--kind", kind, KINDS)
        ranking = None if scores is None else open_scores(scores, metric)
        head_set = named_heads(heads) if ranking is None else ranking.top(top)
        check_model(model, *([] if head_set is None else [head_set]))
        from corelens.evaluation.lmms_eval import check_installed, run_tasks
        from corelens.interventions.ablation import ablate
        from corelens.interventions.knockouts import knockout

        check_installed()
        hooked = open_model(model, dtype, device)
        runs: dict[str, Any] = {"clean": ()}
        if head_set is not None:
            cut = (
                knockout(head_set, columns="visual")
                if kind == "knockout"
                else ablate(head_set, kind)
            )
            runs[f"{len(head_set)} heads, {kind}"] = cut
        results = {
            name: run_tasks(hooked, tasks, hooks, batch_size=batch_size, limit=limit)["results"]
            for name, hooks in runs.items()
        }
        written = json_module.dumps(results, indent=1, ensure_ascii=False, default=str)
        if out is not None:
            write_whole(out, written)
        if json:
            typer.echo(written)
        else:
            Console().print(_table(results))


def _table(results: dict[str, Any]) -> Table:
    """One row a score that is a number; one column a run."""
    table = Table("task", "score", *map(escape, results))
    for task, clean in results["clean"].items():
        for name, value in clean.items():
            if isinstance(value, int | float):
                values = (f"{run[task][name]:.4g}" for run in results.values())
                table.add_row(escape(task), escape(name), *values)
    return table
