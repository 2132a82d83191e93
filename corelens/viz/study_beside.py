"""The parts of a study's page that stand beside the findings: the design space of rankings, and how
far a ranking repeats."""

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from corelens.heads.intervals import percent_interval
from corelens.viz import page as p

Numbers = Mapping[str, Any]


# rankings of the design space that a page shows: these, and the costliest others
NAMED = ("ram", "ram[rows=last]", "causal_knockout", "causal_attribution")
COSTLIEST = 4


def design(model: Numbers) -> list[Markup]:
    """What the top heads of rankings cost, the costliest first; random sets beside them."""
    rows = []
    for world, part in model["worlds"].items():
        space = part.get("design")
        if not space:
            continue
        ordered = sorted(space["points"], key=lambda point: -point["zero"]["value"])
        others = [point for point in ordered if point["key"] not in NAMED][:COSTLIEST]
        for point in ordered:
            if point["key"] not in NAMED and point not in others:
                continue
            costs = [percent_interval(point[kind]) for kind in ("zero", "knockout")]
            rows.append([f"{world}: {point['key']}", *costs])
        random = [
            f"up to {100 * space['clean'] * max(space['random'][kind], default=0.0):.0f}"
            for kind in ("zero", "knockout")
        ]
        rows.append([f"{world}: random sets", *random])
    if not rows:
        return []
    caption = (
        "Points lost by the top 5% of a ranking: the costliest of rows × keys × reductions (arXiv "
        "2608.27417; all of them in report.json), and rankings by single heads' effects (causal)."
    )
    columns = ["ranking", "zero", "knockout"]
    return [p.folded("The design space of rankings", p.table(columns, rows, caption))]


def repeats(model: Numbers) -> list[Markup]:
    """How far rankings agree with those of other samples and of other words."""
    rows = []
    for world, part in model["worlds"].items():
        measured = part.get("repeats")
        if not measured:
            continue
        others = measured["other samples"]
        cases = [(f"{others['n']} other samples", "–", others)]
        for wording in measured["wordings"]:
            right = f"{100 * wording['accuracy']:.0f}%"
            cases.append((f"asked as “{wording['wording'].format('…')}”", right, wording))
        for words, right, case in cases:
            for key in (key for key in part["scores"] if key in case):
                agreement = [f"{case[key][name]:.2f}" for name in ("spearman", "jaccard")]
                rows.append([f"{world}: {key}", words, right, *agreement])
    if not rows:
        return []
    caption = "Agreement with the study's ranking."
    columns = ["ranking", "against", "right", "Spearman ρ", "Jaccard"]
    return [p.folded("How far a ranking repeats", p.table(columns, rows, caption))]


def left_out(report: Numbers) -> list[str]:
    """A sentence for each model of which something was left out at the limit of core-hours: parts
    ("F5" for "F5 Necessity"), by the worlds that lack the same ones."""
    sentences = []
    for name, model in report["models"].items():
        parts: dict[str, list[str]] = {}
        for title in model.get("left_out") or []:
            part, _, world = title.rpartition(", ")
            parts.setdefault(world, []).append(_FINDING.sub(r"\1", part))
        worlds: dict[str, list[str]] = {}
        for world, missing in parts.items():
            worlds.setdefault(", ".join(sorted(missing)), []).append(world)
        if worlds:  # (a joint report has no common limit)
            listed = "; ".join(f"{key} on {', '.join(names)}" for key, names in worlds.items())
            sentences.append(f"Of {name} was left out, at the limit of its core-hours: {listed}.")
    return sentences


_FINDING = re.compile(r"(F\d) .*")
