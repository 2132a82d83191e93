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
    above,
    at_least,
    at_most,
)
from corelens.findings.finding import Finding, Numbers, percent_interval
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
        "Masking only the top 5% of the heads costs over 20% of performance; masking lower-ranked "
        "heads has minimal "
        "effect."
    )
    source: ClassVar[str] = (
        f"{CORE}, abstract; that whole heads are masked as summaries of its algorithm give it"
    )
    criterion: ClassVar[str] = (
        f"With their output set to zero, the top {TOP.value:.0%} cost at least "
        f"{NECESSARY.value:.0%} of the clean "
        f"accuracy and more than {QUANTILE.value:.0%} of the random sets of as many other heads; "
        "the bottom "
        f"{TOP.value:.0%} cost at most {HARMLESS.value:.0%} of it; the 95% intervals included."
    )
    if_reproduced: ClassVar[str] = "The answer needs these heads and not others, as the paper says."
    if_not: ClassVar[str] = "Masking heads here does not single out those that RAM ranks first."

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """Costs of the top, bottom and random heads under each intervention, and under a knockout
        at the question's rows alone and at the last row alone."""
        measured: Numbers = {
            "judged": reading, "n": len(world.to_test), "clean": world.clean.accuracy
        }  # fmt: skip
        for key in READINGS:
            scores, k = world.scores[key], len(world.top(key, TOP.value))
            roles = {"top": scores.top(k=k), "bottom": scores.bottom(k=k)}
            measured[key] = {"k": k}
            for role, heads in roles.items():
                measured[key][role] = {"heads": heads.to_json()} | _by_kind(world, heads)
                measured[key][role]["knockout at"] = {
                    group: world.costs(world.knocked(heads, group)) for group in ROWS.values()
                }
        measured["random"] = {}
        for kind in world.options.kinds:  # only "zero" is judged
            draws = world.options.draws if kind == "zero" else world.options.curve_draws
            sets = world.random_sets(reading, measured[reading]["k"], draws)
            measured["random"][kind] = [
                world.costs(world.changed(heads, kind))["relative"] for heads in sets
            ]
        sets = world.random_sets(reading, measured[reading]["k"], world.options.curve_draws)
        measured["random at"] = {
            group: [world.costs(world.knocked(heads, group))["relative"] for heads in sets]
            for group in ROWS.values()
        }
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """All three parts of the criterion, each by its interval; the reason names those that
        failed."""
        measured, random = numbers[numbers["judged"]], numbers["random"]["zero"]
        if len(random) < self.least_draws:
            return Verdict(NOT_JUDGED, reason=f"{len(random)} random sets", n=numbers["n"])
        top, bottom = (relative(measured[role]["zero"], numbers) for role in ("top", "bottom"))
        limit = float(np.quantile(random, self.quantile))
        number = (
            f"top {measured['k']} masked: {percent_interval(top)}% of the clean accuracy lost; "
        )
        number += f"random {100 * limit:.0f}% at the {self.quantile:.0%} quantile"
        bottom_layers = _where_they_are(measured["bottom"]["heads"])
        parts = (
            (at_least(top, self.necessary), "the top heads cost too little"),
            (above(top, limit), "random heads cost as much"),
            (
                at_most(bottom, self.harmless),
                f"the bottom heads cost {percent_interval(bottom)}% ({bottom_layers})",
            ),
        )
        missed = [words for holds, words in parts if holds is False]
        unsure = [words for holds, words in parts if holds is None]
        if missed:
            return Verdict(NOT_REPRODUCED, number, "; ".join(missed))
        if unsure:
            reason = f"the intervals do not exclude that {'; '.join(unsure)}"
            return Verdict(NOT_JUDGED, number, reason, numbers["n"])
        return Verdict(REPRODUCED, number)


def relative(cost: Mapping[str, float], numbers: Mapping[str, Any]) -> dict[str, float]:
    """A cost in accuracy as a share of the clean accuracy, with its interval."""
    clean = numbers["clean"] or 1.0
    return {end: cost[end] / clean for end in ("value", "low", "high")}


def _by_kind(world: World, heads: HeadSet) -> dict[str, Any]:
    return {kind: world.costs(world.changed(heads, kind)) for kind in world.options.kinds}


def _where_they_are(heads: Sequence[Sequence[int]]) -> str:
    """ "2 of 5 in layer 0, whose heads feed later ones …", or the layers of these heads."""
    early = sum(layer == 0 for layer, _ in heads)
    if early:
        words = f"{early} of {len(heads)} in layer 0, whose heads feed later ones"
        return f"{words}: low RAM is not low importance"
    layers = ", ".join(str(layer) for layer in sorted({layer for layer, _ in heads}))
    return f"in layers {layers}: low RAM is not low importance"
