"""The CoRe study: score every head, ablate the best ones and their controls, and say what it cost, in one report.

The claim tested (arXiv 2606.05843): cross-modal retrieval is functionally sparse. A few percent of heads fetch the
visual evidence; without them the model fails, and without as many others it hardly notices.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from corelens.errors import CorelensError
from corelens.evaluate import Evaluation, Point, Sweep, batches, bootstrap_mean, evaluate, measure
from corelens.head_set import Head, HeadSet
from corelens.heads import HeadScores
from corelens.hooks import Hook
from corelens.inputs import Inputs, Sample
from corelens.interventions.ablate import mean_z
from corelens.interventions.edges import knockout
from corelens.metrics.registry import metric
from corelens.metrics.score import about, score_heads

RANKINGS = {  # how heads are ranked → the metric that ranks them; the papers leave rows and reduction open
    "RAM (question rows, max)": "ram",
    "RAM (question rows, mean)": "ram[reduce=mean]",
    "RAM (last row)": "ram[rows=last]",
}
CONTROLLED = ("RAM (question rows, max)", "RAM (last row)")  # rankings that get controls and curves of their own
READERS = {  # rows that may read the evidence → what is said of them
    "question": "the question's tokens",
    "last+answer": "the last row (and the answer's)",
    "question+last+answer": "both",
    "text": "every text token",
}
KINDS = ("zero", "mean", "knockout")
ALSO_SCORED = ("visual_mass", "precision", "lift")


@dataclass
class Selection:
    """One line of the table: a way to choose heads, and what ablating them costs, {ablation: Point}."""

    role: str  # "top", "bottom", "random" or "layer-matched"
    ranking: str  # one of RANKINGS; "" for random heads, which no ranking chose
    points: dict[str, Point]

    @property
    def name(self) -> str:
        """What the table calls it."""
        return {"random": "random", "layer-matched": f"random, same layers as {self.ranking}"}.get(
            self.role, f"{self.role}: {self.ranking}"
        )


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
    readers: dict[str, Point]  # rows whose edges to the region are cut in ALL heads → what that costs
    scores: dict[str, HeadScores]
    selections: list[Selection]
    sweeps: list[Sweep]
    scenes: list[Scene] = field(repr=False, default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ram(self) -> HeadScores:
        """RAM, max over question rows."""
        return self.scores["ram"]

    @property
    def controlled(self) -> list[tuple[str, HeadScores]]:
        """The rankings that got controls and curves of their own, with their scores."""
        return [(name, self.scores[RANKINGS[name]]) for name in CONTROLLED]

    @property
    def readers_in_words(self) -> list[tuple[str, Point]]:
        """What was cut from the region in all heads, and what that cost."""
        return [(READERS[rows], point) for rows, point in self.readers.items()]

    def selection(self, role: str, ranking: str = "") -> Selection:
        """The line of the table with this role and ranking."""
        return next(s for s in self.selections if (s.role, s.ranking) == (role, ranking))


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
    lines = len(RANKINGS) + len(CONTROLLED) * (1 + draws) + draws
    steps = len(worlds) * (3 + len(READERS) + len(KINDS) * lines + len(sweep_kinds) * len(fractions) * (3 + draws))
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
    wanted = [metric(key) for key in (*RANKINGS.values(), *ALSO_SCORED)]
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
    advance(f"{name}: who reads the evidence")
    run = _Runner(model, prepared, clean, reference, lambda: advance(f"{name}: ablating"))
    readers = {rows: run.under(knockout(None, rows=rows, columns="region")) for rows in READERS}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sets = {share: _sets(scores, share, draws, seed) for share in {fraction, *fractions}}
        selections = [Selection(*key, {kind: run.of(chosen, kind, fraction) for kind in KINDS})
                      for key, chosen in sets[fraction].items()]  # fmt: skip
        sweeps = [
            run.sweep(kind, {share: sets[share] for share in fractions}, selections, fraction) for kind in sweep_kinds
        ]
    notes = list(dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning))
    scenes = _scenes(model, to_test[:5], clean, {name: scores[RANKINGS[name]] for name in CONTROLLED})
    return World(name, len(to_score), len(to_test), clean, readers, scores, selections, sweeps, scenes, notes)


def _sets(
    scores: dict[str, HeadScores], fraction: float, draws: int, seed: int
) -> dict[tuple[str, str], list[HeadSet]]:
    """{(role, ranking): sets}: the top of each ranking and its controls; random heads lie outside every top."""
    ranked = {name: scores[key] for name, key in RANKINGS.items()}
    tops = {name: one.top(fraction) for name, one in ranked.items()}
    k, every = len(tops[CONTROLLED[0]]), HeadSet([head for top in tops.values() for head in top])
    first = ranked[CONTROLLED[0]]
    found = {("top", name): [top] for name, top in tops.items()}
    found |= {("bottom", name): [ranked[name].bottom(k=k)] for name in CONTROLLED}
    found["random", ""] = [first.random(k=k, seed=seed + i, exclude=every) for i in range(draws)]
    for name in CONTROLLED:
        matched = [ranked[name].random(k=k, seed=seed + i, exclude=tops[name], match="layer") for i in range(draws)]
        found["layer-matched", name] = matched
    return found


@dataclass
class _Runner:
    """Measures sets of heads, all against one clean run."""

    model: Any
    prepared: list[Inputs]
    clean: Evaluation
    reference: Any
    advance: Any

    def of(self, sets: Sequence[HeadSet], kind: str, fraction: float) -> Point:
        for _ in sets:
            self.advance()
        return measure(self.model, self.prepared, self.clean, sets, kind, fraction, self.reference)

    def under(self, hooks: list[Hook]) -> Point:
        self.advance()
        run = evaluate(self.model, self.prepared, hooks)
        lost = bootstrap_mean(self.clean.correct - run.correct)
        return Point(1.0, self.model.cfg.n_layers * self.model.cfg.n_heads, run.interval, lost)

    def sweep(
        self, kind: str, sets: Mapping[float, dict[tuple[str, str], list[HeadSet]]], known: list[Selection], at: float
    ) -> Sweep:
        curves: dict[str, list[Point]] = {}
        lines = [("top", name) for name in CONTROLLED] + [("bottom", CONTROLLED[0]), ("random", "")]
        for share, chosen in sorted(sets.items()):
            for key in lines:
                label = f"{key[0]}, {key[1]}" if key[0] == "top" else key[0]
                again = next((s.points.get(kind) for s in known if (s.role, s.ranking) == key), None)
                if share == at and again is not None:
                    point = again
                    for _ in chosen[key]:
                        self.advance()
                else:
                    point = self.of(chosen[key], kind, share)
                curves.setdefault(label, []).append(point)
        return Sweep(kind, self.clean.interval, curves)


def _scenes(model: Any, samples: Sequence[Sample], clean: Evaluation, rankings: dict[str, HeadScores]) -> list[Scene]:
    """What the top head of each ranking looks at, at the rows of that ranking, and what an ordinary head looks at."""
    from corelens.viz.overlay import attention_image, attention_map, chosen_row

    shown: list[tuple[str, Head, str]] = []
    for name, scores in rankings.items():
        rows = str(scores.meta["rows"])
        shown.append((f"top by {name}", next(iter(scores.top(k=1))), rows))
    last = list(rankings.values())[-1]
    middle = list(last.top(1.0))[last.values.size // 2]
    shown.append(("ordinary head", middle, str(last.meta["rows"])))
    names = [f"blocks.{head.layer}.attn.hook_pattern_rows" for _, head, _ in shown]
    scenes = []
    for sample, answer in zip(samples, clean.per_sample, strict=False):
        inputs = model.prepare(sample)
        token_map, image = inputs.token_maps[0], inputs.pictures[0][0]
        if not isinstance(image, Image.Image):  # the frames of a video
            continue
        looks = {}
        for (label, head, rows), name in zip(shown, names, strict=True):
            with torch.no_grad(), model.pattern_rows(rows):
                _, cache = model.run_with_cache(inputs, names_filter=name, return_type=None)
            weights, seen = chosen_row(cache[name][0, head.head].cpu(), token_map)
            looks[f"{label}, **{head}**: {seen}"] = attention_map(token_map, weights, image.size)
        peak = max(float(heat.max()) for heat in looks.values())  # one scale, or an ordinary head would look as eager
        panels = [(attention_image(image, None, sample.regions), "picture and region")]
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
        "clean": world.clean.interval._asdict(),
        "answer_logprob": world.clean.answer_logprob,
        "table": [
            {
                "selection": s.name,
                "role": s.role,
                "ranking": s.ranking,
                "ablations": {k: point(p) for k, p in s.points.items()},
            }
            for s in world.selections
        ],
        "readers": {rows: point(p) for rows, p in world.readers.items()},
        "notes": world.notes,
        "sweeps": [sweep.to_json() for sweep in world.sweeps],
        "concentration": {
            name: {
                "gini": world.scores[key].gini(),
                "share_of_top": world.scores[key].mass_of_top(0.05),
                "split_half": world.scores[key].split_half(),
            }
            for name, key in RANKINGS.items()
        },
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
