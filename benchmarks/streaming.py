"""How much memory a stream of samples takes: scores of 100,000 made samples on a tiny model.

    python benchmarks/streaming.py                  # 100,000 samples
    python benchmarks/streaming.py --n 2000         # a look

The samples are made one after the other: a few small pictures with digits in cells, each with a
name of its own. The model is hand-built (corelens.testbed), its answers known. What is measured is
what grows with the number of samples: the resident memory of the process after each tenth of the
stream. Writes benchmarks/results/streaming.json.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import corelens as cl
from corelens.testbed.model import core_model
from corelens.testbed.pictures import samples as boards

RESULTS = Path(__file__).parent / "results"


def stream(n: int, seen: list[dict[str, Any]], start: float) -> Iterator[cl.Sample]:
    """Samples one after the other; after each tenth the memory is noted."""
    made = boards(16, seed=0)
    for number in range(n):
        if number % max(1, n // 10) == 0:
            seen.append(
                {"samples": number, "rss_mb": resident(), "seconds": time.perf_counter() - start}
            )
        yield replace(made[number % len(made)], id=f"made-{number}", meta={"number": number})


def resident() -> float:
    """Memory that the process holds, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    """Stream, note, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="the run folder; a temporary one by default")
    options = parser.parse_args()
    model, seen, start = core_model(), [], time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary) / "run"
        scores = cl.score_heads(
            model, stream(options.n, seen, start), ["ram"], batch_size=options.batch_size, out=out
        )["ram"]
        seconds = time.perf_counter() - start
        seen.append({"samples": options.n, "rss_mb": resident(), "seconds": seconds})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    result = {
        "benchmark": "streaming", "n": options.n, "batch_size": options.batch_size,
        "seconds": seconds,
        "peak_rss_mb": peak, "run_folder_mb": size, "seen": seen, "top": str(scores.top(k=1)),
        "machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__,
    }  # fmt: skip
    for row in seen:
        print(f"{row['samples']:>8} samples  {row['rss_mb']:7.0f} MB  {row['seconds']:6.0f} s")
    print(
        f"peak {peak:.0f} MB, {options.n / seconds:.0f} samples a second, run folder {size:.1f} MB"
    )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "streaming.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
