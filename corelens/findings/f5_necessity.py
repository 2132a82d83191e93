"""F5, necessity: whole heads masked, the top ones against the bottom ones and against random
ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from corelens.findings.criteria import (
    CORE,
    DRAWS,
    HARMLESS,
    NECESSARY,
    QUANTILE,
    TOP,
    enough_samples,
)
from corelens.findings.finding import Finding, Numbers, points
from corelens.findings.options import READINGS, ROWS
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World
from corelens.heads.head_set import HeadSet


@dataclass(frozen=True)
class Necessity(Finding):
    """F5: masking the top heads costs much, masking random or bottom heads does not."""

    necessary: float = NECESSARY.value
    harmless: float = HARMLESS.value
    quantile: float = QUANTILE.value
    least_draws: int = int(DRAWS.value)

    id: ClassVar[str] = "F5"
    title: ClassVar[str] = "Necessity"
    claim: ClassVar[str] = (
        "Masking only the top 5% of the heads costs over 20% of performance; masking lower-ranked heads has minimal "
        "effect."
    )
    source: ClassVar[str] = (
        f"{CORE}, abstract; that whole heads are masked as summaries of its algorithm give it"
    )
    criterion: ClassVar[str] = (
        f"With their output set to zero, the top {TOP.value:.0%} cost at least {NECESSARY.value:.0%} of the clean "
        f"accuracy and more than {QUANTILE.value:.0%} of the random sets of as many other heads; the bottom "
        f"{TOP.value:.0%} cost at most {HARMLESS.value:.0%} of it."
    )
    if_reproduced: ClassVar[str] = "The answer needs these heads and not others, as the paper says."
    if_not: ClassVar[str] = "Masking heads here does not single out those that RAM ranks first."

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """Costs of the top, bottom and random heads under each intervention, at single rows, and as
        curves."""
        measured: Numbers = {"judged": reading, "n": len(world.to_test)}
        for key in READINGS:
            scores, k = world.scores[key], len(world.top(key, TOP.value))
            roles = {"top": scores.top(k=k), "bottom": scores.bottom(k=k)}
            measured[key] = {"k": k}
            for role, heads in roles.items():
                measured[key][role] = {"heads": heads.to_json()} | _by_kind(world, heads)
            rows = {
                group: world.costs(world.knocked(roles["top"], group)) for group in ROWS.values()
            }
            measured[key]["top"]["knockout at"] = rows
        measured["random"] = {}
        for kind in world.options.kinds:  # the verdict rests on zero
            draws = world.options.draws if kind == "zero" else world.options.curve_draws
            sets = world.random_sets(reading, measured[reading]["k"], draws)
            measured["random"][kind] = [
                world.costs(world.changed(heads, kind))["relative"] for heads in sets
            ]
        measured["curves"] = self._curves(world, reading)
        return measured

    def _curves(self, world: World, reading: str) -> Numbers:
        """{role: [[share of heads, accuracy], …]} under zero, and the area between top and
        random."""
        scores, options = world.scores[reading], world.options
        curves: dict[str, list[list[float]]] = {"top": [], "bottom": [], "random": []}
        for share in options.shares:
            k = len(scores.top(share))
            random = world.random_sets(
                reading, k, options.draws if share == TOP.value else options.curve_draws
            )
            for role, sets in (
                ("top", [scores.top(k=k)]),
                ("bottom", [scores.bottom(k=k)]),
                ("random", random),
            ):
                accuracies = [float(world.changed(heads, "zero").mean()) for heads in sets]
                if accuracies:
                    curves[role].append([k / scores.values.size, float(np.mean(accuracies))])
        return {"points": curves, "area": {role: _area(line) for role, line in curves.items()}}

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """All three parts of the criterion; which were missed is said."""
        measured, random = numbers[numbers["judged"]], numbers["random"]["zero"]
        if len(random) < self.least_draws:
            return Verdict(NOT_JUDGED, reason=f"{len(random)} random sets", n=numbers["n"])
        if not enough_samples(numbers["n"], self.necessary):
            reason = f"a cost of {self.necessary:.0%} would often be missed"
            return Verdict(NOT_JUDGED, reason=reason, n=numbers["n"])
        top, bottom = measured["top"]["zero"], measured["bottom"]["zero"]
        limit = float(np.quantile(random, self.quantile))
        number = f"top {measured['k']} masked: {points(top)} points lost; random {100 * limit:.0f} at the 95% quantile"
        missed = []
        if top["relative"] < self.necessary:
            missed.append("the top heads cost too little")
        if top["relative"] <= limit:
            missed.append("random heads cost as much")
        if bottom["relative"] > self.harmless:
            missed.append(
                f"the bottom heads cost {points(bottom)} points ({_layers(measured['bottom']['heads'])})"
            )
        return Verdict(NOT_REPRODUCED if missed else REPRODUCED, number, "; ".join(missed))


def _by_kind(world: World, heads: HeadSet) -> dict[str, Any]:
    return {kind: world.costs(world.changed(heads, kind)) for kind in world.options.kinds}


def _area(line: Sequence[Sequence[float]]) -> float | None:
    """The area under accuracy over the share of heads, divided by the width of the shares."""
    if len(line) < 2:
        return None
    x, y = np.array(line).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def _layers(heads: Sequence[Sequence[int]]) -> str:
    """ "2 of 5 in layer 0, where heads feed later ones"; or the layers that they are in."""
    early = sum(layer == 0 for layer, _ in heads)
    if early:
        return f"{early} of {len(heads)} in layer 0, whose heads feed later ones: low RAM is not low importance"
    layers = ", ".join(str(layer) for layer in sorted({layer for layer, _ in heads}))
    return f"in layers {layers}: low RAM is not low importance"
