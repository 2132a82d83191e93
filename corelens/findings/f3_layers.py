"""F3, where they sit: the layer profile, and how it moves with scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corelens.findings.f1_sparsity import resampled
from corelens.findings.finding import NOT_JUDGED, REPRODUCED, Brief, Claim, Finding, cell, judge
from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.setting import Setting

MIDDLE = 0.5
CLAIM = Claim(
    "F3",
    "Middle to late layers",
    "With scale, the specialised heads concentrate in the middle to late layers.",
    "arXiv 2606.05843, as secondary sources sum it up; its scales: 4B, 8B and 32B of one family, and others",
    f"The mean relative depth of the top heads (0: first layer, 1: last) exceeds {MIDDLE}, its 95% interval too. "
    "Scale is not judged: models of several scales are shown side by side where they are given.",
)


def measure(setting: Setting) -> dict[str, Any]:
    """RAM by layer, and the depth of the top heads."""
    found = {}
    for name, key in RANKINGS.items():
        scores = setting.scores[key]
        top = scores.top(setting.options.fraction)
        layers = scores.values.shape[0]
        boot = resampled(scores, setting.options.seed).reshape(200, -1)
        at = np.argsort(-boot, axis=1)[:, : len(top)] // scores.values.shape[1]
        mine = float(np.mean([head.layer for head in top]) / max(layers - 1, 1))
        depths = at.mean(1) / max(layers - 1, 1)
        found[name] = {
            "profile": [round(float(x), 6) for x in scores.by_layer()],
            "top": [sum(head.layer == layer for head in top) for layer in range(layers)],
            "depth": (mine, *np.quantile(depths, [0.025, 0.975])),
        }  # fmt: skip
    return {"layers": found}


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows."""
    return {name: {"mean depth of the top": numbers["layers"][name]["depth"]} for name in CONTROLLED}


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds that are answered."""
    from corelens.viz import page
    from corelens.viz.head_grid import head_grid_html
    from corelens.viz.study_figures import layer_profile

    outcomes: dict[str, dict[str, bool]] = {}
    rows, measured = [], []
    for setting, numbers in runs:
        answered = setting.lacks(("regions", "accuracy")) is None
        for name, one in numbers["layers"].items():
            if answered:
                outcomes.setdefault(setting.label, {})[name] = one["depth"][1] > MIDDLE
            where = ", ".join(f"L{layer}: {count}" for layer, count in enumerate(one["top"]) if count)
            rows.append([setting.label, name, cell(one["depth"]), where, "yes" if answered else "not answered"])
        if answered:
            said = ", ".join(f"{cell(numbers['layers'][name]['depth'])} by {name}" for name in CONTROLLED)
            measured.append(f"{setting.label}: mean relative depth of the top heads {said}.")
    verdict, scope = judge(outcomes)
    models = list(dict.fromkeys(setting.model_name for setting, _ in runs))
    finding = Finding(CLAIM, verdict, measured, scope=scope)
    finding.explanation = {
        NOT_JUDGED: "No world is answered well enough to call a head a retrieval head.",
        REPRODUCED: "Deep enough: what the question asks for has to be known before it can be fetched.",
    }.get(
        verdict,
        "Retrieval can begin as soon as the question is in the row that asks. A model of a few layers and short "
        "questions has that after a layer or two; large models spend more layers on it.",
    ) + ("" if len(models) > 1 else " One model says nothing of scale.")
    for setting, numbers in runs:
        if setting.lacks(("regions", "accuracy")) is not None:
            continue
        for name in CONTROLLED:
            scores = setting.scores[RANKINGS[name]]
            grid = page.html(head_grid_html(scores, scores.top(setting.options.fraction)))
            finding.add(
                page.figure(
                    grid,
                    f"{name} of every head, {setting.label}, mean over {len(setting.to_score)} samples; the top "
                    f"{setting.options.fraction:.0%} outlined. Hover a head for its number and its 95% interval.",
                )
            )
        drawn = layer_profile({name: one["profile"] for name, one in numbers["layers"].items()},
                              {name: one["top"] for name, one in numbers["layers"].items()})  # fmt: skip
        finding.add(
            finding.draw(f"layers-{setting.label}", drawn,
                         f"{setting.label}: mean RAM of each layer's heads (lines), and how many of the top heads it "
                         "holds (bars), by each reading.")
        )  # fmt: skip
    finding.add(
        page.table(
            ["model and world", "reading of RAM", "mean depth of the top", "where they are", "counts"],
            rows,
            "Relative depth: layer / (layers − 1). Intervals: 95%, ranking again in 200 bootstrap samples.",
        )
    )
    return finding
