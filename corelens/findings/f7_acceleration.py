"""F7, acceleration at parity: the top heads attend fully, the others in a window, against as many random heads."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corelens.evaluation.contrast import NONE, SparseContrast, sparse_contrast
from corelens.evaluation.evaluate import evaluate
from corelens.evaluation.speed_report import SpeedReport
from corelens.findings.finding import NOT_REPRODUCED, Brief, Claim, Finding, cell, judge
from corelens.findings.options import CONTROLLED, LEVEL, RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.intervals import accuracy_difference
from corelens.sparse import SparseInference, Streaming

PARITY, AT_MOST, MUCH = 0.02, 0.05, 0.20
LONG, FASTER = 4096, 1.2
SINK, DIVISORS = 4, (8, 16, 4, 32)  # windows: the prompt's length over these
TIMED_SAMPLES = 16
CLAIM = Claim(
    "F7",
    "Acceleration at parity",
    "With the specialised heads kept full and the others sparse, inference is significantly faster at robust task "
    "performance (1.8x to 2.1x, as secondary sources give it).",
    "arXiv 2606.05843, abstract; the random-heads control is ours",
    f"At one window at least of those tried, the model with the top heads full loses at most {100 * PARITY:.0f} points "
    f"(95% interval up to {100 * AT_MOST:.0f}), with as many random heads full it loses {100 * MUCH:.0f} or more, and "
    f"the paired difference is above zero at the level {LEVEL:.1%}. Speed is judged for prompts of {LONG} tokens and "
    f"more (prefill at least {FASTER}x): in shorter ones attention is not what takes the time.",
    ("regions", "accuracy"),
)


def measure(setting: Setting) -> dict[str, Any]:
    """Accuracy with the top heads full and the rest in a window, its controls; and one comparison of speed."""
    options, model = setting.options, setting.model
    samples = setting.to_test[: options.sparse_samples]
    tokens = prompt_tokens(setting)
    windows = sorted({max(2, tokens // by) for by in DIVISORS[: options.windows]})
    setting.advance("sparse inference against its controls")
    contrast = sparse_contrast(
        model, samples, {name: setting.scores[RANKINGS[name]] for name in CONTROLLED}, fractions=[options.fraction],
        windows=windows, sink=SINK, draws=options.draws, batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    setting.advance("timing")
    top = setting.scores[RANKINGS[CONTROLLED[-1]]].top(options.fraction)
    plan = SparseInference(top, Streaming(sink=SINK, window=windows[-1]))
    speed = evaluate(model, samples[:TIMED_SAMPLES], sparse=plan, rounds=3).speed
    assert speed is not None
    return {
        "hybrid": {
            "tokens": tokens,
            "windows": windows,
            "sink": SINK,
            "samples": len(samples),
            "lost": {
                name: [_lost(contrast, name, window, options.fraction) for window in windows] for name in CONTROLLED
            },
            "contrast": {key: x for key, x in contrast.to_json().items() if key in ("dense", "points", "differences")},
            "speed": speed.to_json(),
        }
    }


def prompt_tokens(setting: Setting) -> int:
    """The median length of a prompt, in tokens."""
    inputs = setting.model.prepare(setting.to_test[:8])
    return int(np.median([len(token_map.all) for token_map in inputs.token_maps]))


def _lost(contrast: SparseContrast, name: str, window: int, share: float) -> dict[str, Any]:
    """What the top heads of one reading, and random ones, lose against the dense model; and the paired difference."""
    dense, top = contrast.dense.correct, contrast.point(f"top, {name}", window, share).correct
    random, none = contrast.point("random", window, share).correct, contrast.point(NONE, window).correct
    return {
        "window": window,
        "top": accuracy_difference(dense, top)._asdict(),
        "random": accuracy_difference(dense, random)._asdict(),
        "none": accuracy_difference(dense, none)._asdict(),
        "gap": accuracy_difference(top, random, level=LEVEL)._asdict(),
    }


def met(one: dict[str, Any]) -> bool:
    """Whether parity and control hold at this window."""
    parity = one["top"]["value"] <= PARITY and one["top"]["high"] <= AT_MOST
    return parity and one["random"]["value"] >= MUCH and one["gap"]["low"] > 0


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows, at the window where the top heads lose least."""
    found, told = numbers["hybrid"], {}
    for name in CONTROLLED:
        one = min(found["lost"][name], key=lambda one: one["top"]["value"])
        told[name] = {"prompt, tokens": found["tokens"], "window": one["window"], "lost, top full": one["top"],
                      "lost, random full": one["random"]}  # fmt: skip
    return told


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds."""
    from corelens.viz import page
    from corelens.viz.speed import speed_curves

    outcomes: dict[str, dict[str, bool]] = {}
    finding = Finding(CLAIM, NOT_REPRODUCED, [])
    for setting, numbers in runs:
        found = numbers["hybrid"]
        speed = SpeedReport.from_json(found["speed"])
        prefill = speed.speedup("prefill")
        quick = found["tokens"] < LONG or prefill.low >= FASTER
        outcomes[setting.label] = {name: quick and any(map(met, line)) for name, line in found["lost"].items()}
        for name, line in found["lost"].items():
            said = "; ".join(
                f"window {one['window']}: {100 * one['top']['value']:.0f} points lost, "
                f"{100 * one['random']['value']:.0f} with random heads"
                for one in line
            )
            finding.measured.append(f"{setting.label}, top {setting.options.fraction:.0%} by {name} full: {said}.")
        finding.measured.append(
            f"{setting.label}: prefill {prefill.median:.2f}x [{prefill.low:.2f}, {prefill.high:.2f}] at "
            f"{found['tokens']} tokens (engine {speed.engine})"
            + (", too short to be judged." if found["tokens"] < LONG else ".")
        )
        panels: dict[str, list[tuple[float, float, float, float]]] = {}
        for point in found["contrast"]["points"]:
            if not point["line"].startswith(("layer", "bottom")):
                panels.setdefault(point["line"], []).append((float(point["x"]), *point["accuracy"].values()))
        k = next(len(point["heads"][0]) for point in found["contrast"]["points"] if point["line"].startswith("top"))
        drawn = speed_curves(
            {f"{k} heads full": panels}, "window, tokens", found["contrast"]["dense"]["accuracy"]["value"]
        )
        caption = (
            f"{setting.label}: accuracy with {k} heads full and the others under Streaming(sink={SINK}, window), "
            f"last=0, on {found['samples']} samples, answers decoded with every key."
        )
        rows = [
            [point["line"], point["x"], cell(point["accuracy"]), cell(point["answer_logprob"])]
            for point in found["contrast"]["points"]
        ]
        finding.add(
            finding.draw(f"hybrid-{setting.label}", drawn, caption),
            page.table(["full heads", "window", "accuracy", "answer log-probability"], rows, caption),
            page.table(*speed.table(), f"{setting.label}: {speed.caption}"),
            page.note(f"{speed.verdict} {speed.answers}", *speed.notes),
        )
    finding.verdict, finding.scope = judge(outcomes)
    finding.numbers = {"met": outcomes}
    finding.explanation = _explain(runs, outcomes)
    return finding


def _explain(runs: Sequence[tuple[Setting, dict[str, Any]]], outcomes: dict[str, dict[str, bool]]) -> str:
    said = []
    for setting, numbers in runs:
        lost = numbers["hybrid"]["lost"]
        best = min(
            (one["top"]["value"], name, one["window"], one["random"]["value"]) for name in lost for one in lost[name]
        )
        if any(outcomes[setting.label].values()):
            said.append(f"{setting.label}: what these heads see is what the answer needs; the others can look nearby.")
            continue
        top, name, window, random = best
        said.append(
            f"{setting.label}: the least that is lost with chosen heads full is {100 * top:.1f} points ({name}, window "
            f"{window}), where random heads lose {100 * random:.1f}. "
            + (
                "Which heads are full decides nearly everything, and parity is missed all the same: what the window "
                "hides from the other heads costs the rest."
                if random - top >= MUCH
                else "Which heads are full makes little difference at these windows."
            )
        )
    return " ".join(said)
