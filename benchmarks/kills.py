"""What kills do to a result: `corelens score` and `corelens study --quick`, each killed at random
times and started again, against the same command left alone.

    python benchmarks/kills.py                         # ten kills each: about an hour on one core
    python benchmarks/kills.py score --kills 2 --n 24  # a minute

Every file of the two folders is compared byte for byte: parts, work, scores, report.json and
report.html. Left out are the locks. What was measured on a clock (the decoding speed of F7 and F8)
differs between any two runs; it is blanked in both reports, and in the pages drawn from them,
before they are compared.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "kills.json"
COMMANDS = {
    "score": ["score", "internvl-q", "refer", "--batch-size", "4", "--json"],
    "study": ["study", "internvl-q", "--quick", "--json"],
}
CLOCKED = ("F7", "F8")  # findings that time something


def launch(arguments: list[str], out: Path) -> subprocess.Popen:
    """The command, as a process of its own."""
    command = [sys.executable, "-m", "corelens", *arguments, "--out", str(out)]
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ.copy())


def finish(arguments: list[str], out: Path) -> float:
    """Run the command to its end; seconds that it took."""
    start = time.perf_counter()
    code = launch(arguments, out).wait()
    if code:
        raise SystemExit(
            f"exit code {code}:\n{(out.parent / f'{out.name}.log').read_text()[-3000:]}"
        )
    return time.perf_counter() - start


def contents(folder: Path) -> dict[str, Any]:
    """{path: what is compared} of every file in a folder."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in (".lock", "seconds.json"):
            name = file.relative_to(folder).as_posix()
            if file.stem in CLOCKED and file.suffix == ".json":
                files[name] = without_times(json.loads(file.read_bytes()))
            elif file.name == "report.json":
                files[name] = without_times(json.loads(file.read_bytes()))
                files["report.html"] = redrawn(folder, files[name])
            elif file.name != "report.html":
                files[name] = file.read_bytes()
    return files


def without_times(value: Any) -> Any:
    """The same JSON with the measured speeds blanked, and the words that are made of them."""
    if isinstance(value, dict):
        timed = value.get("id") in CLOCKED and "verdict" in value
        clocked = ("speed", "number", "reason", "lesson", "models") if timed else ("speed",)
        return {
            name: None if name in clocked or name == "sha256" else without_times(inner)
            for name, inner in value.items()
        }
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def redrawn(folder: Path, blanked: dict[str, Any]) -> str:
    """The page as it is where nothing was timed, else drawn again from the blanked report."""
    whole = json.loads((folder / "report.json").read_bytes())
    if without_times(whole) == whole:
        return (folder / "report.html").read_text()
    from corelens.findings.result import Study

    with tempfile.TemporaryDirectory() as again:
        data = {
            key: x for key, x in blanked.items() if key not in ("format", "findings", "criteria")
        }
        Study(data).write(Path(again))
        return (Path(again) / "report.html").read_text()


def killed(
    arguments: list[str], out: Path, kills: int, longest: float, rng: random.Random
) -> list[float]:
    """Kill the command so often, then let it end; the seconds after which each kill came."""
    delays: list[float] = []
    while len(delays) < kills:
        process = launch(arguments, out)
        delay = rng.uniform(0, longest)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            delays.append(round(delay, 2))
        else:
            break  # it ended before: what is left of the kills has nothing to stop
    finish(arguments, out)
    return delays


def measure(name: str, kills: int, seed: int, more: list[str], folder: Path) -> dict[str, Any]:
    """One command, left alone and killed."""
    arguments = [*COMMANDS[name], *more]
    whole, stopped = folder / f"{name}-whole", folder / f"{name}-killed"
    seconds = finish(arguments, whole)
    start = finish(arguments, whole)  # all is done: what a start alone takes
    longest = start + 1.5 * max(seconds - start, 0.0) / max(kills, 1)
    delays = killed(arguments, stopped, kills, longest, random.Random(seed))
    left, right = contents(whole), contents(stopped)
    differ = sorted(
        file for file in left.keys() | right.keys() if left.get(file) != right.get(file)
    )
    return {
        "command": "corelens " + " ".join(arguments), "seconds": round(seconds, 1),
        "start": round(start, 1),
        "kills": len(delays), "after_seconds": delays, "files": len(left), "differ": differ,
    }  # fmt: skip


def main() -> None:
    """Print a line a command; exit with 1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", choices=[*COMMANDS, []], help="both by default")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=None, help="samples of each world")
    parser.add_argument("--folder", type=Path, default=None, help="kept, to look at what differs")
    parser.add_argument("--out", type=Path, default=None, help=f"JSON, for instance {RESULTS.name}")
    options = parser.parse_args()
    more = [] if options.n is None else ["--n", str(options.n)]
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.commands or COMMANDS:
            result = measure(name, options.kills, options.seed, more, folder)
            results.append(result)
            print(
                f"{result['command']}: {result['kills']} kills, {len(result['differ'])} of "
                f"{result['files']} files "
                f"differ {result['differ'] or ''}", flush=True,
            )  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["differ"] for result in results))


if __name__ == "__main__":
    main()
