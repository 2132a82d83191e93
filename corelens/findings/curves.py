"""Accuracy as more and more heads are masked: the top, the bottom and random ones, as curves with
their areas."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from corelens.findings.criteria import TOP
from corelens.findings.world import World


def curves(world: World, reading: str) -> dict[str, Any]:
    """{"points": {role: [[share of heads, accuracy], …]}, "area": {role: area}} with whole heads
    set to zero.

    Of the random heads the mean accuracy of all sets; none are drawn where more than half of the
    heads are masked.
    """
    scores, options = world.scores[reading], world.options
    points: dict[str, list[list[float]]] = {"top": [], "bottom": [], "random": []}
    for share in options.shares:
        k = len(scores.top(share))
        draws = options.draws if share == TOP.value else options.curve_draws
        sets = {
            "top": [scores.top(k=k)],
            "bottom": [scores.bottom(k=k)],
            "random": world.random_sets(reading, k, draws),
        }
        for role, of_role in sets.items():
            accuracies = [float(world.ablated(heads, "zero").mean()) for heads in of_role]
            if accuracies:
                points[role].append([k / len(world.every()), float(np.mean(accuracies))])
    return {"points": points, "area": {role: area(line) for role, line in points.items()}}


def area(line: Sequence[Sequence[float]]) -> float | None:
    """The area under accuracy over the share of heads, divided by the width of the shares."""
    if len(line) < 2:
        return None
    x, y = np.array(line).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))
