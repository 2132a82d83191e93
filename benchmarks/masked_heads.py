"""Whole heads masked, as the paper does: accuracy without the top, the bottom and random heads by
published RAM.

    python benchmarks/masked_heads.py            # qwen3vl-q in `refer`: about a minute on two cores
    python benchmarks/masked_heads.py --model smol-vlm --dtype bfloat16 --tested 100 --draws 100

Heads are ranked on some scenes and tested on others; the random sets are drawn from all heads
outside the top. Writes JSON to benchmarks/results/, a model at a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import corelens as cl

OUT = Path(__file__).parent / "results/masked_heads.json"
SHARE = 0.05


def measure(name: str, dtype: str, n_scored: int, n_tested: int, draws: int) -> dict[str, Any]:
    """Accuracies of one model in `refer`, each with its exact interval."""
    model = cl.load_demo(name, dtype=dtype)
    scored, tested = (
        cl.synthetic("refer", n, seed=seed) for n, seed in ((n_scored, 21), (n_tested, 22))
    )
    scores = cl.score_heads(model, scored, ["ram"], batch_size=16)["ram"]
    top = scores.top(SHARE)

    def without(heads: cl.HeadSet) -> dict[str, Any]:
        hooks = cl.ablate(heads, "zero") if len(heads) else []
        result = cl.evaluate(model, tested, hooks=hooks, batch_size=32)
        print(f"{name}: {len(heads)} heads masked: {result}", flush=True)
        return {"heads": heads.to_json(), "accuracy": result.accuracy, "ci": list(result.ci)}

    return {
        "world": "refer",
        "dtype": dtype,
        "scored": n_scored,
        "tested": n_tested,
        "kind": "zero",
        "total": scores.values.size,
        "top_depth": float(np.mean([head.layer for head in top])) / (model.cfg.n_layers - 1),
        "clean": without(cl.HeadSet([])),
        "top": without(top),
        "bottom": without(scores.bottom(SHARE)),
        "random": [without(scores.random(k=len(top), seed=seed)) for seed in range(draws)],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-q")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scored", type=int, default=100)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"models": {}}
    results["models"][options.model] = measure(
        options.model, options.dtype, options.scored, options.tested, options.draws
    )
    options.out.write_text(json.dumps(results, indent=1) + "\n")
