"""The study as a whole: every finding on every model and world, one after the other, kept as it goes."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from corelens.errors import CorelensError
from corelens.findings import (
    f1_sparsity,
    f2_stability,
    f3_layers,
    f4_localise,
    f5_necessity,
    f6_sufficiency,
    f7_acceleration,
    f8_sparsemm,
)
from corelens.findings.cards import trained
from corelens.findings.files import full_disk_is_said
from corelens.findings.finding import NOT_JUDGED, Finding
from corelens.findings.options import Options
from corelens.findings.readable import readable
from corelens.findings.result import Study
from corelens.findings.setting import Setting
from corelens.heads.disk import file_name
from corelens.inputs.prepare import Sample
from corelens.metrics.provenance import about, model_identity, refuse_active, sample_hash
from corelens.metrics.runs import RunFolder, run_folder

FINDINGS: dict[str, Any] = {
    one.CLAIM.id: one
    for one in (
        *(f1_sparsity, f2_stability, f3_layers, f4_localise),
        *(f5_necessity, f6_sufficiency, f7_acceleration, f8_sparsemm),
    )
}
LEAST_SAMPLES = 10


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
    chosen = _chosen(findings)
    for name, given in worlds.items():
        if len(given) < LEAST_SAMPLES:
            raise CorelensError(
                f"{len(given)} samples in {name!r}",
                f"{LEAST_SAMPLES} or more: some to score heads on, others to test them on",
                "give more",
            )
    if not models or not worlds:
        raise CorelensError(f"{len(models)} models and {len(worlds)} worlds", "one of each or more", "give them")
    checked = {name: readable(name, given) for name, given in worlds.items()}
    told = {name: about(model) | _training(model) for name, model in models.items()}
    for one in told.values():
        del one["date"]  # the same study is the same bytes whenever it is made
    with ExitStack() as stack:
        for model in models.values():
            refuse_active(model)
        if out is not None and resume:
            work = out / "work"
        else:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="corelens-study-")))
        stack.enter_context(full_disk_is_said(work if out is None else out))
        identity = {
            "models": {name: model_identity(model, told[name]) for name, model in models.items()},
            "worlds": {name: sample_hash(good) for name, (good, _) in checked.items()},
            "options": options.to_json(),
        }
        stack.enter_context(run_folder(work, identity))
        line = stack.enter_context(_progress(progress))
        settings, measured = [], {}
        for model_name, model in models.items():
            for world, (samples, _) in checked.items():
                label = world if len(models) == 1 else f"{model_name} / {world}"
                folder = RunFolder(work / file_name(label), identity | {"label": label})
                setting = Setting(label, model_name, world, model, samples, options, folder, line.step)
                measured[label] = _measure(setting, chosen, line)
                settings.append(setting)
                setting.release()
        found = [_conclude(module, settings, measured) for module in chosen.values()]
        one = next(iter(told.values()))
        meta = (one if len(told) == 1 else {"versions": one["versions"]}) | {"models": told}
        meta |= {"seed": options.seed, "draws": options.draws, "command": command}
        unreadable = {name: wrong for name, (_, wrong) in checked.items() if wrong}
        result = Study(settings, measured, found, options, meta, unreadable)
        if out is not None:
            line.step("writing the report")
            result.write(out)
    return result


def _training(model: Any) -> dict[str, Any]:
    found = trained(str(getattr(model.hf.config, "_name_or_path", "") or ""))
    return {"training": found} if found else {}


def _chosen(findings: Sequence[str] | None) -> dict[str, Any]:
    wanted = list(FINDINGS) if findings is None else list(findings)
    unknown = [name for name in wanted if name not in FINDINGS]
    if unknown or not wanted:
        raise CorelensError(
            f"findings {unknown or wanted}", f"some of {', '.join(FINDINGS)}", "name these, or none for all"
        )
    return {name: FINDINGS[name] for name in FINDINGS if name in wanted}


def _measure(setting: Setting, chosen: Mapping[str, Any], line: "_Line") -> dict[str, Any]:
    """What every finding measures here; {} of those that cannot be."""
    measured: dict[str, Any] = {}
    for name, module in chosen.items():
        start = time.perf_counter()
        line.begin(f"{name} {module.CLAIM.title}, {setting.label}")
        why = setting.lacks(module.CLAIM.needs)
        if why is None:
            measured |= setting.kept(name, partial(module.measure, setting))
        line.end(why or f"{time.perf_counter() - start:.0f} s")
    return measured


def _conclude(module: Any, settings: Sequence[Setting], measured: Mapping[str, dict[str, Any]]) -> Finding:
    claim = module.CLAIM
    skipped = {setting.label: setting.lacks(claim.needs) for setting in settings}
    runs = [(setting, measured[setting.label]) for setting in settings if skipped[setting.label] is None]
    finding = module.conclude(runs) if runs else Finding(claim, NOT_JUDGED, [])
    finding.skipped = {label: why for label, why in skipped.items() if why is not None}
    if not finding.measured:
        unanswered = {setting.label: setting.lacks(("accuracy",)) for setting, _ in runs}
        why_not = {**finding.skipped, **unanswered}
        finding.measured = [f"{label}: {why}." for label, why in why_not.items() if why]
    return finding


class _Line:
    """One line a finding, and while it runs what it does."""

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
