"""The CoRe study: score every head, ablate the best ones and their controls, and say what it cost, in one report.

The claim tested (arXiv 2606.05843): cross-modal retrieval is functionally sparse. A few percent of heads fetch the
visual evidence; without them the model fails, and without as many others it hardly notices.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from corelens.errors import CorelensError
from corelens.evaluate import Evaluation, Point, Sweep, batches, conditions, evaluate, measure
from corelens.heads import Head, HeadScores
from corelens.inputs import Inputs, Sample
from corelens.interventions.ablate import mean_z
from corelens.metrics.registry import metric
from corelens.metrics.score import about, score_heads

SELECTIONS = {  # how the top heads are chosen → the metric that chooses them
    "RAM, max over question rows": "ram",
    "RAM, mean over question rows": "ram[reduce=mean]",
    "RAM, last row": "ram[rows=last]",
}
KINDS = ("zero", "mean", "knockout")
ALSO_SCORED = ("visual_mass", "precision", "lift")


@dataclass
class Selection:
    """One line of the table: a way to choose heads, and what ablating them costs, {ablation: Point}."""

    name: str
    role: str  # "top", "bottom", "random" or "layer-matched"
    points: dict[str, Point]


@dataclass
class Scene:
    """One sample with where two heads look in it: pictures of attention, ready to show."""

    question: str
    answer: str
    given: str
    panels: list[tuple[Any, str]]


@dataclass
class World:
    """The study on one set of samples."""

    name: str
    scored: int
    evaluated: int
    clean: Evaluation
    scores: dict[str, HeadScores]
    selections: list[Selection]
    sweeps: list[Sweep]
    scenes: list[Scene] = field(repr=False, default_factory=list)

    @property
    def ram(self) -> HeadScores:
        """RAM, max over question rows."""
        return self.scores["ram"]


@dataclass
class Study:
    """What a study found. `report` is the page it wrote, if it wrote one."""

    worlds: list[World]
    fraction: float
    meta: dict[str, Any]
    report: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Every number of the report."""
        return {"format": "corelens-study/1", "fraction": self.fraction, **self.meta} | {
            "worlds": {world.name: _world_json(world) for world in self.worlds}
        }

    def _repr_html_(self) -> str:
        from corelens.viz.study_page import tables

        return "".join(str(tables(world, self.fraction)) for world in self.worlds)


def study(
    model: Any,
    samples: Mapping[str, Sequence[Sample]] | Sequence[Sample],
    out: str | Path | None = "report",
    fraction: float = 0.05,
    draws: int = 3,
    fractions: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    sweep_kinds: Sequence[str] = ("mean",),
    score_share: float = 0.4,
    batch_size: int = 32,
    seed: int = 0,
    command: str | None = None,
    progress: bool = True,
) -> Study:
    """Score all heads on one part of the samples, ablate on the other part, and write a report.

    Args:
        model: a HookedMLLM.
        samples: {world: samples with regions and answers}, or one list.
        out: the folder for report.html and report.json; None writes nothing.
        fraction: the share of heads that are called CoRe heads.
        draws: how many random and layer-matched sets are drawn for each control.
        fractions: shares of heads in the ablation curves, with the ablations `sweep_kinds`.
        score_share: share of the samples that heads are scored on (and the mean z is taken from); the accuracy is
            measured on the others.
        seed: of the draws.
        command: the command that makes this report again, shown in it.

    Returns:
        A Study; `study.report` is the page.
    """
    worlds = samples if isinstance(samples, Mapping) else {"samples": samples}
    for name, given in worlds.items():
        if len(given) < 10:
            raise CorelensError(
                f"{len(given)} samples in {name!r}",
                "10 or more: some to score heads on, others to test them on",
                "give more",
            )
    steps = len(worlds) * (3 + len(SELECTIONS) + 1 + 2 * draws) + len(worlds) * len(sweep_kinds) * len(fractions)
    done: list[World] = []
    with _progress(steps, progress) as advance:
        for name, given in worlds.items():
            done.append(
                _study_world(
                    model,
                    name,
                    list(given),
                    fraction,
                    draws,
                    fractions,
                    sweep_kinds,
                    score_share,
                    batch_size,
                    seed,
                    advance,
                )
            )
    meta = about(model) | {"seed": seed, "draws": draws, "command": command}
    result = Study(done, fraction, meta)
    if out is not None:
        write(result, Path(out))
    return result


def _study_world(
    model: Any, name: str, samples: list[Sample], fraction: float, draws: int, fractions: Sequence[float],
    sweep_kinds: Sequence[str], score_share: float, batch_size: int, seed: int, advance: Any,
) -> World:  # fmt: skip
    cut = min(max(round(len(samples) * score_share), 2), len(samples) - 2)
    to_score, to_test = samples[:cut], samples[cut:]
    advance(f"{name}: scoring all heads", 0)
    wanted = [metric(key) for key in (*SELECTIONS.values(), *ALSO_SCORED)]
    scores = score_heads(model, to_score, wanted, batch_size=batch_size)
    advance(f"{name}: mean of z")
    reference = mean_z(model, to_score, batch_size=batch_size)
    advance(f"{name}: clean accuracy")
    prepared = batches(model, to_test, batch_size)
    clean = evaluate(model, prepared)
    if clean.accuracy == 0:
        raise CorelensError(
            f"a model that answers none of {len(to_test)} samples of {name!r} right",
            "a model that can do the task: what it cannot do, no ablation can cost",
            "look at what it answers (cl.evaluate(…).per_sample), or choose other samples",
        )
    advance(f"{name}: ablating")
    run = _Runner(model, prepared, clean, reference, fraction, lambda: advance(f"{name}: ablating"))
    selections = [
        Selection(label, "top", run.all_kinds([scores[key].top(fraction)])) for label, key in SELECTIONS.items()
    ]
    ram = scores["ram"]
    for role, sets in conditions(ram, fraction, draws, seed=seed).items():
        if role != "top":
            label = {"bottom": "bottom, by RAM", "random": "random", "layer-matched": "random, layer-matched"}[role]
            selections.append(Selection(label, role, run.all_kinds(sets)))
    sweeps = [run.sweep(ram, kind, fractions, draws, seed, selections) for kind in sweep_kinds]
    scenes = _scenes(model, to_test[:5], clean, ram)
    return World(name, len(to_score), len(to_test), clean, scores, selections, sweeps, scenes)


@dataclass
class _Runner:
    model: Any
    prepared: list[Inputs]
    clean: Evaluation
    reference: Any
    fraction: float
    advance: Any

    def measure(self, sets: Sequence[Any], kind: str, fraction: float) -> Point:
        return measure(self.model, self.prepared, self.clean, sets, kind, fraction, self.reference)

    def all_kinds(self, sets: Sequence[Any]) -> dict[str, Point]:
        points = {kind: self.measure(sets, kind, self.fraction) for kind in KINDS}
        for _ in sets:
            self.advance()
        return points

    def sweep(
        self, ram: HeadScores, kind: str, fractions: Sequence[float], draws: int, seed: int, known: list[Selection]
    ) -> Sweep:
        curves: dict[str, list[Point]] = {}
        tabled = {s.role: s.points[kind] for s in reversed(known) if kind in s.points}  # the first "top" is RAM by max
        for fraction in fractions:
            for role, sets in conditions(ram, fraction, draws, seed=seed).items():
                again = fraction == self.fraction and role in tabled
                curves.setdefault(role, []).append(tabled[role] if again else self.measure(sets, kind, fraction))
            self.advance()
        return Sweep(kind, self.clean.ci, curves, {"draws": draws})


def _scenes(model: Any, samples: Sequence[Sample], clean: Evaluation, ram: HeadScores) -> list[Scene]:
    """What the top head and an ordinary one (of median RAM) look at."""
    from corelens.viz.overlay import attention_image, attention_map, chosen_row

    order = list(ram.top(1.0))
    shown: dict[str, Head] = {"top head": order[0], "ordinary head": order[len(order) // 2]}
    names = [f"blocks.{head.layer}.attn.hook_pattern_rows" for head in set(shown.values())]
    scenes = []
    for sample, answer in zip(samples, clean.per_sample, strict=False):
        if not sample.images:
            continue
        inputs = model.prepare(sample)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=names, return_type=None)
        token_map, image = inputs.token_maps[0], sample.images[0]
        panels = [(attention_image(image, None, sample.regions), "picture and region")]
        looks = {}
        for label, head in shown.items():
            rows = cache[f"blocks.{head.layer}.attn.hook_pattern_rows"][0, head.head].cpu()
            weights, seen = chosen_row(rows, token_map)
            looks[f"{label} **{head}**: {seen}"] = attention_map(token_map, weights, image.size)
        peak = max(float(heat.max()) for heat in looks.values())  # one scale, or an ordinary head would look as eager
        panels += [(attention_image(image, heat, sample.regions, peak=peak), words) for words, heat in looks.items()]
        scenes.append(Scene(str(sample.question), str(sample.answer), answer.given, panels))
    return scenes


# --- what is written --------------------------------------------------------------------------------------------------


def write(result: Study, out: Path) -> None:
    """report.html and report.json; each appears whole or not at all."""
    from corelens.viz.study_page import study_page

    out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("report.json", json.dumps(result.to_json(), indent=1, ensure_ascii=False)),
        ("report.html", study_page(result)),
    ):
        part = out / f"{name}.part"
        part.write_text(content, encoding="utf-8")
        part.replace(out / name)
    result.report = out / "report.html"


def _world_json(world: World) -> dict[str, Any]:
    def point(p: Point) -> dict[str, Any]:
        return {"k": p.k, "accuracy": p.accuracy._asdict(), "drop": p.drop._asdict(), "heads": p.draws}

    return {
        "scored": world.scored,
        "evaluated": world.evaluated,
        "clean": world.clean.ci._asdict(),
        "answer_logprob": world.clean.answer_logprob,
        "table": [
            {"selection": s.name, "role": s.role, "ablations": {kind: point(p) for kind, p in s.points.items()}}
            for s in world.selections
        ],
        "sweeps": [sweep.to_json() for sweep in world.sweeps],
        "concentration": {
            "gini": world.ram.gini(),
            "mass_of_top_5_percent": world.ram.mass_of_top(0.05),
            "split_half": world.ram.split_half(),
        },  # fmt: skip
        "scores": {key: [[round(float(x), 6) for x in row] for row in s.values] for key, s in world.scores.items()},
    }


@contextmanager
def _progress(total: int, show: bool) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True, disable=not show) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda words, steps=1: bar.update(task, description=words, advance=steps)
