"""The commands `corelens demo` and `corelens study`: the papers' findings on a bundled model, or on
one of yours."""

import inspect
import json as json_module
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from corelens.cli.opening import check_model, open_data, open_model
from corelens.cli.options import Device, Dtype, Json, Limit, Open, Seed, check_word
from corelens.cli.output import show_page
from corelens.cli.study_tables import show_study
from corelens.demo import DEFAULT
from corelens.errors import CorelensError
from corelens.findings.options import BESIDE

console, errors = Console(), Console(stderr=True)
Out = Annotated[Path, typer.Option(help="Folder for report.html and report.json.")]

DEMO: dict[str, Any] = {
    "draws": 20,
    "curve_draws": 3,
    "shares": (0.05, 0.1),
    "kinds": ("zero", "knockout"),
    "effect_samples": 0,
    "score_share": 60 / 160,
    "without": BESIDE,
}
FULL: dict[str, Any] = {
    "effect_samples": 0,
    "score_share": 400 / 1400,
    "without": ("faithfulness", "causal", "design", "repeats"),
}
QUICK: dict[str, Any] = {
    "draws": 20,
    "curve_draws": 5,
    "shares": (0.05, 0.1),
    "kinds": ("zero", "knockout"),
    "effect_samples": 16,
    "score_share": 40 / 100,
    "sparse_samples": 20,
    "without": ("causal", "design", "repeats"),
}
IDS = tuple(f"F{number}" for number in range(1, 9))
CAPTIONS = "captions"  # of the pictures of `refer`: a question that takes a long answer


def add_study(app: typer.Typer) -> None:
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
        device: Device = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """The first findings on a bundled model and fresh scenes, in a minute or two: a table here,
        a page in --out.

        Example: `corelens demo --out report`
        """
        from corelens.data.synthetic import synthetic
        from corelens.demo import checkpoint
        from corelens.findings import study

        checkpoint(model)  # (a folder or a name on the Hub is for `study`)

        options = f"{' --full' if full else ''} --seed {seed}" + (
            f" --model {model}" if model != DEFAULT else ""
        )
        hooked = open_model(model, device=device)
        samples = synthetic("refer", 1400 if full else 160, seed=seed)
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
        show_study(result, json)
        show_page(out / "report.html", open_page)

    @app.command()
    def study(
        models: Annotated[
            list[str] | None,
            typer.Argument(
                help="Bundled models, folders, or names on the Hub; with --zoo by default all "
                "bundled ones."
            ),
        ] = None,
        data: Annotated[
            list[str] | None,
            typer.Option(
                help="Once for each: a synthetic world ('video:grid=16' with options), 'captions', "
                "a folder with samples.jsonl, a public set."
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
        limit: Limit = None,
        seed: Seed = 1,
        dtype: Dtype = "auto",
        device: Device = None,
        open_page: Open = False,
        json: Json = False,
    ) -> None:
        """Every finding of the papers on these models and data: claimed, measured, reproduced or
        not.

        A study that was stopped goes on when it is started again. Heads are scored on the first
        part of each world's samples and tested on the rest.

        Example: `corelens study qwen3vl-qs --quick --out study`

        Example: `corelens study Qwen/Qwen3-VL-4B-Instruct --data my_samples --data doc --n 300`

        Example: `corelens study --zoo --out zoo`
        """
        from corelens.demo import list_demos

        if not models and not zoo:
            raise CorelensError(
                "corelens study without a model",
                "a model's name, or --zoo for all that are here",
                f"corelens study {DEFAULT} --quick; or corelens study --zoo, which takes "
                f"{', '.join(list_demos())} in turn: hours",
            )
        names, n = list(models or list_demos()), n or (100 if quick else 300)
        check_model_names(names)
        for id in only or ():
            check_word("--only", id, IDS)
        words = [*(f"--data {name}" for name in data or ()), f"--n {n}", f"--seed {seed}"]
        words += [] if limit is None else [f"--limit {limit}"]
        words += ["--quick"] if quick else []
        words += [f"--only {name}" for name in only or ()]
        words += [] if draws is None else [f"--draws {draws}"]
        words += [f"--without {name}" for name in without or ()]
        words += [] if hours == 8.0 else [f"--hours {hours:g}"]
        groups = [[name] for name in names] if zoo else [names]
        worlds = {tuple(group): list(data or default_worlds(group)) for group in groups}
        if not json:
            _announce(worlds, n, draws or (QUICK if quick else {}).get("draws", 100), hours, out)
        # (all data is read before a model is loaded)
        every_world = dict.fromkeys(chain.from_iterable(worlds.values()))
        samples = {world: _samples(world, n, seed, limit) for world in every_world}
        from corelens.findings import study as run

        settings: dict[str, Any] = dict(QUICK) if quick else {}
        if draws is not None:
            settings |= {"draws": draws, "curve_draws": max(1, draws // 5)}
        left_out = (*settings.pop("without", ()), *(without or ()))

        def studied(group: list[str], folder: Path) -> Any:
            hooked = {
                Path(name).name if Path(name).exists() else name: open_model(name, dtype, device)
                for name in group
            }
            worlds_here = {Path(world).name: samples[world] for world in worlds[tuple(group)]}
            result = run(
                hooked,
                worlds_here,
                out=folder,
                findings=only or None,
                command=" ".join(["corelens study", *group, *words]),
                progress=not json,
                seed=seed,
                hours=hours,
                without=tuple(dict.fromkeys(left_out)),
                **settings,
            )
            if len(hooked) == 1:
                _with_explorer(result, next(iter(hooked.values())), worlds_here, folder)
            return result

        if zoo:
            studies = [studied([name], out / Path(name).name) for name in names]
            result = _joined(studies, out, " ".join(["corelens study", *names, "--zoo", *words]))
        else:
            result = studied(names, out)
        show_study(result, json)
        show_page(out / "report.html", open_page)


def check_model_names(names: Sequence[str]) -> None:
    """Raise for a model that cannot be there, and for two that reports would call the same."""
    for name in names:
        check_model(name)
    called = [Path(name).name for name in names]
    twice = [name for name in dict.fromkeys(called) if called.count(name) > 1]
    if twice:
        raise CorelensError(
            f"two models called {twice[0]!r}", "models whose names differ", "name each once"
        )


def _announce(
    worlds: dict[tuple[str, ...], list[str]], n: int, draws: int, hours: float, out: Path
) -> None:
    """What will be studied, before anything is loaded or drawn."""
    for group, of_group in worlds.items():
        line = (
            f"studying {', '.join(group)} on {', '.join(of_group)}: up to {n} samples each, "
            f"{draws} random sets of heads, {hours:g} core-hours a model → {out}"
        )
        errors.print(line, highlight=False, markup=False, soft_wrap=True)


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


def _joined(studies: list[Any], out: Path, command: str) -> Any:
    """Several studies as one report."""
    from corelens.findings.result import Study

    joint = Study.join(studies)
    joint.data["command"] = command
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
    worlds = list(dict.fromkeys(_named(row["world"], row.get("options") or {}) for row in rows))
    if not worlds:
        raise CorelensError(
            f"no data for {', '.join(models)}",
            "samples to study it on",
            "--data refer, or a folder",
        )
    return [*worlds, *([CAPTIONS] if "refer" in worlds else [])]


def _card(model: str) -> dict[str, Any] | None:
    from corelens.demo import list_demos, read_card

    if (Path(model) / "card.json").exists():
        return read_card(Path(model).name, Path(model).parent)
    return read_card(model) if model in list_demos() else None


def _named(world: str, options: dict[str, Any]) -> str:
    """A world as --data names it, with those options that are not its own defaults:
    "video:grid=16"."""
    from corelens.data.synthetic import WORLDS

    parameters = inspect.signature(WORLDS[world]).parameters.items()
    usual = {name: parameter.default for name, parameter in parameters}
    written = [
        f"{name}={json_module.dumps(value, separators=(',', ':'))}"
        for name, value in options.items()
        if value != (list(usual[name]) if isinstance(usual[name], tuple) else usual[name])
    ]
    return f"{world}:{','.join(written)}" if written else world


def _samples(name: str, n: int, seed: int, limit: int | None) -> Any:
    if name == CAPTIONS and not Path(name).exists():
        from corelens.findings.captions import captioned

        return [captioned(sample) for sample in open_data("refer", n, seed, limit)]
    return open_data(name, n, seed, limit)[:n]
