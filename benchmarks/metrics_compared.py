"""Which score finds the heads that matter most? Every metric's own top 5% ablated, on a bundled
demo model.

    python benchmarks/metrics_compared.py  # 200 scenes scored, 300 others answered: minutes
    python benchmarks/metrics_compared.py --scored 40 --answered 60  # a look

Each line: a score, how many of its top heads RAM's default ranking has too, the rank correlation
with it over all heads, and the accuracy on other scenes when these heads are mean-ablated, and when
their edges from the question, the last row and the answer to the evidence are knocked out, each
with its exact 95% interval, and the difference to the clean run, paired, with Newcombe's.
`random`: as many heads outside RAM's top, the mean over several draws.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import corelens as cl
from corelens.evaluation.evaluate import batches, evaluate
from corelens.heads.intervals import accuracy_difference, accuracy_interval

RESULTS = Path(__file__).parent / "results" / "metrics_compared.json"
RAM = [
    "ram",
    "ram[reduce=max]",
    "ram[rows=last]",
    "ram[rows=answer]",
    "ram[rows=answer,reduce=max]",
    "ram[rows=question+last]",
    "ram[rows=question+last,reduce=max]",
    "ram[rows=text]",
    "ram[rows=text,reduce=max]",
]
RIVALS = [
    "calibrated_ram",
    "calibrated_ram[rows=last]",
    "precision",
    "precision[rows=last]",
    "lift",
    "lift[rows=last]",
    "visual_mass",
    "visual_mass[rows=last]",
    "gaze",
    "value_mass",
    "value_mass[rows=last]",
    "qr",
    "localization",
    "retrieval",
    "visual_head",
]


def main() -> None:
    """Score, ablate, print the table, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-s")
    parser.add_argument("--world", default="refer")
    parser.add_argument("--scored", type=int, default=200)
    parser.add_argument("--answered", type=int, default=300)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    start = time.perf_counter()
    model = cl.load_demo(options.model)
    samples = cl.synthetic(options.world, options.scored + options.answered, seed=options.seed)
    scored, answered = samples[: options.scored], samples[options.scored :]
    scores = cl.score_heads(model, scored, RAM + RIVALS, batch_size=20, max_new_tokens=4)
    print(
        f"scored {len(scored)} scenes, {len(scores)} metrics: {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    mean, prepared = cl.mean_z(model, scored), batches(model, answered)
    clean = evaluate(model, prepared).correct
    known: dict[tuple[str, frozenset], np.ndarray] = {}

    def correct(kind: str, heads: cl.HeadSet) -> np.ndarray:
        key = kind, frozenset(heads)
        if key not in known:
            hooks = (
                cl.ablate(heads, "mean", reference=mean) if kind == "mean" else cl.knockout(heads)
            )
            known[key] = evaluate(model, prepared, hooks).correct
        return known[key]

    def cost(sets: list[cl.HeadSet]) -> dict[str, Any]:
        runs = {
            kind: np.mean([correct(kind, heads) for heads in sets], axis=0)
            for kind in ("mean", "knockout")
        }
        return {
            kind: {
                "accuracy": accuracy_interval(run),
                "difference": accuracy_difference(run, clean),
            }
            for kind, run in runs.items()
        }

    ram = scores["ram"]
    results: dict[str, dict[str, Any]] = {}
    for key, score in scores.items():
        agreement = ram.agreement(score, options.fraction)
        top = score.top(options.fraction)
        shared = len(top & ram.top(options.fraction))
        results[key] = {
            "heads": list(map(str, top)),
            "shared_with_ram": shared,
            "spearman": agreement.spearman,
        }
        results[key] |= cost([top])
        print(line(key, results[key]), flush=True)
    k = len(ram.top(options.fraction))
    results["random"] = {"draws": options.draws} | cost(
        [ram.random(k=k, seed=seed) for seed in range(options.draws)]
    )
    print(line("random", results["random"]))
    result = {
        "benchmark": "metrics_compared",
        "model": options.model,
        "weight_hash": ram.meta["weight_hash"],
        "world": options.world,
        "seed": options.seed,
        "scored": len(scored),
        "answered": len(answered),
        "k": k,
        "clean": accuracy_interval(clean),
        "versions": ram.meta["versions"],
        "cores": os.cpu_count(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "scores": dict(sorted(results.items(), key=lambda item: item[1]["mean"]["accuracy"].value)),
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False, default=str))
    print(
        f"\nclean accuracy {result['clean']}; by accuracy after mean-ablating each score's own top "
        f"{k} heads:\n"
    )
    for key, score in result["scores"].items():
        print(line(key, score))


def line(key: str, score: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{key:<36}"]
    cells.append(
        f"{score['shared_with_ram']} shared, ρ {score['spearman']:+.2f}"
        if "spearman" in score
        else " " * 16
    )
    for kind in ("mean", "knockout"):
        value, low, high = score[kind]["difference"]
        cells.append(
            f"{kind} {score[kind]['accuracy'].value:.3f} ({value:+.3f} [{low:+.3f}, {high:+.3f}])"
        )
    return " | ".join(cells)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    main()
