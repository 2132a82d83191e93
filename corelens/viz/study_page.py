"""The report of a study: what was claimed, what was measured, and how."""

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from corelens.viz import page as p
from corelens.viz.curves import ablation_curves, sorted_scores
from corelens.viz.head_grid import head_grid_html

if TYPE_CHECKING:
    from corelens.study import Study, World


def study_page(study: "Study") -> str:
    """The whole report as one offline HTML document."""
    parts = [part for world in study.worlds for part in _sections(world, study)]
    meta = {
        key: value
        for key, value in study.meta.items()
        if value not in (None, "") and key not in ("n_layers", "n_heads")
    }
    meta["versions"] = ", ".join(f"{name} {number}" for name, number in study.meta["versions"].items())
    shape = f"{study.meta['n_layers']} layers × {study.meta['n_heads']} heads"
    title = f"The heads that fetch the evidence: {study.meta['model'] or study.meta['family']}"
    return p.page(
        title, [*parts, _methods(study)], meta, subtitle=f"A CoRe study of {shape}, by Retrieval Attention Mass"
    )


def _sections(world: "World", study: "Study") -> list[p.Section]:
    suffix = f" ({world.name})" if len(study.worlds) > 1 else ""
    share = f"{study.fraction:.0%}"
    tops = [world.selection("top", name) for name, _ in world.controlled]
    random = world.selection("random")
    k = random.points["mean"].k
    numbers = [("clean accuracy", _percent(world.clean.accuracy), f"95% CI {_range(world.clean.interval)}")]
    numbers += [
        (f"without the top {k} heads by {s.ranking}", _percent(s.points["mean"].accuracy.value), "mean ablation")
        for s in tops
    ]
    numbers.append((f"without {k} random heads", _percent(random.points["mean"].accuracy.value), "mean ablation"))
    found = p.section(
        f"What the top {share} carry{suffix}",
        p.tiles(numbers),
        tables(world, study.fraction),
        p.note(
            "**Layer-matched** draws take other heads of the same layers. In a small model those are the next-best "
            "retrieval heads, so their cost is no noise.",
            *(f"In this run: {note}." for note in world.notes),
        ),
    )
    readers = p.section(
        f"Who reads the evidence{suffix}",
        "Before any head is chosen: cut the edges from some rows to the evidence in **all** heads of all layers. Rows "
        "whose edges cost nothing do not read it, and RAM over them ranks heads that the answer does not need.",
        p.table(
            ["rows cut from the region, in all heads", "accuracy", "lost"],
            [[words, _interval(x.accuracy), _interval(x.drop)] for words, x in world.readers_in_words],
            "Knockout before the softmax, all heads of all layers; accuracy and what it lost, with 95% intervals.",
        ),
    )
    where = p.section(
        f"Where the heads are{suffix}",
        *(
            p.figure(
                Markup(head_grid_html(scores, scores.top(study.fraction))),
                f"{name}, of every head, mean over {world.scored} samples; the top {share} outlined. "
                "Hover a head for its number and interval.",
            )
            for name, scores in world.controlled
        ),
        p.pair(
            *(
                p.figure(sorted_scores(scores, study.fraction), f"{name}: all heads, from the highest to the lowest.")
                for name, scores in world.controlled
            )
        ),
        *(
            p.figure(
                ablation_curves(
                    {name: [(x.fraction, *x.accuracy) for x in points] for name, points in sweep.curves.items()},
                    baseline=sweep.clean.value,
                ),
                f"Accuracy as more heads are ablated ({_KINDS[sweep.kind]}); bands: 95% bootstrap over samples.",
            )
            for sweep in world.sweeps
        ),
    )
    looks = p.section(
        f"What they look at{suffix}",
        p.pictures(
            [
                (
                    f"{scene.question} Gold: **{scene.answer}**, the model says **{scene.given or '(nothing)'}**",
                    scene.panels,
                )
                for scene in world.scenes
            ],
            "The first held-out scenes, not chosen. Left: the picture with its region. Then the head of highest RAM of "
            "two rankings, each at the row of its ranking that puts most on the region, and the head of median RAM. "
            "One brightness scale a scene; the numbers are attention mass.",
        ),
    )
    return [found, readers, where, *([looks] if world.scenes else [])]


_KINDS = {
    "zero": "zero: z := 0",
    "mean": "mean: z := its mean",
    "knockout": "knockout: the region out of sight",
    "uniform": "uniform: equal attention",
    "resample": "resample: z of another sample",
}


def tables(world: "World", fraction: float) -> Markup:
    """Accuracy under each ablation of each selection of heads, with intervals."""
    kinds = list(world.selections[0].points)
    rows = [["no ablation", "", *[_interval(world.clean.interval)] * len(kinds)]]
    for s in world.selections:
        point = s.points[kinds[0]]
        heads = f"{point.k} × {len(point.draws)} draws" if len(point.draws) > 1 else f"{point.k}"
        rows.append(
            [s.name.replace("top:", f"top {fraction:.0%}:"), heads, *[_interval(x.accuracy) for x in s.points.values()]]
        )
    roles = ["", *(s.role for s in world.selections)]
    return p.table(
        ["heads ablated", "heads", *[_KINDS[kind] for kind in kinds]],
        rows,
        f"Accuracy (greedy exact match) on {world.evaluated} samples, with 95% bootstrap intervals. Heads were "
        f"scored on {world.scored} other samples.",
        hot=[i for i, role in enumerate(roles) if role == "top"],
        groups=[1, roles.index("bottom"), roles.index("random")],
    )


def _methods(study: "Study") -> p.Section:
    return p.section(
        "How it was done",
        "**RAM**(l, h) = mean over samples of max over question rows i of Σ_{j∈G} A_ij, where A is the post-softmax "
        "attention of head h in layer l and G the visual tokens that the evidence's region touches. Raw mass, not "
        "normalised. **Mean** and **last row** are the same with another reduction or other rows: the ranking moves "
        "with them, so every result names its own.",
        "**Ablations.** zero: the head's output z is set to 0. mean: to its mean over the scoring samples and all "
        "their positions. knockout: the edges from the question's, last and answer's rows to the region are removed "
        "before the softmax.",
        "**Controls.** bottom: as many heads of the lowest RAM. random: drawn outside the top. layer-matched: drawn "
        "outside the top, as many in each layer. Intervals are percentile bootstraps over samples; a drawn control's "
        "accuracy is averaged over its draws first.",
        *([f"Made by `{study.meta['command']}`."] if study.meta.get("command") else []),
    )


def _percent(x: float) -> str:
    return f"{100 * x:.0f}%"


def _range(interval: Any) -> str:
    return f"{100 * interval.low:.0f} to {100 * interval.high:.0f}%"


def _interval(x: Any) -> str:
    return f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"
