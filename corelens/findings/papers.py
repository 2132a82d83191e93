"""The papers' published figures beside what was measured here: what can be compared and what cannot, and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from corelens.evaluation.speed_report import SpeedReport
from corelens.findings.finding import cell, points
from corelens.findings.options import CONTROLLED

CORE, SPARSEMM = "arXiv 2606.05843", "arXiv 2506.05344"
SCALE = (
    "In kind, not in size: the papers' models have billions of parameters and answer questions on photographs, "
    "documents and videos; see above what was studied here."
)


def beside_the_papers(settings: Sequence[Any], measured: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """[what, published, here, comparable?] for every model and world on which something of it was measured."""
    rows: list[list[str]] = []
    for setting in settings:
        numbers, label = measured[setting.label], setting.label
        if "table" in numbers:
            rows += _heads(label, setting, numbers)
        if "hybrid" in numbers:
            speed = SpeedReport.from_json(numbers["hybrid"]["speed"])
            rows.append([
                "speed-up with the top heads full", f"1.8x to 2.1x (a digest says up to 2.3x), {CORE}",
                f"{label}: prefill {_ratio(speed, 'prefill')}, end to end {_ratio(speed, 'end_to_end')}, at "
                f"{numbers['hybrid']['tokens']} tokens, {speed.meta.get('machine', 'this machine')}",
                "No, unless prompts are as long and the machine is a GPU: the gain grows with the prompt's length.",
            ])  # fmt: skip
        if "visual_heads" in numbers:
            found = numbers["visual_heads"]
            rows.append([
                "visual heads", f"fewer than about 5% of the heads, {SPARSEMM}",
                f"{label}: the top 5% hold {found['share_of_top']:.0%} of the score; "
                f"{found['heads'] - found['none_hit']} of {found['heads']} heads hit the text at all",
                "Yes as a share of the score; the paper's own threshold for an active head is not known to us.",
            ])  # fmt: skip
            if found["budgets"]:
                speed = SpeedReport.from_json(found["budgets"]["speed"])
                kept = (speed.sparse.kv_bytes or 0) / (speed.dense.kv_bytes or 1)
                rows.append([
                    "decoding under KV budgets by head", f"1.38x faster, 52% less memory, at parity, {SPARSEMM}",
                    f"{label}: decoding {_ratio(speed, 'decode')}, KV cache {kept:.2f} of dense",
                    "The memory follows from the budget, so only together with the quality kept at it (F8); the time "
                    "not: small prompts on a machine of another kind.",
                ])  # fmt: skip
    return rows


def _heads(label: str, setting: Any, numbers: Mapping[str, Any]) -> list[list[str]]:
    of = {(one["role"], one["ranking"]): one["ablations"]["knockout"] for one in numbers["table"]}
    random, k = of["random", ""], of["random", ""]["k"]
    tops = ", ".join(f"{points(of['top', name]['drop'].values())} by {name}" for name in CONTROLLED)
    bottoms = ", ".join(f"{points(of['bottom', name]['drop'].values())} by {name}" for name in CONTROLLED)
    every = setting.scores["ram"].values.size
    return [
        ["heads that are ablated", f"the top 5% (about 30 heads specialise), {CORE}",
         f"{label}: {k} of {every}, {k / every:.1%}", "The share, yes; the number goes with the size of the model."],
        ["cost of the top 5%", f"“significant degradation”, {CORE} (its tables are not known to us)",
         f"{label}: {tops} (knockout), from {cell(setting.clean.interval)}", SCALE],
        ["cost of the control", f"lower-ranked heads: “minimal effect”, {CORE}",
         f"{label}: bottom {bottoms}; random {points(random['drop'].values())}", SCALE],
    ]  # fmt: skip


def _ratio(speed: SpeedReport, phase: str) -> str:
    found = speed.speedup(phase)
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]"
