"""The command `corelens explore`: one page on which you click a token and see where every head
looks."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from corelens.cli.opening import check_model, open_data, open_model, open_scores
from corelens.cli.options import Data, Device, Dtype, Metric, Model, Open, Seed
from corelens.cli.output import show_page
from corelens.errors import CorelensError

MOST = 10_000  # samples that are drawn to show the last of them


def add_explore(app: typer.Typer) -> None:
    """Give the command line its `explore`."""

    @app.command()
    def explore(
        model: Model,
        data: Data,
        index: Annotated[int, typer.Option(help="Which sample, counted from 0.", min=0)] = 0,
        scores: Annotated[
            Path | None,
            typer.Option(help="A run folder of `corelens score`: colours, and top heads."),
        ] = None,
        metric: Metric = None,
        seed: Seed = 0,
        dtype: Dtype = "auto",
        device: Device = None,
        out: Annotated[Path, typer.Option(help="The page to write.")] = Path("explorer.html"),
        open_page: Open = False,
    ) -> None:
        """See a head look: click a token, point at a head, drag a box. Writes one offline page.

        Example: `corelens explore qwen3vl-qs refer --index 3 --out explorer.html`
        """
        if out.suffix.lower() != ".html":
            raise CorelensError(f"--out {out}", "a file that ends in .html", "name it so")
        ranking: Any = None if scores is None else open_scores(scores, metric)
        check_model(model, *([] if ranking is None else [ranking.top(1.0)]))
        if index >= MOST:
            raise CorelensError(f"--index {index}", f"0 to {MOST - 1}", "another --seed")
        samples = open_data(data, index + 1, seed)
        if index >= len(samples):
            raise CorelensError(f"--index {index}", f"0 to {len(samples) - 1}", "count from 0")
        from corelens.explorer.explore import explore as make_explorer

        explorer = make_explorer(
            open_model(model, dtype, device),
            samples[index],
            ranking,
            () if ranking is None else ranking.top(k=3),
        )
        explorer.save(out)
        show_page(out, open_page)
        console = Console()
        console.print(
            f"{samples[index].question} → {explorer.recording['answer']['text']}", markup=False
        )
        console.print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)
