"""Are the CoRe heads the ones that sparse inference must keep? The top heads full, against as many
others full.

    python benchmarks/sparse_contrast.py    # the whole of it: an hour on one slow core
    python benchmarks/sparse_contrast.py --answered 24 --captioned 8    # a look

About 1,000 visual tokens:

    python benchmarks/sparse_contrast.py --model qwen3vl-m --name sparse_contrast_long \\
        --sides 960 1024 --objects 24 --scored 30 --answered 80 --captioned 0 --fractions 0.05 \\
        --windows 16 64 256 --sink 4 --batch-size 8 --picture docs/images/sparse_contrast_long.png

Part 1, `pattern`: questions of the world `refer`. Heads are ranked by RAM at the question's rows
and at the last row, on other scenes; the top share attends fully, the others see the first `sink`
tokens and a window, no row of the prompt excepted (`last=0`). Controls: bottom heads, random heads
(several draws), random heads of the same layers, none.

Part 2, `kv_budget`: every head attends fully over the prompt, then each KV head keeps its share of
the keys while a caption ("List every object.") is written: its first token is predicted before
anything is evicted, so answers of one token could not show anything. Shares by RAM, by visual-head
score, even, and dealt to other heads; as many keys in all. The measure is the log-probability of
the gold caption (this model writes few captions without a slip).

Writes the numbers, and every paired difference with its 95% interval.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

import corelens as cl
from corelens.evaluation.contrast import SparseContrast, budget_contrast, sparse_contrast

ROOT = Path(__file__).parents[1]
RANKINGS = {"RAM (question rows)": "ram", "RAM (last row)": "ram[rows=last]"}


def main() -> None:
    """Score, keep, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-s")
    parser.add_argument(
        "--sides", type=int, nargs=2, help="smallest and largest side of a scene, in pixels"
    )
    parser.add_argument("--objects", type=int, default=6)
    parser.add_argument("--scored", type=int, default=100)
    parser.add_argument("--answered", type=int, default=200)
    parser.add_argument("--captioned", type=int, default=64, help="0 leaves part 2 out")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--name", default="sparse_contrast", help="of the JSON file")
    parser.add_argument("--picture", type=Path, help="draw part 1 into this file")
    options = parser.parse_args()
    start = time.perf_counter()
    model = cl.load_demo(options.model)
    scenes = {"objects": options.objects} | (
        {"sides": tuple(options.sides)} if options.sides else {}
    )
    samples = cl.synthetic("refer", options.scored + options.answered, seed=options.seed, **scenes)
    scored, answered = samples[: options.scored], samples[options.scored :]
    scores = cl.score_heads(model, scored, list(RANKINGS.values()), batch_size=options.batch_size)
    print(f"scored: {time.perf_counter() - start:.0f} s", flush=True)
    result = {
        "benchmark": "sparse_contrast",
        "model": options.model,
        "world": "refer",
        "seed": options.seed,
    }
    result |= {"scenes": scenes, "scored": len(scored), "visual_tokens": _range(model, answered)}

    def done(part: SparseContrast, metric: str) -> None:
        result[part.kind] = part.to_json()
        result["minutes"] = round((time.perf_counter() - start) / 60, 1)
        text = json.dumps(result, indent=1, ensure_ascii=False, default=str)
        (ROOT / "benchmarks" / "results" / f"{options.name}.json").write_text(text)
        print(f"\n{part.kind}: dense {part.dense}")
        for p in part.points:
            share = "" if p.share is None else f"{p.share:.0%}"
            print(f"{p.line:<42} {share:>4} {p.x:>4}  {getattr(p, metric)}", flush=True)

    pattern = sparse_contrast(
        model,
        answered,
        {name: scores[key] for name, key in RANKINGS.items()},
        fractions=options.fractions,
        windows=options.windows,
        sink=options.sink,
        draws=options.draws,
        seed=options.seed,
        progress=True,
        batch_size=options.batch_size,
    )
    done(pattern, "accuracy")
    if options.picture:
        pattern.plot("accuracy").savefig(options.picture)
    if not options.captioned:
        return
    captions = [captioned(sample) for sample in scored]
    asked_to_list = [captioned(sample) for sample in answered[: options.captioned]]
    of_captions = cl.score_heads(
        model, captions, ["ram[rows=answer]", "visual_head"], batch_size=20, max_new_tokens=48
    )
    shares = {
        "RAM (last row, questions)": scores["ram[rows=last]"],
        "RAM (answer rows)": of_captions["ram[rows=answer]"],
        "visual head": of_captions["visual_head"],
    }
    budgets = budget_contrast(
        model,
        asked_to_list,
        shares,
        options.budgets,
        window=8,
        draws=options.draws,
        seed=options.seed,
        progress=True,
    )
    done(budgets, "answer_logprob")


def _range(model: cl.HookedMLLM, samples: list[cl.Sample]) -> list[int]:
    """Fewest and most visual tokens."""
    counts = [len(model.prepare(sample).token_maps[0].visual) for sample in samples]
    return [min(counts), max(counts)]


def captioned(sample: cl.Sample) -> cl.Sample:
    """The same picture with the question that this model was trained to answer at length."""
    objects = sorted(
        sample.meta["objects"], key=lambda o: (o["box"][0] + o["box"][2], o["box"][1] + o["box"][3])
    )
    names = [f"{o['colour']} {o['kind']} {o['digit']}" for o in objects]
    regions = [cl.Box(*o["box"], text=name) for o, name in zip(objects, names, strict=True)]
    return cl.Sample(
        images=sample.images,
        question="List every object.",
        answer=", ".join(names) + ".",
        regions=regions,
        id=sample.id,
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    main()
