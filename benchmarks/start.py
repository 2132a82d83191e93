"""How long the command line takes to answer where no model is needed.

    python benchmarks/start.py              # some seconds
    python benchmarks/start.py --rounds 1   # a look

Each command is a process of its own, in a folder with a finished run of two metrics (8 layers × 12
heads, 200 samples) and 20 samples of the world `refer`. What counts is its processor time, user and
system together, which other programs on the machine change little; the clock stands beside it. The
first round, which may compile, is not counted.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import corelens as cl

RESULTS = Path(__file__).parent / "results" / "start.json"
COMMANDS = {
    "corelens --version": ["-m", "corelens", "--version"],
    "corelens --help": ["-m", "corelens", "--help"],
    "corelens score --help": ["-m", "corelens", "score", "--help"],
    "corelens heads run": ["-m", "corelens", "heads", "run"],
    "corelens compare run other": ["-m", "corelens", "compare", "run", "other"],
    "corelens data check samples": ["-m", "corelens", "data", "check", "samples"],
}


def main() -> None:
    """Time every command, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder))
        times: dict[str, Any] = {name: [] for name in COMMANDS}
        for counts in [False] + [True] * options.rounds:
            for name, arguments in COMMANDS.items():
                measured = timed(arguments, folder)
                times[name] += [measured] * counts
    commands = {}
    for name, of_command in times.items():
        processor, clock = (sorted(column) for column in zip(*of_command, strict=True))
        middle = len(processor) // 2
        commands[name] = {
            "processor_seconds": round(processor[middle], 3),
            "range": [round(processor[0], 3), round(processor[-1], 3)],
            "clock_seconds": round(clock[middle], 3),
        }
        print(f"{name}: {processor[middle]:.2f} s of processor time, {clock[middle]:.2f} s")
    result = {
        "command": "python benchmarks/start.py",
        "rounds": options.rounds,
        "machine": f"CPU {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "corelens": cl.__version__,
        "commands": commands,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_files(folder: Path) -> None:
    """Two runs and a folder of samples."""
    from corelens.data import save_samples
    from corelens.data.synthetic import synthetic
    from corelens.heads.scores import HeadScores

    rng = np.random.default_rng(0)
    for run in ("run", "other"):
        for key in ("ram", "lift"):
            per_sample = rng.random((200, 8, 12)).astype(np.float32)
            scores = HeadScores(per_sample=per_sample, meta={"key": key, "metric": key})
            scores.save(folder / run / "scores" / f"{key}.safetensors")
    save_samples(synthetic("refer", 20, seed=1), folder / "samples")


def timed(arguments: list[str], folder: str) -> tuple[float, float]:
    """(processor time, time on the clock) of a process, in seconds."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return usage.ru_utime + usage.ru_stime, clock


if __name__ == "__main__":
    main()
