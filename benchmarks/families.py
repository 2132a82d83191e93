"""What CoreLens does with every multimodal type of the installed transformers.

    python benchmarks/families.py                   # all types; those already in the file are kept
    python benchmarks/families.py --again           # all types, from the beginning
    python benchmarks/families.py glm46v gemma4     # these alone, anew
    python benchmarks/families.py --maps            # their token maps, with the same options

Of each type a tiny model is built, all its parameters random (tests/families), and checked against
plain transformers, in a process that is begun anew where a type takes it down. The rows are written
to benchmarks/results/families.json as they come, so that a run that was stopped goes on where it
was. With --maps, pictures go through the type's image processor, and what the token map says of
them is checked by painting; these rows are in benchmarks/results/token_maps.json.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/results"
LIMIT = 1800  # seconds a type


def measure(types: list[str], maps: bool) -> None:
    """Print the row of each type, in this process: its name first, so that a crash has one."""
    sys.path.insert(0, str(ROOT / "tests"))
    warnings.filterwarnings("ignore")
    import torch

    from families.checks import row_of, verdict
    from families.maps import map_of
    from families.spans import spans_of

    torch.set_num_threads(1)
    for model_type in types:
        print(model_type, flush=True)
        begun = time.process_time()
        row = map_of(model_type) if maps else row_of(model_type)
        row |= {"spans": spans_of(model_type)} if maps else {"verdict": verdict(row)}
        row["seconds"] = round(time.process_time() - begun, 1)
        print(json.dumps(row), flush=True)


def measured_apart(types: list[str], maps: bool) -> Iterator[dict[str, Any]]:
    """The rows of these types, from a process of their own: one that a type takes down is begun
    again behind that type."""
    while types:
        command = [sys.executable, __file__, "--inside", *types, *["--maps"] * maps]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as worker:
            assert worker.stdout is not None
            for model_type in list(types):
                watch = threading.Timer(LIMIT, worker.kill)
                watch.start()
                name, line = worker.stdout.readline().strip(), worker.stdout.readline()
                watch.cancel()
                types = types[1:]
                if name == model_type and line:
                    yield json.loads(line)
                    continue
                worker.kill()
                why = f"it took the process down, or more than {LIMIT} s"
                yield {"type": model_type, "seconds": LIMIT} | (
                    {"token_map": f"none: {why}"}
                    if maps
                    else {"verdict": "not run", "unrunnable": why}
                )
                break


def main(types: list[str], again: bool, maps: bool) -> None:
    """Measure and write, type by type."""
    sys.path.insert(0, str(ROOT / "tests"))
    from families.maps import cost_of_probing
    from families.shrink import TYPES

    versions = {package: version(package) for package in ("transformers", "torch")}
    results = FOLDER / ("token_maps.json" if maps else "families.json")
    before = json.loads(results.read_text()) if results.exists() and not again else {}
    rows = before.get("types", {}) if before.get("versions") == versions or types else {}
    rows = {name: rows[name] for name in sorted(TYPES) if name in rows}
    costs = {"probing": before.get("probing") or cost_of_probing()} if maps else {}
    for row in measured_apart(types or [name for name in sorted(TYPES) if name not in rows], maps):
        rows[row["type"]] = row
        result = row["token_map"][:40] if maps else row["verdict"]
        print(f"{row['type']:26s} {result:40s} {row['seconds']:6.1f} s", flush=True)
        content = {"versions": versions, **costs, "types": dict(sorted(rows.items()))}
        results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--again", action="store_true", help="forget what the file holds")
    parser.add_argument("--maps", action="store_true", help="token maps alone")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure(options.inside, options.maps)
    else:
        main(options.types, options.again, options.maps)
