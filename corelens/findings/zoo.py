"""The study on several models, one after the other: each on its own worlds, in a folder of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corelens.inputs.prepare import Sample

SETTINGS: dict[str, Any] = {
    "fractions": (0.02, 0.05, 0.1), "sweep_kinds": ("knockout",), "kept": (0.05, 0.1, 0.2), "windows": 3,
    "sparse_samples": 60, "score_share": 0.4, "scenes": 2,
}  # fmt: skip
TOKENS, LEAST = 256, 40


def affordable(model: Any, samples: Sequence[Sample]) -> list[Sample]:
    """So many of the samples that every world takes about as long: all where prompts have 256 tokens, at least 40."""
    few = model.prepare(list(samples[:8]))
    tokens = float(np.median([len(token_map.all) for token_map in few.token_maps]))
    return list(samples[: max(LEAST, round(len(samples) * min(1.0, TOKENS / tokens)))])


def zoo(
    names: Sequence[str],
    open_model: Callable[[str], Any],
    worlds: Callable[[str], Mapping[str, Sequence[Sample]]],
    out: Path,
    asked: str = "",
    **settings: Any,
) -> Iterator[Any]:
    """A study of each model in out/<name>, resumed where it stopped; the models in memory one at a time.

    Args:
        names: of the models, as `open_model` takes them; the last part of each is its folder.
        worlds: {world: samples} of a model by its name.
        asked: what else the command said, for the reports.
        settings: for `corelens.findings.study`.
    """
    from corelens.findings import study

    for name in names:
        label, model = Path(name).name, open_model(name)
        data = {world: affordable(model, samples) for world, samples in worlds(name).items()}
        command = f"corelens study {name} --zoo{asked} --seed {settings.get('seed', 0)}"
        yield study({label: model}, data, out=out / label, command=command, **SETTINGS | settings)
