"""F5, necessity: what masking whole heads costs, for the top heads, the bottom heads and random
heads."""

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
from corelens.findings.finding import Finding, Numbers
from corelens.findings.options import READINGS, ROWS
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World
from corelens.heads.intervals import percent_interval


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
        f"{CORE}, abstract; that whole heads are masked is known from summaries of the paper only"
    )
    criterion: ClassVar[str] = (
        f"With their output set to zero, the top {TOP.value:.0%} cost at least "
        f"{NECESSARY.value:.0%} of the clean "
        f"accuracy and more than {QUANTILE.value:.0%} of the random sets of as many other heads; "
        "the bottom "
        f"{TOP.value:.0%} cost at most {HARMLESS.value:.0%} of it; the 95% intervals included."
    )
    if_reproduced: ClassVar[str] = "The answer needs these heads and not others, as the paper says."
    if_not: ClassVar[str] = (
        "The cost of masking does not set the heads that RAM ranks first apart from others here."
    )

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """What the top, bottom and random heads cost: under each kind of ablation, and with the
        evidence knocked out at the question's rows alone and at the last row alone."""
        measured: Numbers = {
            "judged": reading, "n": len(world.to_test), "clean": world.clean.accuracy
        }  # fmt: skip
        kinds = world.options.kinds
        for key in READINGS:
            scores, k = world.scores[key], len(world.top(key, TOP.value))
            roles = {"top": scores.top(k=k), "bottom": scores.bottom(k=k)}
            measured[key] = {"k": k}
            for role, heads in roles.items():
                costs = {kind: world.costs(world.ablated(heads, kind)) for kind in kinds}
                measured[key][role] = {"heads": heads.to_json()} | costs
                measured[key][role]["knockout at"] = {
                    rows: world.costs(world.knocked_out(heads, rows)) for rows in ROWS.values()
                }
        measured["random"] = {}
        for kind in kinds:  # only "zero" is judged, so it gets the most random sets
            n_sets = world.options.draws if kind == "zero" else world.options.curve_draws
            sets = world.random_sets(reading, measured[reading]["k"], n_sets)
            measured["random"][kind] = [
                world.costs(world.ablated(heads, kind))["relative"] for heads in sets
            ]
        sets = world.random_sets(reading, measured[reading]["k"], world.options.curve_draws)
        measured["random at"] = {}
        for rows in ROWS.values():
            measured["random at"][rows] = [
                world.costs(world.knocked_out(heads, rows))["relative"] for heads in sets
            ]
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """The verdict on the criterion's three parts, each judged by its 95% interval; the reason
        names the parts that failed."""
        measured, random = numbers[numbers["judged"]], numbers["random"]["zero"]
        if len(random) < self.least_draws:
            return Verdict(NOT_JUDGED, reason=f"only {len(random)} random sets", n=numbers["n"])
        top, bottom = (relative(measured[role]["zero"], numbers) for role in ("top", "bottom"))
        random_limit = float(np.quantile(random, self.quantile))  # of the costs of random sets
        number = (
            f"top {measured['k']} masked: {percent_interval(top)}% of the clean accuracy lost; "
            f"random {100 * random_limit:.0f}% at the {self.quantile:.0%} quantile"
        )
        bottom_layers = _layers_of(measured["bottom"]["heads"])
        parts = (
            (at_least(top, self.necessary), "the top heads cost too little"),
            (above(top, random_limit), "random heads cost as much"),
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


def _layers_of(heads: Sequence[Sequence[int]]) -> str:
    """Words on where costly bottom heads are: how many in layer 0, or else their layers."""
    early = sum(layer == 0 for layer, _ in heads)
    if early:
        where = f"{early} of {len(heads)} in layer 0, whose heads feed later ones"
    else:
        layers = sorted({layer for layer, _ in heads})
        where = f"in layers {', '.join(map(str, layers))}"
    return f"{where}: low RAM is not low importance"
