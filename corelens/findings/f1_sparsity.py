"""F1, functional sparsity: a few heads hold the attention mass on the evidence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corelens.findings.finding import NOT_JUDGED, NOT_REPRODUCED, Brief, Claim, Finding, cell, judge, percent
from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.scores import HeadScores
from corelens.heads.stats import gini

LEAST_GINI, TIMES_EVEN = 0.6, 5.0
CLAIM = Claim(
    "F1",
    "Functional sparsity",
    "Cross-modal retrieval is functionally sparse: a small, highly specialised subset of heads (about 30 in the models "
    "of the paper) extracts what the question asks for.",
    "arXiv 2606.05843, abstract and introduction; the number of heads as secondary sources give it",
    f"The top heads hold at least {TIMES_EVEN:.0f} times the summed RAM that an even spread would give them, and the "
    f"Gini coefficient over heads is at least {LEAST_GINI}.",
)


def measure(setting: Setting) -> dict[str, Any]:
    """How concentrated each reading of RAM is."""
    found = {}
    for name, key in RANKINGS.items():
        scores = setting.scores[key]
        boot = resampled(scores, setting.options.seed)
        k = len(scores.top(setting.options.fraction))
        ordered = np.sort(boot.reshape(len(boot), -1), axis=1)[:, ::-1]
        share = ordered[:, :k].sum(1) / np.maximum(ordered.sum(1), 1e-12)
        ginis = np.array([gini(values) for values in boot])
        found[name] = {
            "gini": (scores.gini(), *np.quantile(ginis, [0.025, 0.975])),
            "share_of_top": (scores.mass_of_top(setting.options.fraction), *np.quantile(share, [0.025, 0.975])),
            "even_share": k / scores.values.size,
            "split_half": scores.split_half(),
        }
    return {"concentration": found}


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows."""
    return {
        name: {"share of the top": one["share_of_top"], "times even": one["share_of_top"][0] / one["even_share"],
               "Gini": one["gini"]}
        for name, one in numbers["concentration"].items() if name in CONTROLLED
    }  # fmt: skip


def resampled(scores: HeadScores, seed: int, draws: int = 200) -> np.ndarray:
    """Scores of bootstrap samples, [draw, layer, head]."""
    assert scores.per_sample is not None
    n = len(scores.per_sample)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
    return np.einsum("dn,nlh->dlh", counts, np.nan_to_num(scores.per_sample))


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds."""
    from corelens.viz import page
    from corelens.viz.curves import sorted_scores

    outcomes: dict[str, dict[str, bool]] = {}
    rows, measured = [], []
    for setting, numbers in runs:
        fraction = setting.options.fraction
        answered = setting.lacks(("regions", "accuracy")) is None
        for name, one in numbers["concentration"].items():
            times = one["share_of_top"][0] / one["even_share"]
            if answered:
                met = times >= TIMES_EVEN and one["gini"][0] >= LEAST_GINI
                outcomes.setdefault(setting.label, {})[name] = met
            rows.append([setting.label, name, cell(one["share_of_top"]), f"{times:.1f}×", cell(one["gini"]),
                         f"{one['split_half']:.2f}"])  # fmt: skip
        if answered:
            of = {name: numbers["concentration"][name] for name in CONTROLLED}
            said = ", ".join(
                f"{percent(one['share_of_top'][0])} by {name} (Gini {one['gini'][0]:.2f})" for name, one in of.items()
            )
            measured.append(f"{setting.label}: the top {fraction:.0%} of heads hold {said} of the summed RAM.")
    verdict, scope = judge(outcomes)
    finding = Finding(CLAIM, verdict, measured, scope=scope, numbers={"met": outcomes})
    finding.explanation = {
        NOT_JUDGED: "No world is answered well enough for attention on the evidence to be called retrieval.",
        NOT_REPRODUCED: "Mass is not use. Attention on the evidence is common among heads; whether its use is rare, "
        "F5 and F6 say. Where they find that a few heads carry the answer, the sparsity is in the function, and the "
        "mass summed over heads understates it.",
    }.get(verdict, "The mass itself is concentrated; F5 says whether the answer needs the heads that hold it.")
    finding.add(
        page.table(
            ["model and world", "reading of RAM", "share of the top", "times even", "Gini", "split-half ρ"],
            rows,
            "How concentrated RAM is over heads, with 95% bootstrap intervals over samples; the rank correlation "
            "between the scores of two random halves of the samples says how well the ranking repeats.",
        )
    )
    for setting, _ in runs:
        drawn = [
            finding.draw(
                f"sorted-{setting.label}-{RANKINGS[name]}",
                sorted_scores(setting.scores[RANKINGS[name]], setting.options.fraction),
                f"{name}, {setting.label}: all heads, from the highest to the lowest.",
            )
            for name in CONTROLLED
        ]
        finding.add(page.pair(*drawn))
    return finding
