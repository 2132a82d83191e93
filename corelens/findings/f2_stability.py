"""F2, the same heads: in other worlds, and from other samples of the same world."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from corelens.findings.finding import NOT_JUDGED, REPRODUCED, Claim, Finding, judge
from corelens.findings.options import RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.scores import HeadScores

LEAST_SPEARMAN = 0.5
SPLITS = 20
CLAIM = Claim(
    "F2",
    "The same heads everywhere",
    "The division between the specialised heads and the rest is seen across diverse visual domains.",
    "arXiv 2606.05843, abstract (its data: RefCOCOg, VidSTG, MMDocIR, MMLongBench)",
    f"Between every two worlds that a model answers, the rank correlation of the heads' RAM is at least "
    f"{LEAST_SPEARMAN}, and their top sets overlap more than 95% of random pairs of sets do.",
)


def measure(setting: Setting) -> dict[str, Any]:
    """How well the ranking repeats on other samples of the same world."""
    found = {}
    for name, key in RANKINGS.items():
        pairs = [_halves(setting.scores[key], seed) for seed in range(SPLITS)]
        agreed = [a.agreement(b, setting.options.fraction) for a, b in pairs]
        found[name] = {
            "spearman": float(np.nanmean([one.spearman for one in agreed])),
            "jaccard": float(np.mean([one.jaccard for one in agreed])),
        }
    return {"repeats": found}


def _halves(scores: HeadScores, seed: int) -> tuple[HeadScores, HeadScores]:
    assert scores.per_sample is not None
    order = np.random.default_rng(seed).permutation(len(scores.per_sample))
    half = len(order) // 2
    return HeadScores(per_sample=scores.per_sample[order[:half]]), HeadScores(
        per_sample=scores.per_sample[order[half:]]
    )


def chance(n: int, k: int) -> tuple[float, float]:
    """Jaccard overlap of two random sets of k of n heads: expected, and what 95% of pairs do not exceed."""
    from scipy.stats import hypergeom

    shared = np.arange(k + 1)
    jaccard = shared / (2 * k - shared)
    law = hypergeom(n, k, k)
    most = int(law.ppf(0.95))
    return float((law.pmf(shared) * jaccard).sum()), most / (2 * k - most)


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models; worlds that a model does not answer are shown and do not count."""
    from corelens.viz import page
    from corelens.viz.study_figures import overlap

    outcomes: dict[str, dict[str, bool]] = {}
    measured, figures, rows = [], [], []
    pairs: list[dict[str, Any]] = []
    for model in dict.fromkeys(setting.model_name for setting, _ in runs):
        mine = [(setting, numbers) for setting, numbers in runs if setting.model_name == model]
        counted = {setting.world for setting, _ in mine if setting.lacks(("regions", "accuracy")) is None}
        fraction = mine[0][0].options.fraction
        n, k = mine[0][0].scores["ram"].values.size, len(mine[0][0].scores["ram"].top(fraction))
        expected, most = chance(n, k)
        for name, key in RANKINGS.items():
            of = {setting.world: setting.scores[key] for setting, _ in mine}
            for setting, numbers in mine:
                again = numbers["repeats"][name]
                rows.append([model, f"{setting.world}, other samples", name, f"{again['spearman']:.2f}",
                             f"{again['jaccard']:.2f}", f"{expected:.2f}", f"{most:.2f}", "ceiling"])  # fmt: skip
            met = []
            for a, b in combinations(of, 2):
                found = of[a].agreement(of[b], fraction)
                ok, counts = found.spearman >= LEAST_SPEARMAN and found.jaccard > most, {a, b} <= counted
                met += [ok] if counts else []
                pairs.append({"model": model, "worlds": [a, b], "ranking": name, "counts": counts}
                             | {"spearman": found.spearman, "jaccard": found.jaccard, "chance": most})  # fmt: skip
                rows.append([model, f"{a} – {b}", name, f"{found.spearman:.2f}", f"{found.jaccard:.2f}",
                             f"{expected:.2f}", f"{most:.2f}", "yes" if counts else "not answered"])  # fmt: skip
            if met:
                outcomes.setdefault(model, {})[name] = all(met)
            if len(of) > 2:  # of two worlds the table says all
                figures.append((f"overlap-{model}-{key}", overlap(of, fraction, most), f"{model}, {name}"))
        repeat = [float(numbers["repeats"][name]["spearman"]) for name in RANKINGS for _, numbers in mine]
        said = f"from two halves of the samples of one world ρ = {min(repeat):.2f} to {max(repeat):.2f}"
        between = [float(one["spearman"]) for one in pairs if one["model"] == model and one["counts"]]
        if between:
            said += f"; between worlds that it answers ρ = {min(between):.2f} to {max(between):.2f}"
        measured.append(f"{model}: {said}; it answers {', '.join(sorted(counted)) or 'none of the worlds'}.")
    verdict, scope = judge(outcomes)
    why = {
        NOT_JUDGED: "One world that the model answers has no other to be compared with: RAM in a world that it does "
        "not answer is attention without retrieval. Over samples of one world the ranking is as stable as the ceiling "
        "says.",
        REPRODUCED: "The heads that look at the evidence are the same ones whatever the picture shows.",
    }
    finding = Finding(CLAIM, verdict, measured, scope=scope, numbers={"pairs": pairs})
    finding.explanation = why.get(verdict, "Which heads look at the evidence depends on what the picture shows.")
    for start in range(0, len(figures), 3):
        drawn = [
            finding.draw(name, figure, f"Rank correlation of RAM (upper right) and Jaccard overlap of the top heads "
                         f"(lower left) between worlds: {words}.")
            for name, figure, words in figures[start : start + 3]
        ]  # fmt: skip
        finding.add(page.pair(*drawn))
    finding.add(
        page.table(
            ["model", "worlds", "reading of RAM", "Spearman ρ", "Jaccard", "by chance", "95% of chance", "counts"],
            rows,
            f"Agreement of the heads' RAM. Jaccard: overlap of the top sets; by chance: of random sets as large. "
            f"“Other samples” is the agreement of two halves of one world's samples (mean of {SPLITS} splits): no pair "
            f"of worlds can be expected to exceed it.",
        )
    )
    return finding
