"""Parity and speed of sparse plans on the same long prompts: F7 of the study on videos of 56
frames, about 4,000 tokens.

    python benchmarks/parity.py --out parity     # two hours on one core, 16 GB of memory

50 videos rank the heads, 125 others are answered: with every head full, with the top 5% full, and
with 20 random sets full; the other heads see the first 128 tokens and a window. The result is a
study's report.json. Then the plans are timed in turns with the dense run, whether or not they met
parity (F7 times the plan alone that did): speed.json, of which a copy is
benchmarks/results/parity_speed.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import corelens as cl
from corelens.findings.f7_acceleration import SINK

MODEL, SCORED, TESTED = "qwen3vl-s-video", 50, 125
OPTIONS = {"frames": 56, "objects": 4, "sides": (352, 384)}
WORLD = "video:frames=56,objects=4,sides=[352,384]"
SEED = 20261130
TIMED, ROUNDS = 3, 3


def main(out: Path) -> None:
    """Study F1, F3, F4 and F7, a sample a forward, and print the verdicts; then time F7's plans."""
    model = cl.load_demo(MODEL)
    samples = cl.synthetic("video", SCORED + TESTED, seed=SEED, **OPTIONS)
    study = cl.study(
        {MODEL: model},
        {WORLD: samples},
        out=out,
        findings=["F1", "F3", "F4", "F7"],
        without=("design", "curves", "faithfulness", "repeats", "causal"),
        score_share=SCORED / (SCORED + TESTED),
        batch_size=1,
        seed=SEED,
        hours=8,
        command="python benchmarks/parity.py",
    )
    print(study)
    timed = speeds(model, study.data["models"][MODEL], samples[SCORED : SCORED + TIMED])
    (out / "speed.json").write_text(json.dumps(timed, indent=1) + "\n")


def speeds(model: Any, studied: dict[str, Any], samples: list[cl.Sample]) -> dict[str, Any]:
    """Dense prefill over sparse prefill under each of F7's plans, the two in turns.

    Args:
        model: the HookedMLLM that was studied.
        studied: its part of report.json.
        samples: what is timed, each by itself.
    """
    world = studied["worlds"][WORLD]
    scores = np.array(world["scores"][studied["reading"]["key"]], dtype=float)
    top, plans, about = cl.HeadScores(scores).top(0.05), [], {}
    for plan in world["numbers"]["F7"]["plans"]:
        sparse = cl.SparseInference(top, cl.Streaming(SINK, plan["window"]))
        speed = cl.evaluate(model, samples, sparse=sparse, rounds=ROUNDS).speed
        assert speed is not None
        ratio = speed.speedup("prefill")._asdict()
        plans.append({"window": plan["window"], "allows": plan["allows"], **ratio})
        about = speed.meta
    return {"samples": len(samples), "rounds": ROUNDS, "plans": plans, "about": about}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("parity"))
    main(parser.parse_args().out)
