"""F6, sufficiency: when these heads alone may see the picture, the model still answers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.evaluation.evaluate import Point
from corelens.findings.f5_necessity import point_json
from corelens.findings.finding import REPRODUCED, Brief, Claim, Finding, cell, judge, percent
from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import accuracy_interval

MOST, FEW = 0.8, 0.2
CLAIM = Claim(
    "F6",
    "Sufficiency",
    "The specialised heads act as dedicated information extractors, while most other heads distribute attention over "
    "broader contextual regions.",
    "arXiv 2606.05843, abstract; the test (blinding all other heads) is ours",
    f"With the edges from every text token to the picture cut in all heads but the top ones, at least {MOST:.0%} of "
    f"what blinding all heads costs comes back; with as many random heads left, at most {FEW:.0%}.",
    ("regions", "accuracy"),
)


def measure(setting: Setting) -> dict[str, Any]:
    """Accuracy when only some heads see the picture."""
    blind = setting.knocked("blind", None, "text", "visual")
    shape = setting.scores["ram"].values.shape
    every = HeadSet([(layer, head) for layer in range(shape[0]) for head in range(shape[1])])

    def seeing(sets: Sequence[HeadSet], share: float) -> dict[str, Any]:
        runs = [setting.knocked(f"only {sorted(kept.to_json())} see", every - kept, "text", "visual") for kept in sets]
        found = np.mean(runs, axis=0)
        point = Point(share, len(sets[0]), accuracy_interval(found), setting.lost(found), [h.to_json() for h in sets])
        return {
            "fraction": share,
            "regained": regained(setting.clean.correct, found, blind, setting.options.seed),
            **point_json(point),
        }

    lines: dict[str, list[dict[str, Any]]] = {}
    for share in sorted({setting.options.fraction, *setting.options.kept}):
        tops = {name: setting.scores[key].top(share) for name, key in RANKINGS.items()}
        for name, top in tops.items():
            lines.setdefault(f"top, {name}", []).append(seeing([top], share))
        k = len(tops[CONTROLLED[0]])
        outside = list(every - HeadSet([head for top in tops.values() for head in top]))
        pool = outside if len(outside) >= k else list(every)  # a large share leaves too few outside
        draws = [np.random.default_rng((setting.options.seed, i)).permutation(len(pool))[:k] for i in
                 range(setting.options.draws)]  # fmt: skip
        lines.setdefault("random", []).append(seeing([HeadSet([pool[j] for j in draw]) for draw in draws], share))
    return {"sufficiency": {"blind": setting.mean(blind)._asdict(), "lines": lines}}


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows."""
    lines, share = numbers["sufficiency"]["lines"], numbers["fraction"]
    at = {name: next(x for x in line if x["fraction"] == share)["regained"] for name, line in lines.items()}
    return {name: {"regained, top": at[f"top, {name}"], "regained, random": at["random"]} for name in CONTROLLED}


def regained(
    clean: Float[np.ndarray, " sample"],
    found: Float[np.ndarray, " sample"],
    blind: Float[np.ndarray, " sample"],
    seed: int,
) -> list[float]:
    """(accuracy − blind) / (clean − blind), with its 95% interval over samples."""
    rng = np.random.default_rng(seed)

    def share(at: Any) -> float:
        below = clean[at].mean() - blind[at].mean()
        return float((found[at].mean() - blind[at].mean()) / below) if below > 0 else 0.0

    low, high = np.quantile([share(rng.integers(len(clean), size=len(clean))) for _ in range(500)], [0.025, 0.975])
    return [share(slice(None)), float(low), float(high)]


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds, at the share of heads that are called CoRe heads."""
    from corelens.viz import page
    from corelens.viz.study_figures import kept_curves

    outcomes: dict[str, dict[str, bool]] = {}
    finding = Finding(CLAIM, REPRODUCED, [])
    rows, needed = [], []
    for setting, numbers in runs:
        found, fraction = numbers["sufficiency"], setting.options.fraction
        at = {name: next(x for x in line if x["fraction"] == fraction) for name, line in found["lines"].items()}
        outcomes[setting.label] = {
            name: at[f"top, {name}"]["regained"][0] >= MOST and at["random"]["regained"][0] <= FEW for name in RANKINGS
        }
        said = ", ".join(f"{percent(at[f'top, {name}']['regained'][0])} by {name}" for name in CONTROLLED)
        finding.measured.append(
            f"{setting.label}: with only the top {at['random']['k']} heads seeing the picture, {said} of what "
            f"blindness costs comes back; with as many random heads {percent(at['random']['regained'][0])}."
        )
        for name, line in found["lines"].items():
            rows += [
                [setting.label, name, f"{x['k']} ({x['fraction']:.0%})", cell(x["accuracy"]), cell(x["regained"])]
                for x in line
            ]
            enough = [x["k"] for x in line if x["regained"][0] >= MOST]
            needed.append(f"{setting.label}, {name}: {f'{min(enough)} heads' if enough else 'more than were tried'}")
        finding.add(
            finding.draw(
                f"sufficiency-{setting.label}",
                kept_curves(
                    {name: [(x["fraction"], *x["accuracy"].values()) for x in line] for name, line in
                     found["lines"].items()},
                    setting.clean.accuracy, found["blind"]["value"],
                ),
                f"{setting.label}: accuracy when only some heads see the picture, all others blind; bands: 95% "
                "bootstrap over samples.",
            )
        )  # fmt: skip
    finding.verdict, finding.scope = judge(outcomes)
    finding.numbers = {"met": outcomes}
    finding.explanation = (
        f"Heads that must see the picture for {MOST:.0%} of it to come back: {'; '.join(needed)}. Every text token of "
        "the others is blind, the template's among them, so this asks more than F5 does: heads that prepare the way "
        "(which tell the fetching heads where to look) are cut off too."
    )
    finding.add(
        page.table(
            ["model and world", "heads that see", "how many", "accuracy", "regained"],
            rows,
            "Regained: (accuracy − accuracy blind) / (clean accuracy − accuracy blind), with 95% intervals. "
            "Random heads lie outside every top set, or anywhere where too few are left outside.",
        )
    )
    return finding
