"""The commands `corelens demo` and `corelens study`: the papers' findings on a bundled model, or on one of yours."""

import inspect
import json as json_module
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.demo import DEFAULT
from corelens.errors import CorelensError

console = Console()
Out = Annotated[Path, typer.Option(help="Folder for report.html, report.json and figures/.")]
Seed = Annotated[int, typer.Option(help="Of the scenes and of the random controls.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")]

DEMO = {"draws": 2, "fractions": (0.02, 0.05, 0.1), "sweep_kinds": ("mean",), "score_share": 60 / 160}
DEMO_KINDS = ("zero", "mean", "knockout")
QUICK = {
    "draws": 2, "kinds": DEMO_KINDS, "fractions": (0.05, 0.1), "sweep_kinds": ("knockout",), "kept": (0.05, 0.2),
    "windows": 2, "scenes": 3, "score_share": 40 / 100, "sparse_samples": 40,
}  # fmt: skip
CAPTIONS = "captions"  # of the pictures of `refer`: a question that takes a long answer


def add_study(app: typer.Typer, open_model: Callable[[str], Any], open_data: Callable[..., Any]) -> None:
    """Give the command line its `demo` and its `study`."""

    @app.command()
    def demo(
        out: Out = Path("report"),
        seed: Seed = 1,
        full: Annotated[bool, typer.Option("--full", help="1,000 test scenes, all curves (minutes).")] = False,
        model: Annotated[str, typer.Option(help="A bundled model, see `corelens models`.")] = DEFAULT,
        json: Json = False,
    ) -> None:
        """The first findings on a bundled model and fresh scenes, in a minute: a table here, a page in --out.

        Example: `corelens demo --out report`
        """
        from corelens.data import synthetic
        from corelens.demo import load_demo
        from corelens.findings import study

        hooked = load_demo(model)
        options = f"{' --full' if full else ''} --seed {seed}" + (f" --model {model}" if model != DEFAULT else "")
        settings: dict[str, Any] = {"kinds": DEMO_KINDS, "seed": seed, **({} if full else DEMO)}
        if full:
            settings |= {"sweep_kinds": DEMO_KINDS, "score_share": 400 / 1400}
        result = study(
            hooked,
            {"refer": synthetic("refer", 1400 if full else 160, seed=seed)},
            out=out,
            findings=["F1", "F3", "F4", "F5"],
            resume=False,
            command=f"corelens demo{options}",
            progress=not json,
            **settings,
        )
        if json:
            typer.echo(json_module.dumps(result.to_json()))
            return
        _ablations(result)
        _verdicts(result)

    @app.command()
    def study(
        models: Annotated[
            list[str] | None, typer.Argument(help="Bundled models, folders, or names on the Hub; all bundled ones.")
        ] = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                help="Once for each: a synthetic world ('video:grid=16' with options), 'captions', a folder with "
                "samples.jsonl, a public set."
            ),
        ] = None,
        out: Out = Path("study"),
        n: Annotated[
            int | None, typer.Option(help="Samples of each world. [default: 700; quick: 100; zoo: 240]", min=10)
        ] = None,
        quick: Annotated[bool, typer.Option("--quick", help="Fewer samples, draws and curves: two minutes.")] = False,
        zoo: Annotated[
            bool, typer.Option("--zoo", help="A study of each model on its own worlds, and a page that compares them.")
        ] = False,
        only: Annotated[list[str] | None, typer.Option(help="Once for each finding, F1 to F8; all.")] = None,
        seed: Seed = 1,
        json: Json = False,
    ) -> None:
        """Every finding of the papers on these models and data: claimed, measured, reproduced or not.

        A study that was stopped goes on when it is started again. Heads are scored on the first part of each world's
        samples and tested on the rest.

        Example: `corelens study qwen3vl-s --quick --out study`

        Example: `corelens study Qwen/Qwen3-VL-4B-Instruct --data my_samples --data doc --n 300`

        Example: `corelens study --zoo --out zoo`
        """
        from corelens.demo import list_demos
        from corelens.findings import study as run

        if zoo:
            _zoo(list(models or list_demos()), data, out, n or 240, seed, only, open_model, open_data, not json)
            return
        names, worlds = list(models or list_demos()), list(data or default_worlds(models or list_demos()))
        n = n or (100 if quick else 700)
        samples = {Path(name).name: _samples(name, n, seed, open_data) for name in worlds}
        hooked = {Path(name).name if Path(name).exists() else name: open_model(name) for name in names}
        settings: dict[str, Any] = QUICK if quick else {"score_share": 200 / 700}
        given = [*names, *(f"--data {name}" for name in worlds), f"--n {n}", f"--seed {seed}"]
        given += ["--quick"] * quick + [f"--only {name}" for name in only or ()]
        result = run(
            hooked, samples, out=out, findings=only or None, command=f"corelens study {' '.join(given)}",
            progress=not json, seed=seed, **settings,
        )  # fmt: skip
        if json:
            typer.echo(json_module.dumps(result.to_json()))
        else:
            _verdicts(result)


def _zoo(
    models: list[str], data: list[str] | None, out: Path, n: int, seed: int, only: list[str] | None,
    open_model: Callable[[str], Any], open_data: Callable[..., Any], progress: bool,
) -> None:  # fmt: skip
    """Study each model, then compare what lies in `out`."""
    from corelens.findings.compare import compare
    from corelens.findings.zoo import zoo

    def worlds(model: str) -> dict[str, Any]:
        return {Path(name).name: _samples(name, n, seed, open_data) for name in data or default_worlds([model])}

    asked = "".join(
        [*(f" --data {name}" for name in data or ()), f" --n {n}", *(f" --only {name}" for name in only or ())]
    )
    for _ in zoo(models, open_model, worlds, out, asked, findings=only or None, seed=seed, progress=progress):
        page = compare(out).write(out)
        console.print(f"report: {page}", highlight=False)


def default_worlds(models: list[str]) -> list[str]:
    """The worlds that models with a card were trained on, as it measured them; and captions of the plain `refer`."""
    cards = [card for card in map(_card, models) if card is not None]
    rows = [row for card in cards for row in card["held_out"] if row["world"] in card["training"]["worlds"]]
    found = list(dict.fromkeys(_named(row["world"], row.get("options") or {}) for row in rows))
    if not found:
        raise CorelensError(f"no data for {', '.join(models)}", "samples to study it on", "--data refer, or a folder")
    return [*found, *([CAPTIONS] if "refer" in found else [])]


def _card(model: str) -> dict[str, Any] | None:
    from corelens.demo import list_demos, read_card

    if (Path(model) / "card.json").exists():
        return read_card(Path(model).name, Path(model).parent)
    return read_card(model) if model in list_demos() else None


def _named(world: str, options: dict[str, Any]) -> str:
    """A world as --data names it, with those options that are not its own defaults: "video:grid=16"."""
    from corelens.data.synthetic import WORLDS

    usual = {name: one.default for name, one in inspect.signature(WORLDS[world]).parameters.items()}
    given = [
        f"{name}={json_module.dumps(value, separators=(',', ':'))}"
        for name, value in options.items()
        if value != (list(usual[name]) if isinstance(usual[name], tuple) else usual[name])
    ]
    return f"{world}:{','.join(given)}" if given else world


def _samples(name: str, n: int, seed: int, open_data: Callable[..., Any]) -> Any:
    if name == CAPTIONS and not Path(name).exists():
        from corelens.findings.captions import captioned

        return [captioned(sample) for sample in open_data("refer", n, seed)]
    return open_data(name, n, seed)[:n]


def _ablations(result: Any) -> None:
    """What ablating heads costs, and who reads the evidence."""
    from corelens.findings.finding import cell
    from corelens.findings.options import READERS

    for setting in result.settings:
        numbers = result.measured[setting.label]
        if "table" not in numbers:
            continue
        table = Table(
            title=f"{len(setting.to_test)} fresh scenes of {setting.label!r}; clean accuracy "
            + escape(cell(setting.clean.interval)),
            caption="accuracy with 95% bootstrap intervals; heads were scored on other scenes",
        )
        table.add_column("heads ablated")
        for kind in result.options.kinds:
            table.add_column(kind, justify="right", no_wrap=True)
        for one in numbers["table"]:
            cells = [escape(cell(one["ablations"][kind]["accuracy"])) for kind in result.options.kinds]
            name = one["selection"].replace("top:", f"top {result.options.fraction:.0%}:")
            table.add_row(name, *cells, style="bold" if one["role"] == "top" else None)
        console.print(table)
        for rows, point in numbers["readers"].items():
            console.print(
                f"all heads, {READERS[rows]} cut from the evidence: accuracy {escape(cell(point['accuracy']))}",
                highlight=False,
            )


def _verdicts(result: Any) -> None:
    table = Table("finding", "measured", "verdict", show_lines=True)
    for finding in result.findings:
        said = f"{finding.verdict}, {finding.scope}" if finding.scope else finding.verdict
        table.add_row(f"{finding.id} {finding.claim.title}", escape("\n".join(finding.measured)), escape(said))
    console.print(table)
    console.print(f"report: {result.report}", highlight=False)
