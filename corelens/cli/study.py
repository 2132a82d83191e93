"""The commands `corelens demo` and `corelens study`: the papers' findings on a bundled model, or on
one of yours."""

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
from corelens.findings.finding import points
from corelens.findings.options import BESIDE

console = Console()
Out = Annotated[Path, typer.Option(help="Folder for report.html and report.json.")]
Seed = Annotated[int, typer.Option(help="Of the scenes and of the random controls.", min=0)]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")]

DEMO: dict[str, Any] = {
    "draws": 20, "curve_draws": 3, "shares": (0.05, 0.1), "kinds": ("zero", "knockout"), "effect_samples": 0,
    "score_share": 60 / 160, "without": BESIDE,
}  # fmt: skip
FULL: dict[str, Any] = {
    "effect_samples": 0, "score_share": 400 / 1400, "without": ("faithfulness", "causal", "design", "repeats"),
}  # fmt: skip
QUICK: dict[str, Any] = {
    "draws": 20, "curve_draws": 5, "shares": (0.05, 0.1), "kinds": ("zero", "knockout"), "effect_samples": 16,
    "score_share": 40 / 100, "sparse_samples": 20, "without": ("causal", "design", "repeats"),
}  # fmt: skip
CAPTIONS = "captions"  # of the pictures of `refer`: a question that takes a long answer


def add_study(
    app: typer.Typer, open_model: Callable[[str], Any], open_data: Callable[..., Any]
) -> None:
    """Give the command line its `demo` and its `study`."""

    @app.command()
    def demo(
        out: Out = Path("report"),
        seed: Seed = 1,
        full: Annotated[
            bool, typer.Option("--full", help="1,000 test scenes, all curves (minutes).")
        ] = False,
        model: Annotated[
            str, typer.Option(help="A bundled model, see `corelens models`.")
        ] = DEFAULT,
        json: Json = False,
    ) -> None:
        """The first findings on a bundled model and fresh scenes, in a minute: a table here, a page
        in --out.

        Example: `corelens demo --out report`
        """
        from corelens.data.synthetic import synthetic
        from corelens.demo import load_demo
        from corelens.findings import study

        options = f"{' --full' if full else ''} --seed {seed}" + (
            f" --model {model}" if model != DEFAULT else ""
        )
        hooked, samples = load_demo(model), synthetic("refer", 1400 if full else 160, seed=seed)
        result = study(
            hooked,
            {"refer": samples},
            out=out,
            findings=["F1", "F3", "F4", "F5"],
            resume=False,
            command=f"corelens demo{options}",
            progress=not json,
            seed=seed,
            **(FULL if full else DEMO),
        )
        _with_explorer(result, hooked, {"refer": samples}, out)
        _show(result, json)

    @app.command()
    def study(
        models: Annotated[
            list[str] | None,
            typer.Argument(help="Bundled models, folders, or names on the Hub; all bundled ones."),
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
            int | None,
            typer.Option(help="Samples of each world. [default: 300; quick: 100]", min=10),
        ] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="Fewer samples and draws: a few minutes.")
        ] = False,
        zoo: Annotated[
            bool,
            typer.Option(
                "--zoo",
                help="Each model on its own worlds, in its own folder; then one joint report.",
            ),
        ] = False,
        only: Annotated[
            list[str] | None, typer.Option(help="Once for each finding, F1 to F8; all.")
        ] = None,
        draws: Annotated[
            int | None,
            typer.Option(
                help="Random sets of heads at the 5% set; a fifth of it elsewhere. [default: 100; "
                "quick: 20]",
                min=1,
            ),
        ] = None,
        without: Annotated[
            list[str] | None,
            typer.Option(
                help="Once for each thing beside the findings that is not measured: "
                f"{', '.join(BESIDE)}."
            ),
        ] = None,
        hours: Annotated[
            float,
            typer.Option(
                help="Core-hours for each model; what is not measured by then is left out and "
                "named. With more hours the study goes on."
            ),
        ] = 8.0,
        seed: Seed = 1,
        json: Json = False,
    ) -> None:
        """Every finding of the papers on these models and data: claimed, measured, reproduced or
        not.

        A study that was stopped goes on when it is started again. Heads are scored on the first
        part of each world's samples and tested on the rest.

        Example: `corelens study qwen3vl-s --quick --out study`

        Example: `corelens study Qwen/Qwen3-VL-4B-Instruct --data my_samples --data doc --n 300`

        Example: `corelens study --zoo --out zoo`
        """
        from corelens.demo import list_demos
        from corelens.findings import study as run

        names, n = list(models or list_demos()), n or (100 if quick else 300)
        asked = [*(f"--data {name}" for name in data or ()), f"--n {n}", f"--seed {seed}"]
        asked += ["--quick"] * quick + [f"--only {name}" for name in only or ()]
        asked += [f"--draws {draws}"] * (draws is not None)
        asked += [f"--without {name}" for name in without or ()]
        asked += [f"--hours {hours:g}"] * (hours != 8.0)
        settings: dict[str, Any] = dict(QUICK) if quick else {}
        if draws is not None:
            settings |= {"draws": draws, "curve_draws": max(1, draws // 5)}
        left_out = (*settings.pop("without", ()), *(without or ()))

        def studied(some: list[str], folder: Path) -> Any:
            worlds = {
                Path(name).name: _samples(name, n, seed, open_data)
                for name in data or default_worlds(some)
            }
            hooked = {
                Path(name).name if Path(name).exists() else name: open_model(name) for name in some
            }
            command = " ".join(["corelens study", *some, *asked])
            result = run(
                hooked, worlds, out=folder, findings=only or None, command=command, progress=not json, seed=seed,
                hours=hours, without=tuple(dict.fromkeys(left_out)), **settings,
            )  # fmt: skip
            if len(hooked) == 1:
                _with_explorer(result, next(iter(hooked.values())), worlds, folder)
            return result

        _show(_joined(studied, names, out) if zoo else studied(names, out), json)


def _with_explorer(result: Any, hooked: Any, worlds: dict[str, Any], out: Path) -> None:
    """Write the report again with an explorer of the first tested sample of the first world that
    was scored; without a picture there is none."""
    import numpy as np

    from corelens.explorer.explore import explore
    from corelens.heads.scores import HeadScores

    (model,) = result.data["models"].values()
    for world, part in model["worlds"].items():
        tables = {
            key: HeadScores(np.array(rows, dtype=np.float32), meta={"key": key})
            for key, rows in part["scores"].items()
        }
        if not tables or len(worlds[world]) <= part["scored"]:
            continue
        ranking = tables.get(model["reading"]["key"], next(iter(tables.values())))
        try:
            explorer = explore(hooked, worlds[world][part["scored"]], tables, ranking.top(k=3))
        except CorelensError:
            continue
        return result.write(out, explorer.part())


def _joined(studied: Callable[..., Any], names: list[str], out: Path) -> Any:
    """Each model's study in a folder of its own, the models in memory one at a time; then all of
    them as one report."""
    from corelens.findings.result import Study

    joint = Study.join([studied([name], out / Path(name).name) for name in names])
    joint.write(out)
    return joint


def default_worlds(models: list[str]) -> list[str]:
    """The worlds that models with a card were trained on, as it measured them; and captions of the
    plain `refer`."""
    cards = [card for card in map(_card, models) if card is not None]
    rows = [
        row
        for card in cards
        for row in card["held_out"]
        if row["world"] in card["training"]["worlds"]
    ]
    found = list(dict.fromkeys(_named(row["world"], row.get("options") or {}) for row in rows))
    if not found:
        raise CorelensError(
            f"no data for {', '.join(models)}",
            "samples to study it on",
            "--data refer, or a folder",
        )
    return [*found, *([CAPTIONS] if "refer" in found else [])]


def _card(model: str) -> dict[str, Any] | None:
    from corelens.demo import list_demos, read_card

    if (Path(model) / "card.json").exists():
        return read_card(Path(model).name, Path(model).parent)
    return read_card(model) if model in list_demos() else None


def _named(world: str, options: dict[str, Any]) -> str:
    """A world as --data names it, with those options that are not its own defaults:
    "video:grid=16"."""
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


def _show(result: Any, json: bool) -> None:
    """The verdicts, after what they rest on: the rows that the answer hangs on, and what heads
    cost."""
    if json:
        typer.echo(json_module.dumps(result.to_json()))
        return
    for name, model in result.data["models"].items():
        console.print(f"{name}: {_reading(model)}", highlight=False)
        if model["left_out"]:
            console.print(
                f"{name}: left out at the limit of core-hours: {'; '.join(model['left_out'])}",
                highlight=False,
            )
        for world, part in model["worlds"].items():
            if "F5" in part["numbers"]:
                console.print(_costs(f"{name}, {world}", part))
    verdicts = Table("finding", "number", "verdict", show_lines=True)
    for concluded in result.findings:
        overall = concluded.overall
        words = f"{overall}: {overall.reason}" if overall.reason else str(overall)
        verdicts.add_row(
            f"{concluded.id} {concluded.finding.title}", escape(overall.number), escape(words)
        )
    console.print(verdicts)
    console.print(f"report: {result.report}", highlight=False)


def _reading(model: dict[str, Any]) -> str:
    """Which heads are judged, and what cutting the evidence from each group of rows costs."""
    reading = model["reading"]
    costs = []
    for world, part in model["worlds"].items():
        if part["row_costs"]:
            lost = ", ".join(
                f"{rows} {100 * cost['value'] + 0.0:.0f}"
                for rows, cost in part["row_costs"].items()
            )
            costs.append(f"cutting the evidence costs in {world}, by rows (points): {lost}")
    judged = (
        f"judged by {reading['words']}"
        if reading["key"]
        else f"no ranking can be judged: {reading['reason']}"
    )
    return "; ".join([judged, *costs])


def _costs(title: str, part: dict[str, Any]) -> Table:
    """Points lost by the top, the bottom and random heads, under each intervention."""
    numbers = part["numbers"]["F5"]
    kinds = list(numbers["random"])
    clean, tested = part["clean"]["value"], part["tested"]
    table = Table(
        title=f"{title}: points lost of {100 * clean:.0f} on {tested} samples",
        caption="exact 95% intervals; heads were scored on other samples",
    )
    table.add_column("heads")
    for kind in kinds:
        table.add_column(kind, justify="right", no_wrap=True)
    for key in (key for key in part["scores"] if key in numbers):
        for role in ("top", "bottom"):
            cells = [escape(points(numbers[key][role][kind])) for kind in kinds]
            table.add_row(
                escape(f"{role} {numbers[key]['k']} by {key}"),
                *cells,
                style="bold" if role == "top" else None,
            )
    highest = [
        f"up to {100 * clean * max(numbers['random'][kind], default=0.0):.0f}"
        f" ({len(numbers['random'][kind])} sets)"
        for kind in kinds
    ]
    table.add_row(f"{numbers[numbers['judged']]['k']} random heads", *highest)
    return table
