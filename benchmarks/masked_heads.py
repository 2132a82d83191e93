"""Whole heads masked, as the paper does: accuracy without the top, the bottom and random heads by
published RAM.

    python benchmarks/masked_heads.py            # qwen3vl-q in `refer`: about a minute on two cores

Heads are ranked on 100 scenes and tested on 200 others. Writes JSON to benchmarks/results/.
"""

import argparse
import json
from pathlib import Path

import corelens as cl

OUT = Path(__file__).parent / "results/masked_heads.json"
DRAWS, SHARE = 10, 0.05


def main(model_name: str, out: Path) -> None:
    model = cl.load_demo(model_name)
    scored, tested = cl.synthetic("refer", 100, seed=21), cl.synthetic("refer", 200, seed=22)
    scores = cl.score_heads(model, scored, ["ram"], batch_size=16)["ram"]
    top = scores.top(SHARE)

    def without(heads: cl.HeadSet) -> dict:
        hooks = cl.ablate(heads, "zero") if len(heads) else []
        result = cl.evaluate(model, tested, hooks=hooks, batch_size=32)
        print(f"{len(heads)} heads masked: {result}", flush=True)
        return {"heads": heads.to_json(), "accuracy": result.accuracy, "ci": list(result.ci)}

    run = {
        "model": model_name,
        "world": "refer",
        "scored": len(scored),
        "tested": len(tested),
        "kind": "zero",
        "clean": without(cl.HeadSet([])),
        "top": without(top),
        "bottom": without(scores.bottom(SHARE)),
        "random": [without(scores.random(k=len(top), seed=seed)) for seed in range(DRAWS)],
    }
    out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-q")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    main(options.model, options.out)
