"""One run of a model under its hooks: what is wired for it, and what its hooks may know."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import rows_asked_for
from corelens.hooks.running import Running, Step, turn
from corelens.inputs.prepare import Inputs
from corelens.model.self_check import self_check
from corelens.model.wiring import wired
from corelens.tokens.positions import Where, resolve, within


@contextmanager
def hooked_run(
    model: Any, batch: Inputs, rows: Where | None, generating: bool = False
) -> Iterator[Running]:
    """Wire the active points for one run; without any, the Hugging Face model runs as it is.

    Args:
        model: a HookedMLLM.
        batch: what it is to run on.
        rows: what `hook_pattern_rows` reads; None: what the functions there ask for.
        generating: the decoder is called once a token.
    """
    with turn(model.hf):
        active = [point for point in model.hook_points() if point.active]
        plan = model.sparse_plan()
        run = Running(batch, sparse_plan=plan, generating=generating, heads=model.cfg.heads)
        if not active and plan is None:
            yield run
            return
        if not model.checked:
            silent = self_check(model, batch)
            model.checked = True
            model.refuse(silent)
            _refuse_hooked(active, silent)
        run.points = frozenset(str(point.name) for point in active)
        asked = rows_asked_for(active)
        rows_read = rows if asked and rows is not None else asked

        def begin(tokens: Tensor, so_far: int, cached: bool) -> Step:
            positions = torch.arange(so_far, so_far + tokens.shape[1], device=tokens.device)
            read = None
            if rows_read is not None:
                read = within(
                    resolve(rows_read, batch, positions, tokens.shape[0], rows=True), positions
                )
            return Step(batch, positions, read, cached)

        try:
            with wired(model.hf, model.layout, model, run, begin):
                yield run
        finally:
            for point in active:  # the batch is not kept alive by the points that saw it
                for key in ("inputs", "positions", "rows", "lengths"):
                    point.ctx.pop(key, None)


def _refuse_hooked(active: list[Any], silent: dict[str, str]) -> None:
    """Raise for hooks at points that never fire in this model."""
    for point in active:
        if (reason := silent.get(str(point.name))) is not None:
            raise CorelensError(
                f"a hook at {point.name!r}",
                f"a point that this layer has: {reason}",
                "hook another point or layer",
            )
