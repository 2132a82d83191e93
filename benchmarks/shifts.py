"""Out of distribution: the same scenes in another style, and whether the same heads still matter.

    python benchmarks/shifts.py qwen3vl-qs internvl-q qwen3vl-s     # a few minutes a model
    python benchmarks/shifts.py smol-vlm --dtype bfloat16

Of each model heads are ranked once on plain scenes of `refer`, by RAM at the rows that its answers
hang on (`where_read`). Under each shift of `cl.data.SHIFTS`: exact match on 200 scenes that no
recipe used, the same with those top 5% masked, and the share of the top 5% that a ranking made
under the shift has in common with it. Writes JSON to benchmarks/results/, a model at a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import corelens as cl
from corelens.data import shifted
from corelens.demo import read_card

OUT = Path(__file__).parent / "results/shifts.json"
SHARE, SEED = 0.05, 51


def measure(name: str, tested: int, scored: int, batch_size: int, dtype: str) -> dict[str, Any]:
    """What one model does under each shift."""
    model = cl.load_demo(name, dtype=dtype)
    card = read_card(name)["held_out"]
    # the sides that tiles need; of smol-vlm, one object
    options = next(x.get("options", {}) for x in card if x["world"] == "refer")
    to_rank = cl.synthetic("refer", scored, seed=SEED, **options)
    to_test = cl.synthetic("refer", tested, seed=SEED + 1, **options)
    costs = cl.where_read(model, to_rank, tokens=False, batch_size=batch_size)
    rows = "last" if "last" in costs.rows else "question"
    key = cl.metric("ram", rows=rows).key

    def top(samples: list[cl.Sample]) -> cl.HeadSet:
        return cl.score_heads(model, samples, [key], batch_size=batch_size)[key].top(SHARE)

    def answered(samples: list[cl.Sample], heads: cl.HeadSet | None = None) -> dict[str, Any]:
        hooks = cl.ablate(heads, "zero") if heads else []
        result = cl.evaluate(model, samples, hooks=hooks, batch_size=batch_size)
        return {"accuracy": result.accuracy, "ci": list(result.ci), "n": len(samples)}

    ranked, shifts = top(to_rank), {}
    for shift in ("none", *cl.data.SHIFTS):
        test = to_test if shift == "none" else shifted(to_test, shift)
        shifts[shift] = answered(test) | {"without_top": answered(test, ranked)}
        if shift not in ("question-first", "named"):  # no row after the picture, or no region
            own = ranked if shift == "none" else top(shifted(to_rank, shift))
            shifts[shift]["same_heads"] = len(own & ranked) / len(ranked)
        print(name, shift, shifts[shift], flush=True)
    return {
        "rows": rows,
        "options": options,
        "dtype": dtype,
        "heads": ranked.to_json(),
        "scored": scored,
        "shifts": shifts,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--scored", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    for name in options.models:
        results = json.loads(options.out.read_text()) if options.out.is_file() else {"models": {}}
        results |= {"benchmark": "shifts", "world": "refer", "share": SHARE, "seed": SEED}
        how = (options.n, options.scored, options.batch_size, options.dtype)
        results["models"][name] = measure(name, *how)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
