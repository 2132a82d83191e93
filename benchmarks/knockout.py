"""The README's number: what a model loses when its best heads no longer see the evidence, and when
others do not.

    python benchmarks/knockout.py  # 100 scenes score, 250 others test
    python benchmarks/knockout.py --model qwen3vl-s     # a model that reads at its last row
    python benchmarks/knockout.py --scored 20 --answered 30 --draws 3 --out look.json

The evidence (the tokens of the asked shape) is cut off from heads at the question's tokens, the
last row and the answer's rows (`cl.knockout`): from the top 5% by RAM as published (question rows),
the top 5% by RAM of the last row, and 100 seeded draws of as many heads outside the top of the rows
at which the model reads. `cl.where_read` says which these are, before any head is ranked, on the
scenes that score. Accuracies with their 95% intervals; a model at a time, beside the others.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import corelens as cl
from corelens.demo import DEFAULT
from corelens.evaluation.evaluate import batches

RESULTS = Path(__file__).parent / "results" / "knockout.json"


def main() -> None:
    """Score, cut, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--world", default="refer")
    parser.add_argument("--scored", type=int, default=100)
    parser.add_argument("--answered", type=int, default=250)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.process_time()
    model = cl.load_demo(options.model)
    samples = cl.synthetic(options.world, options.scored + options.answered, seed=options.seed)
    scored, prepared = samples[: options.scored], batches(model, samples[options.scored :])
    costs = cl.where_read(model, scored, tokens=False)
    if costs.rows not in ("question", "last") or not costs.hurts(costs.rows):
        raise SystemExit(f"{options.model} reads neither at the question's rows nor last: {costs}")
    scores = cl.score_heads(model, scored, ["ram", "ram[rows=last]"], batch_size=20)

    def without(heads: cl.HeadSet) -> dict[str, Any]:
        evaluation = cl.evaluate(model, prepared, hooks=cl.knockout(heads))
        return {
            "heads": list(map(str, heads)),
            "accuracy": evaluation.accuracy,
            "ci": list(evaluation.ci),
        }

    clean = cl.evaluate(model, prepared)
    result: dict[str, Any] = {
        "weight_hash": scores["ram"].meta["weight_hash"],
        "parameters": sum(weights.numel() for weights in model.hf.parameters()),
        "layers": model.cfg.n_layers,
        "heads": model.cfg.n_heads,
        "world": options.world,
        "seed": options.seed,
        "scored": options.scored,
        "answered": options.answered,
        "versions": scores["ram"].meta["versions"],
        "read_at": costs.rows,
        "clean": {"accuracy": clean.accuracy, "ci": list(clean.ci)},
        "top": {},
        "random": [],
    }
    for key, ranking in scores.items():
        result["top"][key] = without(ranking.top(0.05))
        print(key, result["top"][key], flush=True)
    best = scores[cl.metric("ram", rows=costs.rows).key]
    for seed in range(options.draws):
        result["random"].append(without(best.random(k=len(best.top(0.05)), seed=seed)))
        print("random", seed, result["random"][-1], flush=True)
    result["processor_minutes"] = round((time.process_time() - start) / 60, 1)
    results = json.loads(options.out.read_text()) if options.out.is_file() else {"models": {}}
    results["models"][options.model] = result
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False, default=str) + "\n")
    worst, right = min(draw["accuracy"] for draw in result["random"]), result["clean"]["accuracy"]
    print(f"read at {costs.rows}; clean {right:.3f}; random heads leave {worst:.3f} or more")


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    main()
