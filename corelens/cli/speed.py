"""The command `corelens speed`: sparse against dense inference, with the top heads of a ranking
full."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from corelens.cli.opening import check_model, open_data, open_model, open_scores, scored_on
from corelens.cli.options import (
    BatchSize,
    Data,
    Device,
    Dtype,
    Fresh,
    Json,
    Limit,
    Metric,
    Model,
    Open,
    check_word,
)
from corelens.cli.output import show_page
from corelens.cli.rows import stored


def add_speed(app: typer.Typer) -> None:
    """Give the command line its `speed`."""

    @app.command()
    def speed(
        model: Model,
        data: Data,
        heads: Annotated[
            Path,
            typer.Option(
                "--scores", "--heads", help="A run folder of `corelens score`, or a score file."
            ),
        ],
        top: Annotated[
            float, typer.Option(help="Share of all heads that attend fully.", min=0, max=1)
        ] = 0.05,
        metric: Metric = None,
        sink: Annotated[
            int | None,
            typer.Option(
                help="First tokens that every head sees. [default: 128; fewer in short prompts]"
            ),
        ] = None,
        window: Annotated[
            int | None,
            typer.Option(
                help="Last tokens that the other heads see. [default: 1024; fewer in short prompts]"
            ),
        ] = None,
        last: Annotated[int, typer.Option(help="Last rows of the prompt that see everything.")] = 0,
        kv_budget: Annotated[
            int | None,
            typer.Option(
                help="Mean number of keys that a KV head keeps, shared out by the scores; without "
                "--window all heads attend fully."
            ),
        ] = None,
        decode: Annotated[
            str, typer.Option(help="full, or streaming: sparse KV heads forget.")
        ] = "full",
        engine: Annotated[str, typer.Option(help="auto, or a prefill engine by name.")] = "auto",
        n: Annotated[int, typer.Option(help="How many samples of a synthetic world.", min=1)] = 100,
        limit: Limit = None,
        seed: Fresh = 2,
        rounds: Annotated[
            int, typer.Option(help="How often each of four samples is timed.", min=1)
        ] = 5,
        batch_size: BatchSize = 8,
        dtype: Dtype = "auto",
        device: Device = None,
        out: Annotated[
            Path | None, typer.Option(help="Folder for speed.html and speed.json.")
        ] = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """Dense against sparse inference with the top heads kept full: times, memory, accuracy.

        The window follows the prompts' length unless it is given; a pattern that leaves nothing out
        of them is refused.

        Example: `corelens speed qwen3vl-qs refer --scores run --metric ram --sink 1 --window 16`

        Example: `corelens speed Qwen/Qwen3-VL-4B-Instruct my_samples --scores run --kv-budget 256`
        """
        scores = open_scores(heads, metric)
        check_model(model, scores.top(1.0))
        check_word("--decode", decode, ("full", "streaming"))
        samples = open_data(data, n, seed, limit)
        from corelens.evaluation.evaluate import batches, evaluate
        from corelens.evaluation.sparse_account import leaves_something, streaming_for
        from corelens.evaluation.sparse_run import check_scores
        from corelens.sparse import KVBudget, SparseInference
        from corelens.sparse.prefill import ENGINES

        check_word("--engine", engine, ("auto", *ENGINES))
        budget = KVBudget(scores, kv_budget) if kv_budget is not None else None
        hooked = open_model(model, dtype, device)
        check_scores(scores, hooked.cfg)
        prepared = batches(hooked, samples, batch_size)
        tokens = [len(tm.all) - len(tm.answer) for inputs in prepared for tm in inputs.token_maps]
        pattern = None if budget and window is None else streaming_for(tokens, sink, window, last)
        options: dict[str, Any] = {"kv_budget": budget, "decode": decode, "engine": engine}
        sparse = SparseInference(
            scores.top(float(top)) if pattern and top else None, pattern, **options
        )
        leaves_something(sparse, hooked.cfg, tokens)
        report = evaluate(hooked, prepared, sparse=sparse, rounds=rounds).speed
        assert report is not None
        if seen := scored_on(scores, samples, data):
            report.notes.append(
                f"The heads were scored on {seen} of these samples: choose other ones."
            )
        costs = stored(heads)
        if costs is not None and (advice := costs.advice(scores)):
            report.notes.append(advice)
        if out is not None:
            report.save(out / "speed.json")
            report.save(out / "speed.html")
            show_page(out / "speed.html", open_page)
        if json:
            typer.echo(json_module.dumps(report.to_json()))
            return
        report.show()
        if out is not None:
            Console().print(f"report: {out / 'speed.html'}", highlight=False)
