"""F8, SparseMM: visual heads by their response to written text, and KV budgets by head at equal memory."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from corelens.evaluation.contrast import budget_contrast
from corelens.evaluation.evaluate import evaluate
from corelens.evaluation.speed_report import SpeedReport
from corelens.findings.f7_acceleration import prompt_tokens
from corelens.findings.finding import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Brief, Claim, Finding, cell, percent
from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.scores import HeadScores
from corelens.metrics.score import score_heads
from corelens.sparse import KVBudget, SparseInference

HALF = 0.5
DIVISORS = (4, 2, 8)  # budgets: the prompt's length over these
TIMED_SAMPLES = 8
VISUAL, RAM = "visual-head score", CONTROLLED[-1]
CLAIM = Claim(
    "F8",
    "Visual heads and KV budgets",
    "Fewer than about 5% of the heads actively contribute to visual understanding; found by their response to written "
    "text, they share out a KV budget so that decoding is 1.38x faster with 52% less memory at parity.",
    "SparseMM, arXiv 2506.05344, abstract",
    f"The top 5% of heads hold at least {HALF:.0%} of the visual-head score; and of as many keys in all, budgets by "
    "that score keep more of the answer's log-probability than even budgets and than the same budgets dealt to other "
    "heads, the paired 95% intervals above zero, at one budget at least, and at none below. Budgets can be judged only "
    "where answers have several tokens: the first one is predicted before anything is evicted.",
    ("regions", "answers", "text"),
)


def measure(setting: Setting) -> dict[str, Any]:
    """How concentrated the visual-head score is; what budgets by it keep, against even and dealt ones."""
    options = setting.options
    lengths = [_tokens(setting, sample.answer) for sample in setting.samples]
    setting.advance("visual heads")
    scores = score_heads(
        setting.model, setting.to_score, ["visual_head"], batch_size=options.batch_size,
        out=setting.folder.path / "visual",
        max_new_tokens=max(lengths) + 2,
    )["visual_head"]  # fmt: skip
    hits = bool(scores.values.any())
    found: dict[str, Any] = {
        "top": scores.top(options.fraction).to_json() if hits else [],
        "share_of_top": scores.mass_of_top(options.fraction),
        "gini": scores.gini(),
        "none_hit": int((scores.values == 0).sum()),
        "heads": scores.values.size,
        "with_ram": scores.agreement(setting.scores[RANKINGS[RAM]], options.fraction)._asdict() if hits else None,
        "values": [[round(float(x), 6) for x in row] for row in scores.values],
        "budgets": None,
    }
    if hits and np.median(lengths) >= 2:
        found["budgets"] = _budgets(setting, scores)
    return {"visual_heads": found}


def _budgets(setting: Setting, scores: HeadScores) -> dict[str, Any]:
    options, tokens = setting.options, prompt_tokens(setting)
    window = max(2, min(32, tokens // 16))
    budgets = sorted({max(window + 1, tokens // by) for by in DIVISORS[: max(1, options.windows - 1)]})
    samples = setting.to_test[: max(8, options.sparse_samples // 3)]
    setting.advance("budgets against their controls")
    contrast = budget_contrast(
        setting.model, samples, {VISUAL: scores, RAM: setting.scores[RANKINGS[RAM]]}, budgets, window=window,
        draws=options.draws, batch_size=options.batch_size, seed=options.seed,
    )  # fmt: skip
    setting.advance("timing")
    plan = SparseInference(kv_budget=KVBudget(scores, budget=budgets[-1], window=window))
    speed = evaluate(setting.model, samples[:TIMED_SAMPLES], sparse=plan, rounds=2).speed
    assert speed is not None
    told = contrast.to_json()
    kept = {key: told[key] for key in ("dense", "points", "differences", "keys_kept")}
    return {"tokens": tokens, "window": window, "samples": len(samples), "speed": speed.to_json(), **kept}


def _tokens(setting: Setting, answer: Any) -> int:
    return len(setting.model.tokenizer.encode(str(answer), add_special_tokens=False))


def conclude(runs: Sequence[tuple[Setting, dict[str, Any]]]) -> Finding:
    """The verdict over all models and worlds with long answers."""
    from corelens.viz import page
    from corelens.viz.head_grid import head_grid_html
    from corelens.viz.speed import speed_curves

    finding = Finding(CLAIM, NOT_JUDGED, [])
    outcomes: dict[str, bool] = {}
    why: list[str] = []
    for setting, numbers in runs:
        found = numbers["visual_heads"]
        sparse = found["share_of_top"] >= HALF
        share = percent(found["share_of_top"])
        said = f"the top {setting.options.fraction:.0%} of heads hold {share} of the visual-head score"
        if found["with_ram"]:
            said += f", and rank like RAM of the last row with ρ = {found['with_ram']['spearman']:.2f}"
        finding.measured.append(f"{setting.label}: {said}; {found['none_hit']} of {found['heads']} heads never hit.")
        scores = HeadScores(np.array(found["values"], dtype=np.float32), meta={"metric": "visual_head"})
        grid = page.html(head_grid_html(scores, scores.top(setting.options.fraction) if found["top"] else None))
        finding.add(
            page.figure(grid, f"{setting.label}: visual-head score of every head (its share of all); the top outlined.")
        )
        if found["budgets"] is None:
            why.append(f"{setting.label} has answers of one token, which no budget can touch.")
            continue
        better = _better(found["budgets"])
        outcomes[setting.label] = sparse and better
        why.append(
            f"{setting.label}: the score is {'' if sparse else 'not '}concentrated, and budgets by it are "
            f"{'' if better else 'not '}better than even and dealt ones throughout."
        )
        _show(finding, setting, found["budgets"], page, speed_curves)
    if outcomes:
        finding.verdict = REPRODUCED if all(outcomes.values()) else NOT_REPRODUCED
    finding.numbers = {"met": outcomes}
    finding.explanation = " ".join(why)
    return finding


def brief(numbers: Mapping[str, Any]) -> Brief:
    """The numbers that a comparison of models shows."""
    found = numbers["visual_heads"]
    told = {"share of the top": found["share_of_top"], "Gini": found["gini"], "heads that never hit": found["none_hit"]}
    if found["with_ram"]:
        told["ρ with RAM (last row)"] = found["with_ram"]["spearman"]
    if found["budgets"]:
        told["budgets by it better than even and dealt ones"] = "yes" if _better(found["budgets"]) else "no"
    return {VISUAL: told}


def _better(budgets: dict[str, Any]) -> bool:
    """Above even and dealt budgets at one budget at least, and below at none."""
    differences = [one for one in budgets["differences"] if one["line"] == f"by score, {VISUAL}"]
    against = [one for one in differences if one["control"] in ("uniform", f"dealt at random, {VISUAL}")]
    by_budget: dict[int, list[dict[str, float]]] = {}
    for one in against:
        by_budget.setdefault(one["x"], []).append(one["answer_logprob"])
    above = any(all(x["low"] > 0 for x in at) for at in by_budget.values())
    return above and not any(x["high"] < 0 for at in by_budget.values() for x in at)


def _show(finding: Finding, setting: Setting, found: dict[str, Any], page: Any, speed_curves: Any) -> None:
    speed = SpeedReport.from_json(found["speed"])
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for point in found["points"]:
        lines.setdefault(point["line"], []).append((float(point["x"]), *point["answer_logprob"].values()))
    drawn = speed_curves(
        {"": lines}, "keys kept, mean a KV head", found["dense"]["answer_logprob"],
        ylabel="answer log-probability, nats", percent=False,
    )  # fmt: skip
    said = [
        f"{one['x']} keys: {one['answer_logprob']['value']:+.2f} [{one['answer_logprob']['low']:+.2f}, "
        f"{one['answer_logprob']['high']:+.2f}] nats against {one['control']}"
        for one in found["differences"]
        if one["line"] == f"by score, {VISUAL}" and one["control"] in ("uniform", f"dealt at random, {VISUAL}")
    ]
    finding.measured.append(f"{setting.label}, budgets by visual-head score: {'; '.join(said)}.")
    if speed.dense.kv_bytes and speed.sparse.kv_bytes is not None:
        decode = speed.speedup("decode")
        kept = speed.sparse.kv_bytes / speed.dense.kv_bytes
        room = " (with the room it keeps for a growing answer, which outweighs so short a prompt)" if kept > 1 else ""
        finding.measured.append(
            f"{setting.label}: KV cache {kept:.2f} of dense{room}, decoding "
            f"{decode.median:.2f}x [{decode.low:.2f}, {decode.high:.2f}] at {found['tokens']} prompt tokens."
        )
    caption = (
        f"{setting.label}: what is kept of a prompt of {found['tokens']} tokens (the last {found['window']} in every "
        f"head), shared out by each score, evenly, and dealt to other heads, on {found['samples']} samples."
    )
    rows = [
        [point["line"], point["x"], cell(point["accuracy"]), cell(point["answer_logprob"])] for point in found["points"]
    ]
    finding.add(
        finding.draw(f"budgets-{setting.label}", drawn, caption),
        page.table(["budgets", "keys a KV head", "accuracy", "answer log-probability"], rows, caption),
        page.table(*speed.table(), f"{setting.label}: {speed.caption}"),
        page.note(f"{speed.verdict} {speed.answers}", *speed.notes),
    )
