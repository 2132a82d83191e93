"""Which public sets there are, and which of them a folder holds."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from corelens.data import (
    mlvu,
    mm_niah,
    mmdocir,
    mmlongbench,
    mmlongbench_doc,
    refcocog,
    videomme,
    vidstg,
)
from corelens.data.files import take
from corelens.data.folder import FILE, load_samples
from corelens.data.synthetic import synthetic, worlds
from corelens.errors import CorelensError, did_you_mean
from corelens.inputs.sample import Sample

SETS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (refcocog, vidstg, mmdocir, mmlongbench_doc, mmlongbench, mlvu, mm_niah, videomme)
}


def recognise(path: str | Path) -> str:
    """Which set a folder holds: a name of `SETS`, or "corelens" for a folder in CoreLens's own
    format.

    Raises:
        CorelensError: none that is known, with what was looked for.
    """
    root = Path(path)
    if (root / FILE).is_file() or (root.is_file() and root.suffix == ".jsonl"):
        return "corelens"
    names = [name for name, module in SETS.items() if module.recognised(root)]
    if len(names) == 1:
        return names[0]
    inside = sorted(entry.name for entry in root.iterdir())[:8] if root.is_dir() else []
    holds = "is a file" if root.is_file() else f"holds {inside or 'nothing'}"
    raise CorelensError(
        f"{root}, with the marks of {' and '.join(names)}" if names else f"{root}, which {holds}",
        f"a folder with {FILE}, or a copy of one of {', '.join(SETS)}",
        "give each set a folder of its own, laid out as docs/data.md says",
    )


def split_options(name: str | Path) -> tuple[str, dict[str, Any]]:
    """ "video:grid=16" → ("video", {"grid": 16}); values are JSON ("sides=[960,1024]") or else
    words ("split=test")."""
    base, _, written = str(name).partition(":")
    if Path(name).exists() or not re.match(r"\w+=", written):
        return str(name), {}

    def value(text: str) -> Any:
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            return text
        return tuple(parsed) if isinstance(parsed, list) else parsed

    pairs = [part.partition("=") for part in re.split(r",(?=\w+=)", written)]
    return base, {key: value(text) for key, _, text in pairs}


def load_data(
    name: str | Path, n: int | None = None, seed: int | None = None, **options: Any
) -> list[Sample]:
    """Samples from a synthetic world, a folder in CoreLens's format, or your copy of a public set.

    Args:
        name: a world (`cl.synthetic`'s), or a path; options may follow, as on the command line:
            "video:grid=16".
        n: how many; all by default (200 of a world).
        seed: of the world's scenes (1 by default); for a folder, draw the n at random instead of
            taking the first.
        options: the loader's own, for instance split="test" (see docs/data.md).

    Raises:
        CorelensError: no such world or folder; a folder that holds no set that is known, or half of
            one.
    """
    name, written = split_options(name)
    options = written | options
    if name in worlds() and not Path(name).exists():
        return synthetic(name, 200 if n is None else n, seed=1 if seed is None else seed, **options)
    if not Path(name).exists():
        raise CorelensError(
            f"the data {name!r}",
            f"one of the worlds {', '.join(worlds())}, a folder with {FILE}, or a copy of "
            f"{', '.join(SETS)}",
            did_you_mean(str(name), worlds(), "check the name"),
        )
    kind = recognise(name)
    if kind == "corelens":
        return take(load_samples(name, **options), n, seed)
    return getattr(SETS[kind], kind)(name, n=n, seed=seed, **options)
