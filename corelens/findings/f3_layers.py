"""F3, middle to late layers: how deep the top heads sit, and how that changes with the size of the
model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from corelens.findings.criteria import CORE, DEPTH, SIZES, TOP
from corelens.findings.finding import Finding, Numbers
from corelens.findings.options import READINGS
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World, interval, resampled


@dataclass(frozen=True)
class Layers(Finding):
    """F3: the top heads sit in the second half of the layers, and deeper in larger models."""

    least_depth: float = DEPTH.value
    least_sizes: int = int(SIZES.value)

    id: ClassVar[str] = "F3"
    title: ClassVar[str] = "Middle to late layers"
    claim: ClassVar[str] = (
        "With scale, the specialised heads concentrate in the middle to late layers."
    )
    source: ClassVar[str] = f"{CORE}, abstract"
    criterion: ClassVar[str] = (
        f"The mean relative depth (0: first layer, 1: last) of the top {TOP.value:.0%} of the "
        f"heads is at least {DEPTH.value}, the 95% interval included; and where one family "
        f"is studied in {int(SIZES.value)} sizes on a world, the interval of the slope over them "
        "is above zero."
    )
    if_reproduced: ClassVar[str] = (
        "Evidence is fetched in the second half of the model, as in the paper's models."
    )
    if_not: ClassVar[str] = (
        "Evidence is fetched early here: where the heads sit is not settled by the paper's models."
    )
    needs: ClassVar[tuple[str, ...]] = ("regions",)

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """For every reading: the mean depth of the top heads, and how many of them each layer
        holds."""
        measured: Numbers = {"judged": reading}
        for key in READINGS:
            scores = world.scores[key]
            top = scores.top(TOP.value)
            k = len(top)
            layers = [head.layer for head in top]
            counts = [layers.count(layer) for layer in range(len(scores.values))]
            bootstraps = [depth(values, k) for values in resampled(scores, world.options.seed)]
            measured[key] = {
                "depth": interval(depth(scores.values, k), bootstraps), "layers": counts,
                "n": len(world.to_score)
            }  # fmt: skip
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Reproduced if the whole interval lies at or above the threshold, not if it lies below
        it."""
        measured = numbers[numbers["judged"]]
        value = measured["depth"]
        number = f"mean depth {value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
        if value["low"] >= self.least_depth:
            return Verdict(REPRODUCED, number)
        if value["high"] < self.least_depth:
            return Verdict(NOT_REPRODUCED, number)
        return Verdict(NOT_JUDGED, number, "the interval contains the threshold", measured["n"])

    def conclude(self, model: Mapping[str, Any]) -> Verdict:
        """The verdict on a model; "sizes", where several were studied: of each world [number of
        parameters, depth, and the ends of its interval] of each."""
        verdict = super().conclude(model)
        slopes = {
            world: slope_over_sizes(sizes)
            for world, sizes in (model.get("sizes") or {}).items()
            if len({size for size, *_ in sizes}) >= self.least_sizes
        }
        if not slopes or not verdict.number:
            return verdict
        by_world = ", ".join(
            f"{slope:+.2f} [{low:+.2f}, {high:+.2f}] in {world}"
            for world, (slope, low, high) in slopes.items()
        )
        number = f"{verdict.number}; change of depth with ten times the parameters: {by_world}"
        if verdict.word != REPRODUCED or all(low > 0 for _, low, _ in slopes.values()):
            return replace(verdict, number=number)
        if any(high < 0 for *_, high in slopes.values()):
            reason = "larger models do not have them deeper"
            return Verdict(NOT_REPRODUCED, number, reason, worlds=verdict.worlds)
        reason = "the interval of the slope over sizes contains zero"
        return Verdict(NOT_JUDGED, number, reason, worlds=verdict.worlds)


def depth(values: Float[np.ndarray, "layer head"], k: int) -> float:
    """The mean relative depth of the k heads of the highest values."""
    layers, heads = values.shape
    top = np.argsort(-values.ravel(), kind="stable")[:k] // heads
    return float(top.mean() / max(layers - 1, 1))


def slope_over_sizes(sizes: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The least-squares slope of depth over log₁₀ of the number of parameters, with its interval.

    The slope is a weighted sum of independent depths; its interval is put together from theirs
    (Zou and Donner 2008, doi 10.1002/sim.3095).

    Args:
        sizes: of each model [number of parameters, depth, and the ends of its interval].
    """
    parameters, depths, lows, highs = np.array(sizes, dtype=float).T
    x = np.log10(parameters) - np.log10(parameters).mean()
    weights = x / (x**2).sum()
    slope = (weights * depths).sum()
    below = weights * (depths - np.where(weights > 0, lows, highs))
    above = weights * (np.where(weights > 0, highs, lows) - depths)
    low, high = slope - np.hypot.reduce(below), slope + np.hypot.reduce(above)
    return float(slope), float(low), float(high)
