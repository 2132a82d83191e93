"""The command `corelens ablate`: answers without some heads, beside answers without as many
others."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import (
    check_model,
    named_heads,
    open_data,
    open_model,
    open_scores,
    scored_on,
)
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
from corelens.cli.output import ending, show_page, write_picture
from corelens.cli.rows import print_short, stored
from corelens.disk.write import write_whole
from corelens.errors import CorelensError

KINDS = {
    "zero": "their output set to zero",
    "mean": "their output set to its mean",
    "resample": "their output taken from other samples",
    "uniform": "their attention made even",
    "knockout": "the region out of their sight",
}
# samples whose output is put in; a resample keeps all of theirs in memory
REFERENCES = {"mean": 32, "resample": 8}


def add_ablate(app: typer.Typer) -> None:
    """Give the command line its `ablate`."""

    @app.command()
    def ablate(
        model: Model,
        data: Data,
        scores: Annotated[
            Path | None, typer.Option(help="A run folder of `corelens score`: its top heads.")
        ] = None,
        heads: Annotated[str | None, typer.Option(help="These heads instead: 'L3H5,L4H1'.")] = None,
        metric: Metric = None,
        top: Annotated[
            list[float] | None,
            typer.Option(help="Share of all heads; once for each point. [default: 0.05]"),
        ] = None,
        kind: Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")] = "mean",
        draws: Annotated[int, typer.Option(help="How many sets of random heads.", min=1)] = 5,
        n: Annotated[int, typer.Option(help="How many samples of a synthetic world.", min=1)] = 100,
        limit: Limit = None,
        seed: Fresh = 2,
        batch_size: BatchSize = 32,
        dtype: Dtype = "auto",
        device: Device = None,
        out: Annotated[
            Path | None,
            typer.Option(help="ablate.html, ablate.json, or a picture: png, pdf, svg, jpg."),
        ] = None,
        run: Annotated[
            Path | None,
            typer.Option(
                help="With --scores: a folder that keeps what is finished; started again, the "
                "command goes on from there."
            ),
        ] = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """What a model loses without some heads, beside what it loses without as many others.

        The controls are the bottom heads, random heads, and random heads of the same layers.
        Whatever is lost is paired by sample, with a 95% interval. `mean` and `resample` put in what
        heads say on other scenes of a synthetic world, or on the first samples of a folder.

        Example: `corelens ablate qwen3vl-qs refer --scores run --metric ram --kind knockout`

        Example: `corelens ablate Qwen/Qwen3-VL-4B-Instruct my_samples --heads L18H3,L20H11 --out
        cut.html`
        """
        check_word("--kind", kind, KINDS)
        if (scores is None) == (heads is None):
            raise CorelensError(
                "neither --scores nor --heads" if heads is None else "--scores and --heads",
                "one of the two: which heads to ablate",
                "--scores run (a run folder of `corelens score`), or --heads L3H5,L4H1",
            )
        if run is not None and scores is None:
            raise CorelensError(
                "--run with --heads", "--run with --scores: it keeps a sweep", "leave --run out"
            )
        if out is not None:
            ending(out, "json")
        ranked = None if scores is None else open_scores(scores, metric)
        named = named_heads(heads)
        check_model(
            model, *([named] if named is not None else []), *([ranked.top(1.0)] if ranked else [])
        )
        samples = open_data(data, n, seed, limit)
        others = open_data(data, REFERENCES[kind], seed + 1) if kind in REFERENCES else None
        hooked = open_model(model, dtype, device)
        reference = others and _reference(hooked, kind, others)
        options = {"draws": draws, "batch_size": batch_size, "progress": not json, "out": run}
        sweep = _sweep(hooked, samples, ranked, named, top or [0.05], kind, reference, options)
        sweep.meta |= {"model": model, "data": data, "seed": seed}
        if seen := scored_on(ranked, samples, data):
            sweep.meta["note"] = (
                f"The heads were scored on {seen} of these samples: choose other ones."
            )
        costs = None if scores is None else stored(scores)
        if costs is not None:
            sweep.meta["row_costs"] = {group: list(cost) for group, cost in costs.costs.items()}
            if advice := costs.advice(ranked):
                sweep.meta["note"] = "; ".join(filter(None, [sweep.meta.get("note"), advice]))
        if out is not None:
            _write(sweep, out)
            show_page(out, open_page)
        if json:
            typer.echo(json_module.dumps(sweep.to_json()))
            return
        _print(sweep)
        if costs is not None:
            print_short(costs)
        if out is not None:
            Console().print(f"written: {out}", highlight=False, markup=False, soft_wrap=True)


def _reference(model: Any, kind: str, samples: Any) -> Any:
    """What takes the place of the heads' output: its mean over these samples, or their run."""
    from corelens.interventions.ablation import mean_z

    samples = samples[: REFERENCES[kind]]
    if kind == "mean":
        return mean_z(model, samples)
    inputs = model.prepare(samples)
    return model.run_with_cache(inputs, names_filter=lambda name: name.endswith("attn.hook_z"))[
        1
    ], inputs


def _sweep(
    model: Any,
    samples: Any,
    scores: Any,
    heads: Any,
    shares: list[float],
    kind: str,
    reference: Any,
    options: dict[str, Any],
) -> Any:
    """The curves of the top heads and their controls; of heads that were named, one point."""
    from corelens.evaluation.evaluate import batches, evaluate
    from corelens.evaluation.sweep import Sweep, ablation_sweep, conditions, measure
    from corelens.heads.scores import HeadScores

    if scores is not None:
        return ablation_sweep(
            model, samples, scores, sorted(set(shares)), kind, reference=reference, **options
        )
    if not heads:
        raise CorelensError("no head", "one head or more", "--heads L3H5,L4H1")
    # Heads that were named have no rank, so no bottom: one score for all heads serves the random
    # draws.
    even = HeadScores(heads.mask(model.cfg.n_layers, model.cfg.n_heads))
    share, draws = len(heads) / even.values.size, options["draws"]
    prepared = batches(model, samples, options["batch_size"])
    clean = evaluate(model, prepared)
    curves = {
        "given" if name == "top" else name: [
            measure(model, prepared, clean, sets, kind, share, reference)
        ]
        for name, sets in conditions(even, share, draws, exclude=heads).items()
        if name != "bottom"
    }
    return Sweep(
        kind, clean.interval, curves, {"samples": len(samples), "draws": draws, "metric": None}
    )


def _rows(sweep: Any) -> list[list[str]]:
    """Which heads, how many, accuracy, what is lost: a line for each, share by share."""
    rows = []
    for number in range(len(next(iter(sweep.curves.values())))):
        for name, points in sweep.curves.items():
            point = points[number]
            rows.append(
                [f"{point.k} ({point.fraction:.1%})", name, str(point.accuracy), str(point.drop)]
            )
    return rows


COLUMNS = ("heads ablated", "which", "accuracy [95% CI]", "lost, paired [95% CI]")


def _in_words(sweep: Any) -> str:
    """How it was ablated, and what the model does with all heads."""
    words = f"{sweep.kind} ablation ({KINDS[sweep.kind]})"
    by = f", top by {sweep.meta['metric']}" if sweep.meta["metric"] else ""
    return f"{words}{by}; {sweep.meta['samples']} samples, all heads: accuracy {sweep.clean}"


def _print(sweep: Any) -> None:
    table = Table(
        *COLUMNS[:2], caption=f"random and layer-matched: the mean of {sweep.meta['draws']} draws"
    )
    for name in COLUMNS[2:]:
        table.add_column(escape(name), justify="right", no_wrap=True)
    curves = len(sweep.curves)
    for i, row in enumerate(_rows(sweep)):
        style = "bold" if i % curves == 0 else None
        table.add_row(*map(escape, row), style=style, end_section=(i + 1) % curves == 0)
    console = Console(highlight=False, markup=False)
    console.print(_in_words(sweep), soft_wrap=True)
    console.print(table)
    for point in next(iter(sweep.curves.values())):
        listed = ", ".join(f"L{layer}H{head}" for layer, head in point.draws[0])
        console.print(f"{point.fraction:.1%} of the heads: {listed}", soft_wrap=True)
    if "note" in sweep.meta:
        console.print(sweep.meta["note"])


def _write(sweep: Any, out: Path) -> None:
    from corelens.viz import page as p

    if out.suffix.lower() == ".json":
        write_whole(out, json_module.dumps(sweep.to_json(), indent=1))
        return
    figure = sweep.plot()
    if out.suffix.lower() != ".html":
        write_picture(figure, out)
        return
    rows, curves = _rows(sweep), len(sweep.curves)
    caption = (
        "Accuracy, and what is lost sample by sample; "
        f"random heads: the mean of {sweep.meta['draws']} draws."
    )
    groups, first = range(curves, len(rows), curves), range(0, len(rows), curves)
    table = p.table(
        ["which", *COLUMNS[:1], *COLUMNS[2:]],
        [[row[1], row[0], *row[2:]] for row in rows],
        caption,
        hot=first,
        groups=groups,
    )
    curves_figure = p.figure(figure, "The same, with 95% intervals over samples.")
    note = [p.note(sweep.meta["note"])] if "note" in sweep.meta else []
    meta = {name: value for name, value in sweep.meta.items() if name not in ("note", "row_costs")}
    title = f"Without {'these' if 'given' in sweep.curves else 'the top'} heads"
    write_whole(
        out, p.page(title, [p.section("", *note, table, curves_figure)], meta, _in_words(sweep))
    )
