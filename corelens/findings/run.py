"""The study as a whole: every finding on every model and world, one after the other, kept as it
goes."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from corelens.disk.checksum import digest_of
from corelens.disk.write import make_folder, write_first
from corelens.errors import CorelensError
from corelens.findings.criteria import ACCURACY
from corelens.findings.curves import curves
from corelens.findings.design_space import design_space
from corelens.findings.faithfulness import faithfulness
from corelens.findings.full_disk import full_disk_named
from corelens.findings.options import (
    BESIDE,
    CURVES,
    DESIGN,
    FAITHFULNESS,
    READINGS,
    REPEATS,
    Options,
)
from corelens.findings.reading import judged_reading
from corelens.findings.repeats import agreement_over_n, repeats
from corelens.findings.result import FINDINGS, FORMAT, Study, read_report
from corelens.findings.time_limit import Limit, OutOfHours
from corelens.findings.usable_samples import usable_samples
from corelens.findings.verdict import LEFT_OUT
from corelens.findings.world import World, number_rows
from corelens.heads.intervals import accuracy_interval
from corelens.inputs.prepare import Sample
from corelens.runs.lock import locked
from corelens.runs.processes import Claims, Piece, called, carry_out, check_folder, is_first
from corelens.runs.provenance import about, model_identity, refuse_active, sample_hash

LEAST_SAMPLES = 10
Numbers = dict[str, Any]


def run_study(
    models: Mapping[str, Any],
    worlds: Mapping[str, Sequence[Sample]],
    out: Path | None,
    options: Options,
    findings: Sequence[str] | None,
    resume: bool,
    command: str | None,
    progress: bool,
) -> Study:
    """See `corelens.findings.study`."""
    studied = _studied(findings)
    _check_enough(models, worlds)
    check_folder(out if resume else None)
    if out is not None and (out / "report.json").exists():
        read_report(out / "report.json")  # one of another version is named and kept
    usable = {name: usable_samples(name, samples) for name, samples in worlds.items()}
    descriptions = {name: about(model) | _size(model) for name, model in models.items()}
    for description in descriptions.values():
        del description["date"]  # the same study is the same bytes whenever it is made
    with ExitStack() as stack:
        for model in models.values():
            refuse_active(model)
        if out is not None and resume:
            work = out / "work"
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corelens-study-")))
        stack.enter_context(full_disk_named(work if out is None else out))
        identity = {
            "format": FORMAT,
            "models": {
                name: model_identity(model, descriptions[name]) for name, model in models.items()
            },
            "worlds": {name: sample_hash(samples) for name, (samples, _) in usable.items()},
            "options": options.identity(),
        }
        _same_study(work, identity)  # a folder of another study is not touched
        stack.enter_context(locked(make_folder(work)))
        if not write_first(work / "study.json", json.dumps(identity, indent=1)):
            _same_study(work, identity)  # (another process of this launch was the first)
        line = stack.enter_context(_progress(progress and is_first()))
        measured = {}
        for name, model in models.items():
            folder = work / re.sub(r"[^\w.-]+", "-", name)
            measured[name] = {"about": descriptions[name]} | _measure_model(
                model,
                {world: samples for world, (samples, _) in usable.items()},
                options,
                studied,
                folder,
                line,
                digest_of(json.loads(json.dumps(identity))),
            )
        first = next(iter(descriptions.values()))
        study = Study(
            {
                "command": command, "versions": first["versions"], "studied": studied,
                "options": options.to_json(), "models": measured,
                "unreadable": {name: wrong for name, (_, wrong) in usable.items() if wrong},
            }
        )  # fmt: skip
        if out is not None and is_first():
            line.step("writing the report")
            study.write(out)
    return study


def _measure_model(
    model: Any, samples: Mapping[str, Sequence[Sample]], options: Options, studied: Sequence[str],
    folder: Path, line: "_Line", run: str,
) -> Numbers:  # fmt: skip
    """Which worlds count, which reading is judged, then every finding in every world."""
    worlds, left_out = [], []
    limit = Limit(folder, options.hours)
    for name, of_world in samples.items():
        of_name = folder / re.sub(r"[^\w.-]+", "-", name)
        worlds.append(World(name, model, of_world, options, of_name, line.step, limit, run))
    parts = {}
    for world in worlds:
        line.begin(f"scores and clean answers, {world.name}")
        try:
            parts[world.name] = _about_world(world)
        except OutOfHours:
            left_out.append(world.name)
            parts[world.name] = _nothing(world) | {"why_not": _out_of(options)}
        line.end(parts[world.name]["why_not"] or "it counts")
    counting = [
        world for world in worlds if parts[world.name]["why_not"] is None and len(world.serves) > 1
    ]
    reading = judged_reading({world.name: parts[world.name]["row_costs"] for world in counting})
    if not counting:
        reading["reason"] = "; ".join(
            f"{name}: {part['why_not']}" for name, part in parts.items() if part["why_not"]
        )

    # what is measured, in the order of one process; several take different parts
    parts_of: list[tuple[World, str, str]] = []  # world, its name in the report, title
    pieces: list[Piece] = []

    def add(title: str, world: World, name: str, make: Callable[[], Any]) -> None:
        parts_of.append((world, name, title))
        pieces.append(_announced(line, options, title, world, world.piece(name, make)))

    for id in studied:
        finding = FINDINGS[id]
        for world in worlds:
            part = parts[world.name]
            part["skipped"][id] = world.lacks(finding.needs)
            if part["skipped"][id] or part["why_not"] or id not in world.serves:
                continue
            if finding.needs_rows and reading["key"] is None:
                continue
            others = counting if world in counting else [world]
            make = partial(finding.measure, world, others, reading["key"] or "ram")
            add(f"{id} {finding.title}", world, id, make)
    for world in counting:
        key = reading["key"]
        for name, (title, beside) in _beside(options).items():
            if key is not None and world.lacks(("regions", "answers")) is None:
                add(title, world, name, partial(beside, world, key))
    carry_out(Claims(folder), pieces)
    for (world, name, title), piece in zip(parts_of, pieces, strict=True):
        part = parts[world.name]
        if not piece.file.exists():
            left_out.append(f"{title}, {world.name}")
            if name in FINDINGS:
                part["skipped"][name] = _out_of(options)
            continue
        numbers = world.read(name)
        if name in FINDINGS:
            part["numbers"][name] = numbers
        else:
            part[name] = numbers
    for world in counting:
        world.release()
    limit.keep()
    return {"reading": reading, "worlds": parts, "left_out": left_out}


def _announced(line: "_Line", options: Options, title: str, world: World, piece: Piece) -> Piece:
    """This work, announced before and with its seconds after; left out where the time is used
    up."""

    def make() -> None:
        start = time.perf_counter()
        line.begin(f"{title}, {world.name}")
        try:
            piece.make()
        except OutOfHours:
            line.end(_out_of(options))
        else:
            line.end(f"{time.perf_counter() - start:.0f} s")

    return replace(piece, make=make)


def _beside(options: Options) -> dict[str, tuple[str, Callable[[World, str], Any]]]:
    """{name: (title, what measures it)} of what stands beside the findings and is wanted."""
    every: dict[str, tuple[str, Callable[[World, str], Any]]] = {
        FAITHFULNESS: ("Faithfulness", lambda world, reading: faithfulness(world)),
        REPEATS: ("Repeats of the rankings", lambda world, reading: repeats(world)),
        DESIGN: ("Design space", design_space),
        CURVES: ("Curves", curves),
    }
    without = set(options.without) | (
        {FAITHFULNESS, DESIGN} if not options.effect_samples else set()
    )
    return {name: made for name, made in every.items() if name not in without}


def _out_of(options: Options) -> str:
    return f"{LEFT_OUT}: the limit of {options.hours:g} core-hours was reached"


def _nothing(world: World) -> Numbers:
    """The part of a world in report.json before anything is measured."""
    return {
        "serves": list(world.serves), "scored": len(world.to_score), "tested": len(world.to_test),
        "without_region": world.without_region, "clean": None, "why_not": None, "row_costs": None,
        "scores": {}, "agreement_over_n": {}, "skipped": {}, "numbers": {},
        **dict.fromkeys(BESIDE),
    }  # fmt: skip


def _about_world(world: World) -> Numbers:
    """How much was scored and tested, whether the world counts, the rows the answer hangs on, and
    the scores."""
    part = _nothing(world)
    missing = world.lacks(("regions",)) or world.lacks(("answers",))
    if missing:
        return part | {"why_not": missing}
    part["clean"] = accuracy_interval(world.clean.correct)._asdict()
    if len(world.serves) == 1:
        return part
    for key in READINGS:
        part["scores"][key] = number_rows(world.scores[key].values)
        part["agreement_over_n"][key] = agreement_over_n(world.scores[key], world.options.seed)
    part["row_costs"] = world.row_costs
    if world.clean.accuracy < ACCURACY.value:
        part["why_not"] = (
            f"the model answers {world.clean.accuracy:.0%}: less than {ACCURACY.value:.0%}"
        )
    return part


def _size(model: Any) -> dict[str, int]:
    return {"parameters": sum(parameter.numel() for parameter in model.hf.parameters())}


def _studied(findings: Sequence[str] | None) -> list[str]:
    wanted = list(FINDINGS) if findings is None else list(findings)
    unknown = [id for id in wanted if id not in FINDINGS]
    if unknown or not wanted:
        raise CorelensError(
            f"findings {unknown or wanted}",
            f"some of {', '.join(FINDINGS)}",
            "name these, or none for all",
        )
    return [id for id in FINDINGS if id in wanted]


def _check_enough(models: Mapping[str, Any], worlds: Mapping[str, Sequence[Sample]]) -> None:
    if not models or not worlds:
        raise CorelensError(
            f"{len(models)} models and {len(worlds)} worlds", "one of each or more", "give them"
        )
    for name, samples in worlds.items():
        if len(samples) < LEAST_SAMPLES:
            raise CorelensError(
                f"{len(samples)} samples in {name!r}",
                f"{LEAST_SAMPLES} or more: some to score heads on, others to test them on",
                "give more; a published table needs 100 scored and 200 tested",
            )


def _same_study(work: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder that holds the work of another study or version: nothing of it would fit."""
    header, identity = work / "study.json", json.loads(json.dumps(identity))
    if not header.exists():
        return
    try:
        stored = dict(json.loads(header.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise CorelensError(
            f"{header}, which cannot be read ({error})",
            "what a study wrote",
            "choose another folder, or delete this one",
        ) from error
    differs = [key for key in identity if stored.get(key) != identity[key]]
    if "format" in differs:
        raise CorelensError(
            f"{work}, the work of a study of another version "
            f"({stored.get('format', 'corelens-study/2 or older')})",
            f"{FORMAT}, or an empty folder",
            "keep it, and choose another folder: the two are not mixed",
        )  # fmt: skip
    if differs:
        raise CorelensError(
            f"{work}, which holds a study with other {' and '.join(differs)}{called()}",
            "an empty folder, or one with the same models, samples and options, which then goes on",
            "choose another folder, or delete this one",
        )


class _Line:
    """One line a step, and while it runs what it does."""

    def __init__(self, console: Console, bar: Progress):
        self.console, self.bar, self.runs, self.name = console, bar, 0, ""
        self.task = bar.add_task("", total=None)

    def begin(self, name: str) -> None:
        self.name, self.runs = name, 0
        self.bar.update(self.task, description=escape(name))

    def step(self, words: str) -> None:
        self.runs += 1
        self.bar.update(self.task, description=escape(f"{self.name}: {words} ({self.runs})"))

    def end(self, words: str) -> None:
        self.console.print(f"{self.name}: {words}", highlight=False, markup=False)


@contextmanager
def _progress(show: bool) -> Iterator[_Line]:
    console = Console(stderr=True, quiet=not show)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not show) as bar:
        yield _Line(console, bar)
