"""Which pattern keeps accuracy at an equal share of what is seen; full heads against full layers.

    python benchmarks/patterns.py                                    # 0.3, 0.5 and 0.7 of all pairs
    python benchmarks/patterns.py --answered 20 --scored 10 --shares 0.5     # a look

Each pattern has one size that is searched (halving) until the sparse heads see the asked share of
their causal (row, key) pairs, counted on a few of the answered samples. Then the same questions are
answered under it: with no full head, with the top heads by RAM at the last row full, with as many
random heads full, and with whole layers full of as many heads (their means over heads; the number
of heads is that of whole layers). Prints a table and writes benchmarks/results/patterns.json.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import corelens as cl
from corelens.sparse import BlockSparse, IntraImage, PruneVisual, VerticalSlash, full_layers

RESULTS = Path(__file__).parent / "results"
STEPS = 7  # halvings of the search


class Counted:
    """A pattern that counts which share of its causal pairs it leaves, over real tokens."""

    def __init__(self, pattern: Any):
        self.pattern, self.left, self.all = pattern, 0, 0

    def sees(self, prompt: Any, query: Any, key: Any, call: Any) -> Any:
        """The pattern's own, counted."""
        seen = self.pattern.sees(prompt, query, key, call)
        if query.shape[2] == prompt.length:
            batch, heads, length, _ = query.shape
            shape = [torch.arange(n) for n in (batch, heads, length, length)]
            b, h, q, k = torch.meshgrid(*shape, indexing="ij")
            causal = (k <= q) & (k >= prompt.first[b]) & (q < prompt.end[b])
            self.left += int((seen(b, h, q, k) & causal).sum())
            self.all += int(causal.sum())
        return seen


def patterns(scores: Any) -> dict[str, tuple[Callable[[float], Any], float, float]]:
    """{name: (size → pattern, smallest size, largest size)}; a larger size sees more."""
    return {
        "streaming": (lambda x: cl.Streaming(1, max(1, round(x))), 1, 512),
        "intra-image": (lambda x: IntraImage(1, max(1, round(x))), 1, 512),
        "vertical-slash": (
            lambda x: VerticalSlash(max(1, round(x)), max(1, round(x)), 16, 1, 1), 1, 256
        ),
        "block-sparse": (lambda x: BlockSparse(block=8, threshold=x, stride=4), 0.01, 1.0),
        "visual tokens, by score": (lambda x: PruneVisual(scores, x, after=2), 0.01, 1.0),
        "visual tokens, all alike": (lambda x: PruneVisual(None, x, after=2), 0.01, 1.0),
    }  # fmt: skip


def share_of(model: Any, inputs: Any, pattern: Any) -> float:
    """The share of causal pairs that the pattern leaves, over all layers and heads."""
    counted = Counted(pattern)
    with torch.no_grad(), model.sparse(cl.SparseInference((), counted)):
        model(inputs, return_type=None)
    return counted.left / counted.all


def sized(model: Any, inputs: Any, make: Any, low: float, high: float, share: float) -> Any:
    """(pattern, what it leaves) whose share is nearest to the asked one."""
    tried = [(abs(share_of(model, inputs, make(x)) - share), x) for x in (low, high)]
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        left = share_of(model, inputs, make(middle))
        tried.append((abs(left - share), middle))
        low, high = (middle, high) if left < share else (low, middle)
    best = make(min(tried)[1])
    return best, share_of(model, inputs, best)


def main() -> None:
    """Score, size, answer, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3vl-s")
    parser.add_argument("--scored", type=int, default=100)
    parser.add_argument("--answered", type=int, default=200)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--layers", type=int, default=1, help="how many whole layers are full")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    start = time.perf_counter()
    model = cl.load_demo(options.model)
    samples = cl.synthetic("refer", options.scored + options.answered, seed=options.seed)
    scored, answered = samples[: options.scored], samples[options.scored :]
    key = "ram[rows=last]"
    scores = cl.score_heads(model, scored, key, batch_size=options.batch_size)[key]
    layers = full_layers(scores, options.layers)
    count = len(layers)
    top = scores.top(k=count)
    sets: dict[str, Sequence[Any]] = {
        "none": [cl.HeadSet()],
        "heads": [top],
        "layers": [layers],
        "random heads": [scores.random(k=count, seed=n, exclude=top) for n in range(options.draws)],
    }
    inputs, prepared = (
        model.prepare(answered[:4]),
        cl.evaluation.batches(model, answered, options.batch_size),
    )
    rows: list[dict[str, Any]] = []
    for share in options.shares:
        for name, (make, low, high) in patterns(scores).items():
            pattern, left = sized(model, inputs, make, low, high, share)
            for full, drawn in sets.items():
                correct = [
                    cl.evaluate(
                        model, prepared, sparse=cl.SparseInference(heads, pattern), rounds=0
                    ).accuracy
                    for heads in drawn
                ]
                rows.append(
                    {
                        "asked": share,
                        "left": left,
                        "pattern": name,
                        "full": full,
                        "accuracy": correct,
                    }
                )
                mean = sum(correct) / len(correct)
                print(f"{share:.2f} {left:.3f}  {name:<26} {full:<13} {mean:.3f}", flush=True)
    dense = cl.evaluate(model, prepared)
    result = {
        "benchmark": "patterns", "model": options.model, "world": "refer", "seed": options.seed,
        "scored": len(scored), "answered": len(answered), "dense": dense.accuracy,
        "full heads": count,
        "rows": rows, "machine": platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__,
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "patterns.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"dense {dense.interval}; written: {RESULTS / 'patterns.json'}")


if __name__ == "__main__":
    main()
