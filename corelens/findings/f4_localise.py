"""F4, they localise and others spread: precision, how widely heads look, and pictures of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corelens.findings.finding import NOT_REPRODUCED, Brief, Claim, Finding, cell, judge
from corelens.findings.options import CONTROLLED, LEVEL, RANKINGS
from corelens.findings.scenes import scenes
from corelens.findings.setting import Setting
from corelens.heads.scores import HeadScores
from corelens.heads.stats import ratio

TIMES = 2.0
SIDES = ("top", "others")
CLAIM = Claim(
    "F4",
    "They localise, others spread",
    "The specialised heads act as dedicated information extractors that localise what the question asks for; most "
    "other heads distribute attention over broader contextual regions.",
    "arXiv 2606.05843, abstract",
    f"Heads chosen on one half of the samples have on the other half at least {TIMES:.0f} times the precision (share "
    f"of their attention on the picture that lies on the evidence) of all other heads, and spread over a smaller share "
    f"of the picture; the paired differences exclude zero at the level {LEVEL:.1%}.",
)


def measure(setting: Setting) -> dict[str, Any]:
    """Precision and spread of the top heads and of the others, on samples that did not choose them; pictures."""
    found = {}
    for name, key in RANKINGS.items():
        rows = "[rows=last]" if "rows=last" in key else ""
        scores = setting.scores[key]
        assert scores.per_sample is not None
        half = len(scores.per_sample) // 2
        top = HeadScores(per_sample=scores.per_sample[:half]).top(setting.options.fraction)
        chosen = top.mask(*scores.values.shape)
        found[name] = {
            "heads": top.to_json(),
            "precision": _sides(*_parts(setting.scores[f"precision{rows}"], half), chosen, setting.options.seed),
            "spread": _sides(*_parts(setting.scores[f"spread{rows}"], half), chosen, setting.options.seed),
            "spatial_entropy": _sides(*_parts(setting.scores[f"tightness{rows}"], half), chosen, setting.options.seed),
            "chance": 1 / _lift_over_precision(setting, rows),
        }
    return {"localisation": found, "scenes": scenes(setting)}


def _parts(scores: HeadScores, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of the samples that did not choose the heads."""
    if scores.parts is not None:
        return scores.parts[0][half:], scores.parts[1][half:]
    assert scores.per_sample is not None
    return scores.per_sample[half:], np.ones_like(scores.per_sample[half:])


def _lift_over_precision(setting: Setting, rows: str) -> float:
    """|V| / |G|: how many times chance a precision of 1 would be."""
    lift, precision = setting.scores[f"lift{rows}"].values, setting.scores[f"precision{rows}"].values
    return float(np.median(lift[precision > 0] / precision[precision > 0])) if (precision > 0).any() else 1.0


def _sides(numerator: np.ndarray, denominator: np.ndarray, chosen: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean over the chosen heads, over the others, and their difference, bootstrapped over samples."""
    n, rng = len(numerator), np.random.default_rng(seed)
    counts = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=400)])
    top = np.einsum("dn,nlh->dlh", counts, numerator.astype(np.float64))
    heads = ratio(top, np.einsum("dn,nlh->dlh", counts, denominator.astype(np.float64)), n)
    mine, others = heads[:, chosen].mean(1), heads[:, ~chosen].mean(1)

    def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
        return [float(values[0]), *map(float, np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2]))]

    return {"top": interval(mine), "others": interval(others), "difference": interval(mine - others, LEVEL)}


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows."""
    found = numbers["localisation"]
    return {
        name: {f"{of}, {side}": found[name][of][side] for of in ("precision", "spread") for side in SIDES}
        for name in CONTROLLED
    }


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds that are answered."""
    from corelens.viz import page
    from corelens.viz.study_figures import head_cloud

    outcomes: dict[str, dict[str, bool]] = {}
    finding = Finding(CLAIM, NOT_REPRODUCED, [])
    rows = []
    for setting, numbers in runs:
        answered = setting.lacks(("regions", "accuracy")) is None
        for name, one in numbers["localisation"].items():
            precision, spread = one["precision"], one["spread"]
            if answered:
                outcomes.setdefault(setting.label, {})[name] = (
                    precision["top"][0] >= TIMES * precision["others"][0]
                    and precision["difference"][1] > 0
                    and spread["difference"][2] < 0
                )
            shown = [cell(one[of][side]) for of in ("precision", "spread", "spatial_entropy") for side in SIDES]
            rows.append([f"{setting.label}, {name}", *shown, f"{one['chance']:.2f}"])
        if answered:
            said = "; ".join(
                f"precision {one['precision']['top'][0]:.2f} against {one['precision']['others'][0]:.2f}, spread over "
                f"{one['spread']['top'][0]:.0%} of the picture against {one['spread']['others'][0]:.0%} by {name}"
                for name, one in numbers["localisation"].items() if name in CONTROLLED
            )  # fmt: skip
            finding.measured.append(f"{setting.label}: {said}.")
    finding.verdict, finding.scope = judge(outcomes)
    finding.numbers = {"met": outcomes}
    finding.explanation = (
        "RAM ranks by mass on the evidence, so that its top heads have some precision is close to its definition (the "
        "heads were chosen on other samples, so luck is excluded, not that). What could have come out otherwise is how "
        "widely they look: a head can hold much mass on the evidence and spread the rest over the whole picture."
    )
    finding.add(
        page.table(
            [
                "top by",
                "precision, top",
                "others",
                "spread, top",
                "others",
                "spatial entropy, top",
                "others",
                "chance",
            ],
            rows,
            "Precision: share of the attention on the picture that lies on the evidence (chance: the evidence's share "
            "of the visual tokens). Spread: exp(entropy) / visual tokens. Spatial entropy: in nats, as in arXiv "
            "2503.06287. Means over heads with 95% intervals over samples that did not choose the heads.",
        )
    )
    for setting, _ in runs:
        clouds = []
        for name in CONTROLLED:
            at = "[rows=last]" if "last" in name else ""
            heads = setting.scores[RANKINGS[name]].top(setting.options.fraction)
            clouds.append(
                finding.draw(
                    f"spread-{setting.label}-{RANKINGS[name]}",
                    head_cloud(setting.scores[f"spread{at}"].values, setting.scores[f"precision{at}"].values,
                               heads.mask(*setting.scores["ram"].values.shape)),
                    f"{setting.label}: every head by how widely it looks and how precisely; the top by {name} marked.",
                )
            )  # fmt: skip
        finding.add(page.pair(*clouds))
    for setting, numbers in runs:
        if numbers["scenes"]:
            finding.add(_pictures(setting, numbers["scenes"]))
    return finding


def _pictures(setting: Setting, shown: list[dict[str, Any]]) -> Any:
    from corelens.viz import page

    rows: list[tuple[str | None, list[tuple[str, str]]]] = []
    for scene in shown:
        said = f"{scene['question']} Gold: **{scene['answer']}**"
        if scene["given"] is not None:
            said += f", the model says **{scene['given'] or '(nothing)'}**"
        for number, line in enumerate(scene["lines"]):
            rows.append((None if number else said, [(picture, words) for picture, words in line]))
    return page.pictures(
        rows,
        f"{setting.label}: the first held-out samples, not chosen. The picture with its region; then the head of "
        "highest RAM of two readings, each at the row of its reading that puts most on the region, and the head of "
        "median RAM. One brightness scale a sample; the numbers are attention mass.",
    )
