"""What sparse inference costs and gains on prompts of 4,000 tokens: F7 of the committed study, and
benchmarks/results/parity_speed.json."""

import json
from pathlib import Path
from typing import Any

from markdown_tables import paragraph

ROOT = Path(__file__).parents[2]
MODEL = "qwen3vl-s-video"


def long_prompts() -> str:
    """What is lost with the top heads full and with random ones full, and how fast the prefill is."""
    part = _read("docs/study/report.json")["models"][MODEL]
    (world,) = part["worlds"].values()
    f7 = world["numbers"]["F7"]
    layers = world["numbers"]["F3"]
    heads = sum(layers[layers["judged"]]["layers"])
    every = part["about"]["n_layers"] * part["about"]["n_heads"]
    speeds = {
        plan["window"]: plan for plan in _read("benchmarks/results/parity_speed.json")["plans"]
    }
    text = f"- **On prompts of {f7['tokens']:,} tokens, full attention matters in few heads**: "
    text += f"`{MODEL}` answers {world['clean']['value']:.0%} of {f7['n']} videos."
    for plan in f7["plans"]:
        lost, low, high = (f"{100 * plan[end]:.0f}" for end in ("value", "low", "high"))
        random = [100 * value for value in plan["random"]]
        speed = speeds[plan["window"]]
        text += f" With {heads} of {every} heads full and the others in a window of {plan['window']:,} "
        text += f"tokens it loses {lost} points [{low}, {high}], with {heads} random heads full "
        text += f"{min(random):.0f} to {max(random):.0f}; the prefill is {speed['median']:.2f}x as "
        text += f"fast (the operation count allows {speed['allows']:.2f}x)."
    text += " F7 asks for a smaller loss. (The windows were set before the run.)"
    return paragraph(text, indent="  ")


def _read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


TABLES = {"long_prompts": long_prompts}
