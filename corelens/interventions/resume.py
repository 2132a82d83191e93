"""Patches kept in a run folder: a run that was stopped goes on, and several processes share it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Sample
from corelens.interventions.result import PatchResult
from corelens.runs.digest import digest
from corelens.runs.folder import RunFolder, run_folder
from corelens.runs.processes import Piece, carry_out, is_first
from corelens.runs.provenance import hook_identity, model_identity, refuse_active, sample_hash

Patching = Callable[[Sequence[Sample], Sequence[Sample]], PatchResult]


def patched_in(
    out: str | Path,
    model: Any,
    clean: Any,
    corrupted: Any,
    patching: Patching,
    batch_size: int,
    hooks: Sequence[Hook],
    options: dict[str, Any],
    progress: bool = False,
) -> PatchResult:
    """The result of all pairs, a batch of them after the other; the first process also writes it to
    `result.safetensors`.

    Args:
        out: the run folder.
        clean, corrupted: samples, as many of both.
        patching: patches the pairs of one batch.
        batch_size: pairs a batch.
        hooks: to run under.
        options: all else that decides the numbers (what is no JSON stands there by its contents).
    Raises:
        CorelensError: prepared inputs instead of samples; axes that differ between batches; a
            folder of another run.
    """
    sides = [[side] if isinstance(side, Sample) else side for side in (clean, corrupted)]
    if not all(isinstance(side, list | tuple) and side for side in sides) or not all(
        isinstance(sample, Sample) for side in sides for sample in side
    ):
        raise CorelensError(
            "out= with prepared inputs",
            "samples, clean and corrupted: they say which run this is, and make batches",
            "give the lists of samples, or leave out= away",
        )
    if len(sides[0]) != len(sides[1]):
        raise CorelensError(
            f"{len(sides[0])} clean and {len(sides[1])} corrupted samples",
            "as many of both, in the same order",
            "pair them",
        )
    refuse_active(model)
    identity = model_identity(model) | {
        "sample_hash": sample_hash(sides[0]),
        "corrupted_hash": sample_hash(sides[1]),
        "n": len(sides[0]),
        "batch_size": batch_size,
        "hooks": hook_identity(hooks),
        "options": {name: digest(value) for name, value in options.items()},
    }
    with run_folder(out, identity) as folder:
        files, pieces = [], []
        for start in range(0, len(sides[0]), batch_size):
            pairs = [side[start : start + batch_size] for side in sides]
            files.append(folder.path / f"pairs-{start:08d}.safetensors")
            make = partial(_patch, folder, files[-1], patching, *pairs)
            pieces.append(Piece(files[-1], len(pairs[0]), make))
        carry_out(folder.claims, pieces, progress, unit="pair")
        result = _joined(folder, files)
        if is_first():
            result.save(folder.path / "result.safetensors")
    return result


def _patch(
    folder: RunFolder,
    file: Path,
    patching: Patching,
    clean: Sequence[Sample],
    corrupted: Sequence[Sample],
) -> None:
    result = patching(clean, corrupted)
    result.meta["run"] = folder.digest
    result.save(file)


def _joined(folder: RunFolder, files: Sequence[Path]) -> PatchResult:
    """The batches' results as one."""
    parts = [PatchResult.load(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.meta.pop("run", None) != folder.digest:
            raise CorelensError(
                f"{file}, which belongs to another run",
                "what this run wrote",
                "delete it and start the run again: what is missing is computed",
            )
        if part.axes != parts[0].axes:
            axis = next(name for name in part.axes if part.axes[name] != parts[0].axes[name])
            raise CorelensError(
                f"an axis {axis!r} whose labels differ between batches ({files[0].name}, "
                f"{file.name})",
                "the same places in every sample",
                "patch by layer, head or role; by position only prompts of one length",
            )
    return PatchResult(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.base for part in parts]),
        np.concatenate([part.other for part in parts]),
        parts[0].axes,
        [sample for part in parts for sample in part.samples],
        parts[0].meta,
    )
