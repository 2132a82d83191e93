"""What sparse inference costs and gains on prompts of 4,000 tokens: F7 of the committed study, and
benchmarks/results/parity_speed.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from markdown_tables import paragraph

from corelens.findings import paired_cost

ROOT = Path(__file__).parents[2]
MODEL = "qwen3vl-s-video"


def long_prompts() -> str:
    """What is lost with the top heads full, and with random ones; how fast the prefill is."""
    part = _read("docs/study/report.json")["models"][MODEL]
    (world,) = part["worlds"].values()
    f3, f7 = world["numbers"]["F3"], world["numbers"]["F7"]
    heads = sum(f3[f3["judged"]]["layers"])
    every = part["about"]["n_layers"] * part["about"]["n_heads"]
    speeds = {x["window"]: x for x in _read("benchmarks/results/parity_speed.json")["plans"]}
    text = f"- **On prompts of {f7['tokens']:,} tokens, full attention matters in few heads**: "
    text += f"`{MODEL}` answers {world['clean']['value']:.0%} of {f7['n']} videos. With {heads} of "
    text += f"its {every} heads full and the others in a window, it loses "
    losses, same = [], paired_cost.cost(np.ones(f7["n"]), np.ones(f7["n"]))
    for plan in f7["plans"]:
        lost, low, high = (f"{100 * plan[end]:.0f}" for end in ("value", "low", "high"))
        random = [f"{100 * end:.0f}" for end in (min(plan["random"]), max(plan["random"]))]
        speed = speeds[plan["window"]]
        loss = f"{lost} points [{low}, {high}] (window of {plan['window']:,} tokens; with {heads} "
        loss += f"random heads full {random[0]} to {random[1]}; the prefill is "
        losses.append(
            f"{loss}{speed['median']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}] as fast, of "
            f"{speed['allows']:.2f}x that the operation count allows)"
        )
    text += f"{' or '.join(losses)}. F7 allows 1 point with an interval of up to 3, "
    text += (
        f"which {f7['n']} videos cannot show: with no answer changed at all it would reach from "
    )
    text += f"{100 * same.low:.1f} to {100 * same.high:.1f}. (Speeds: medians and quartiles.)"
    return paragraph(text, indent="  ")


def _read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


TABLES = {"long_prompts": long_prompts}
