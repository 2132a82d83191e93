"""What a card says beyond exact match: whether a model looks, which rows its answers hang on, which
heads matter.

Nothing of this has a part in the choice of a checkpoint.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

import corelens as cl
from training.export import _by_form, _measured

TEST_SEED = 3


World = tuple[str, dict[str, Any]]
"""A world and its options."""


def answers(
    model: Any, worlds: Sequence[World], n: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Exact match on `n` test scenes of each world, by form; and with blank pictures, with another
    answer in the picture (right: it follows), and where a question starts from a shape, with that
    one hidden."""
    held_out, controls = [], []
    for world, options in worlds:
        samples = cl.synthetic(world, n, seed=TEST_SEED, **options)
        where = {"world": world} | ({"options": options} if options else {})
        right = _right(model, samples)
        shares = _measured(right) | _by_form(samples, right)
        held_out.append(where | {"split": "test", "seed": TEST_SEED} | shares)
        few = samples[: n // 2]
        blank = [
            replace(s, images=[Image.new("RGB", x.size, (128, 128, 128)) for x in s.images])
            for s in few
        ]
        turned = cl.synthetic(world, len(few), seed=TEST_SEED, turn=3, **options)
        stays = [replace(t, answer=s.answer) for t, s in zip(turned, few, strict=True)]
        row: dict[str, Any] = where | {"n": len(few)}
        for name, scenes in (("blank", blank), ("follows", turned), ("stays", stays)):
            row[name] = float(np.mean(_right(model, scenes)))
        if world == "hop":
            hidden = cl.synthetic(world, len(few), seed=TEST_SEED, hide=True, **options)
            row["anchor_hidden"] = _measured(_right(model, hidden))
        controls.append(row)
    return held_out, controls


def heads(
    model: Any, place: World, scored: int, tested: int, rows: str = "question", draws: int = 20
) -> dict[str, Any]:
    """Heads ranked by RAM at `rows` on some scenes; on others whole heads zeroed: top, bottom and
    random 5%."""
    world, options = place
    samples = cl.synthetic(world, scored + tested, seed=TEST_SEED + 1, **options)
    name = "ram" if rows == "question" else f"ram[rows={rows}]"
    scores = cl.score_heads(model, samples[:scored], [name])[name]
    inputs = [
        model.prepare(samples[i : i + 25], answer=True) for i in range(scored, scored + tested, 25)
    ]

    def accuracy(hooks: Any = ()) -> float:
        return float(cl.evaluate(model, inputs, hooks=hooks).accuracy)

    top, bottom = scores.top(0.05), scores.bottom(0.05)
    zeroed = {
        "top": accuracy(cl.ablate(top, "zero")),
        "bottom": accuracy(cl.ablate(bottom, "zero")),
    }
    random = [
        accuracy(cl.ablate(scores.random(k=len(top), seed=i, exclude=top), "zero"))
        for i in range(draws)
    ]
    return {
        "world": world,
        "options": options,
        "rows": rows,
        "scored": scored,
        "tested": tested,
        "heads": len(top),
        "clean": accuracy(),
        "zeroed": zeroed | {"random": sorted(random)},
        "top": [str(head) for head in top],
        "depth": float(np.mean([head.layer for head in top]) / (model.cfg.n_layers - 1)),
    }


def rows_that_read(model: Any, place: World, n: int) -> dict[str, Any]:
    """What it costs to cut the evidence off, in all heads, from groups of rows: [share of answers
    lost, interval]."""
    world, options = place
    costs = cl.where_read(
        model, cl.synthetic(world, n, seed=TEST_SEED + 2, **options), tokens=False, batch_size=25
    )
    groups = ("question", "template", "last", "answer", "all")
    parts = {
        name: [costs.costs[name].difference, *costs.costs[name].ci]
        for name in groups
        if name in costs.costs
    }
    return {
        "world": world,
        "options": options,
        "n": n,
        "clean": costs.clean.value,
        "reads": costs.rows,
        "cost": parts,
    }


def _right(model: Any, samples: Sequence[cl.Sample]) -> list[bool]:
    evaluation = cl.evaluate(model, samples, batch_size=25)
    return [bool(answer.correct) for answer in evaluation.per_sample]
