"""Two runs that can be compared token by token."""

from typing import Any

import torch

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM


def as_inputs(model: HookedMLLM, data: Any) -> Inputs:
    """Inputs from Inputs, a Sample or a list of Samples."""
    if isinstance(data, Inputs):
        return data
    if isinstance(data, Sample) or (
        isinstance(data, list | tuple) and data and isinstance(data[0], Sample)
    ):
        return model.prepare(data)
    raise CorelensError(
        f"a {type(data).__name__} to patch",
        "inputs, a Sample, or a list of them",
        "make inputs with model.prepare(sample)",
    )


def check_pair(clean: Inputs, corrupted: Inputs) -> None:
    """Raise unless each position means the same in both: lengths, padding, and where the visual
    tokens stand."""
    if len(clean) != len(corrupted):
        raise CorelensError(
            f"{len(clean)} clean and {len(corrupted)} corrupted samples",
            "as many of both, in the same order",
            "pair them",
        )
    for i, (a, b) in enumerate(zip(clean.token_maps, corrupted.token_maps, strict=True)):
        where = f"sample {a.id or i!r}"
        counts = (int(a.real.sum()), int(b.real.sum()))
        if counts[0] != counts[1] or len(a.placeholder) != len(b.placeholder):
            position = _first_difference(clean, corrupted, i)
            raise CorelensError(
                f"{where}: {counts[0]} tokens of which {len(a.placeholder)} are visual, and "
                f"{counts[1]} of which "
                f"{len(b.placeholder)} are visual in its corrupted twin; they part at token "
                f"{position}",
                "twins of the same length and token grid",
                "change the picture without its size (cl.counterfactual), a text by one of as "
                "many tokens",
            )
        if not torch.equal(a.placeholder, b.placeholder) or not torch.equal(a.real, b.real):
            position = _first_difference(clean, corrupted, i)
            raise CorelensError(
                f"{where}: the visual tokens or the padding stand at other positions in its "
                "corrupted twin (from "
                f"{position} on)",
                "twins whose tokens stand at the same positions",
                "keep the text before the picture as it is, and prepare both batches with the "
                "same padding",
            )
    for name in ("image_grid_thw", "video_grid_thw"):
        grids = clean.tensors.get(name), corrupted.tensors.get(name)
        if (
            grids[0] is not None
            and grids[1] is not None
            and not torch.equal(grids[0].cpu(), grids[1].cpu())
        ):
            raise CorelensError(
                f"{name} {grids[0].tolist()} and {grids[1].tolist()}",
                "the same grid",
                "keep the picture's size and shape",
            )


def _first_difference(clean: Inputs, corrupted: Inputs, i: int) -> int:
    """The first token, counted without padding, in which two samples differ by kind."""
    a, b = (
        torch.isin(tm.all, tm.placeholder).tolist()
        for tm in (clean.token_maps[i], corrupted.token_maps[i])
    )
    return next(
        (position for position, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )
