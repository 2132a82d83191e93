"""Whole heads masked, as the paper does: accuracy without the top, the bottom and random heads by
published RAM.

    python benchmarks/masked_heads.py            # qwen3vl-qs in `refer`: six minutes on two cores
    python benchmarks/masked_heads.py --model smol-vlm --dtype bfloat16 --scored 60 --tested 100
    python benchmarks/masked_heads.py --model smol-vlm --alone L23H3     # adds to that run

Heads are ranked on some scenes and tested on others; the random sets are drawn from all heads
outside the top. `--alone` masks single heads on the same scenes, and says where RAM ranks them.
Writes JSON to benchmarks/results/, a model at a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import corelens as cl

OUT = Path(__file__).parent / "results/masked_heads.json"
SHARE = 0.05


class Masked:
    """Accuracy of one model in `refer` without some of its heads."""

    def __init__(self, name: str, dtype: str, scored: int, tested: int):
        self.name, self.model = name, cl.load_demo(name, dtype=dtype)
        to_rank = cl.synthetic("refer", scored, seed=21)
        self.tested = cl.synthetic("refer", tested, seed=22)
        self.scores = cl.score_heads(self.model, to_rank, ["ram"], batch_size=16)["ram"]
        self.about = {
            "world": "refer", "dtype": dtype, "scored": scored, "tested": tested, "kind": "zero"
        }  # fmt: skip

    def without(self, heads: cl.HeadSet) -> dict[str, Any]:
        """Accuracy with these heads masked, with its exact interval."""
        hooks = cl.ablate(heads, "zero") if len(heads) else []
        result = cl.evaluate(self.model, self.tested, hooks=hooks, batch_size=32)
        print(f"{self.name}: {len(heads)} heads masked: {result}", flush=True)
        return {"heads": heads.to_json(), "accuracy": result.accuracy, "ci": list(result.ci)}

    def sets(self, draws: int) -> dict[str, Any]:
        """The top heads, the bottom ones and random ones."""
        scores, top = self.scores, self.scores.top(SHARE)
        last = self.model.cfg.n_layers - 1
        return self.about | {
            "total": scores.values.size,
            "top_depth": float(np.mean([head.layer for head in top])) / last,
            "clean": self.without(cl.HeadSet([])),
            "top": self.without(top),
            "bottom": self.without(scores.bottom(SHARE)),
            "random": [self.without(scores.random(k=len(top), seed=i)) for i in range(draws)],
        }

    def alone(self, heads: cl.HeadSet) -> list[dict[str, Any]]:
        """Each of these heads masked alone, and its rank by RAM (1: the highest)."""
        values = self.scores.values
        return [
            self.without(cl.HeadSet([head])) | {"rank": 1 + int((values > values[head]).sum())}
            for head in heads
        ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-qs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scored", type=int, default=100)
    parser.add_argument("--tested", type=int, default=200)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--alone", help="heads, for instance L23H3,L20H1")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"models": {}}
    runs = results["models"]
    if options.alone:  # on the scenes of the run that is there
        run = runs[options.model]
        masked = Masked(options.model, run["dtype"], run["scored"], run["tested"])
        run["alone"] = masked.alone(cl.HeadSet(options.alone.split(",")))
    else:
        masked = Masked(options.model, options.dtype, options.scored, options.tested)
        runs[options.model] = masked.sets(options.draws)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
