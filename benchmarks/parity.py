"""Parity and speed of one sparse plan on the same long prompts: F7 of the study on videos of 56
frames, about 4,000 tokens.

    python benchmarks/parity.py --out parity     # hours on one core, 16 GB of memory

50 videos rank the heads, 125 others are answered: with every head full, with the top 5% full, and
with 20 random sets full; the other heads see the first 128 tokens and a window of 1,024. Then the
plan is timed in turns with the dense run. The result is a study's report.json.
"""

import argparse
from pathlib import Path

import corelens as cl

MODEL, SCORED, TESTED = "qwen3vl-s-video", 50, 125
OPTIONS = {"frames": 56, "objects": 4, "sides": (352, 384)}
SEED = 20261130


def main(out: Path) -> None:
    """Study F1, F3, F4 and F7, a sample a forward, and print the verdicts."""
    samples = cl.synthetic("video", SCORED + TESTED, seed=SEED, **OPTIONS)
    study = cl.study(
        {MODEL: cl.load_demo(MODEL)},
        {"video:frames=56,objects=4,sides=[352,384]": samples},
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("parity"))
    main(parser.parse_args().out)
