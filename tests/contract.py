"""The contract suite: what CoreLens needs of transformers, tokenizers and TransformerLens, over all
families' tiny models.

    python tests/contract.py --transformers 5.17.0    # also --tokenizers and --transformer-lens
    python tests/contract.py --lowest       # the lowest versions that pyproject.toml allows
    python tests/contract.py --newer        # what the registry has above our cap: news, no error

It makes an environment of its own, which holds these packages and borrows all others, torch among
them, from the environment that runs it, and runs there the tests named below. What else is given is
handed to pytest (-n 2, -k …).
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUITE = {
    "undocumented parts, each by its name": ["test_hf.py"],
    "parity, rows, generate": ["test_families.py", "test_families_hooks.py"],
    "pictures": ["test_vision.py"],
    "caches": ["test_cache.py"],
    "replay": ["test_patching.py"],
    "sparse": ["test_sparse.py", "test_ragged.py"],
}
# speak of the project, not of what is installed
OURS = ["test_the_installed_versions_are_in_the_tested_range"]
# What a transformers itself cannot run, unhooked: {the start of its version: {family or test:
# why}}.
IN_PARTS = "it loses the positions of a Qwen-VL prompt that generate() takes in parts"
SOFTCAP = "its SDPA drops the cap on attention logits, which the self-check refuses"
BROKEN = {
    "5.17.": {
        "softcap": SOFTCAP,
        "test_a_prompt_may_come_in_parts": IN_PARTS,
        "test_what_a_cache_cannot_do": IN_PARTS,
    },
    "5.20.": {
        "softcap": SOFTCAP,
        "test_a_prompt_may_come_in_parts": IN_PARTS,
        "smolvlm": (
            "it cuts the tokens of all tiles into rows of patch_size, which our tiles of 4 do not "
            "fill"
        ),
    },
}
# tokenizers' lowest is that of the lowest transformers
LOWEST = {"transformers": "5.17.0", "tokenizers": "0.23.1", "transformer-lens": "4.2.0"}
LIMIT = 900  # seconds for pip, and for a run that is only news


class Refused(Exception):
    """pip could not install what was asked for."""


def environment(folder: Path, wanted: list[str], *options: str) -> Path:
    """A new environment with these requirements and all of ours; its Python. Refused, with pip's
    last line, if it fails."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = Path(_ask(python, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    own.joinpath("borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        *options,
        *wanted,
    ]
    done = subprocess.run(command, cwd=folder, timeout=LIMIT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip().rsplit("\n", 1)[-1])
    return python


def _ask(python: Path, code: str) -> str:
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def run(python: Path, options: list[str], limit: float | None = None) -> int:
    """The suite under this Python: pytest's exit code."""
    names = ["torch", "transformers", "tokenizers", "transformer-lens", "accelerate"]
    code = (
        f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in "
        f"{names}))"
    )
    print(f"contract with {_ask(python, code)}", flush=True)
    print("\n".join(f"  {part}: {', '.join(files)}" for part, files in SUITE.items()), flush=True)
    files = [str(ROOT / "tests" / name) for part in SUITE.values() for name in part]
    installed = _ask(
        python, "from importlib.metadata import version; print(version('transformers'))"
    )
    left_out = list(OURS)
    for start, cases in BROKEN.items():
        for name, why in cases.items() if installed.startswith(start) else ():
            left_out.append(name)
            print(
                f"  left out: {name}, which this transformers cannot run unhooked ({why})",
                flush=True,
            )
    leave = " and ".join(f"not {name}" for name in left_out)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-k", leave, *options, *files]
    # (the package itself comes from this checkout, wherever an installed one lies)
    variables = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return subprocess.run(command, cwd=ROOT, env=variables, timeout=limit).returncode


def cap() -> str:
    """The first version of transformers that pyproject.toml does not allow."""
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(text for text in wanted if text.startswith("transformers>")).rsplit("<", 1)[1]


def news(options: list[str]) -> None:
    """The suite with the newest transformers above the cap, if there is one; whatever comes of it
    is printed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = environment(
                Path(folder), [f"transformers>={cap()}"], "--retries", "1", "--timeout", "30"
            )
        except (Refused, subprocess.SubprocessError, OSError) as error:
            print(f"news: no transformers {cap()} or later can be installed from here ({error})")
            return
        try:
            code = run(python, options, LIMIT)
        except (subprocess.SubprocessError, OSError) as error:
            print(f"news: the contract suite did not end ({type(error).__name__})")
        else:
            print(
                "news: above the cap the contract "
                f"{'holds: lift it' if code == 0 else 'is broken, see above'}"
            )


def main() -> int:
    """Run it as the command line says; pytest's exit code, and 0 for what is only news."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for package in LOWEST:
        parser.add_argument(f"--{package}", metavar="VERSION")
    parser.add_argument("--lowest", action="store_true")
    parser.add_argument("--newer", action="store_true")
    arguments, options = parser.parse_known_args()
    asked = {package: getattr(arguments, package.replace("-", "_")) for package in LOWEST}
    versions = {package: version for package, version in asked.items() if version}
    if arguments.newer:
        news(options)
        return 0
    if arguments.lowest:
        versions = LOWEST | versions
    if not versions:
        parser.error("name a version: --transformers 5.17.0, --lowest or --newer")
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = environment(
                Path(folder), [f"{package}=={version}" for package, version in versions.items()]
            )
        except Refused as error:
            sys.exit(f"pip: {error}")
        return run(python, options)


if __name__ == "__main__":
    sys.exit(main())
