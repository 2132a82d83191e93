"""F2, the same heads in other worlds: rank correlation, and heads of one world knocked out in
another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import numpy as np

from corelens.findings.criteria import CORE, SPEARMAN, TOP, TRANSFER
from corelens.findings.finding import Finding, Numbers
from corelens.findings.verdict import CANNOT, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World, number_rows
from corelens.heads.stats import spearman


@dataclass(frozen=True)
class Stability(Finding):
    """F2: the heads' RAM is ranked alike in all worlds, and one world's heads are needed in the
    others."""

    least_spearman: float = SPEARMAN.value
    least_transfer: float = TRANSFER.value

    id: ClassVar[str] = "F2"
    title: ClassVar[str] = "The same heads everywhere"
    claim: ClassVar[str] = "The specialised heads are the same across diverse visual domains."
    source: ClassVar[str] = (
        f"{CORE}, abstract; correlations between its four sets as summaries give them"
    )
    criterion: ClassVar[str] = (
        "Between every two worlds that the model answers, Spearman's ρ of the heads' RAM is at "
        "least "
        f"{SPEARMAN.value}; and the top {TOP.value:.0%} of each world, knocked out in another, "
        "cost at least "
        f"{TRANSFER.value:.0%} of what that world's own top heads cost. Settings of one world are "
        "one domain."
    )
    if_reproduced: ClassVar[str] = (
        "The heads that fetch evidence do not depend on what the picture shows."
    )
    if_not: ClassVar[str] = (
        "Which heads lead depends on the data: heads found on one set must be tested on yours."
    )

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """The ranking, how well it repeats, and what the top heads of every world cost here."""
        scores = world.scores[reading]
        transfer = {}
        for other in worlds:
            changed = world.knocked_out(other.top(reading, TOP.value))
            transfer[other.name] = world.costs(changed)
        values = number_rows(scores.values)
        return {
            "values": values,
            "split_half": scores.split_half(),
            "transfer": transfer,
            "n": len(world.to_score),
        }

    def conclude(self, model: Mapping[str, Any]) -> Verdict:
        """The verdict over all pairs of worlds that the model answers."""
        if not model["reading"]["key"]:
            return Verdict(CANNOT, reason=model["reading"]["reason"])
        worlds = {
            name: world["numbers"]["F2"]
            for name, world in model["worlds"].items()
            if world["why_not"] is None and "F2" in world["numbers"]
        }
        if len(worlds) < 2:
            return Verdict(CANNOT, reason="fewer than two worlds are answered")
        pairs = self.pairs(worlds)
        correlations = [pair["spearman"] for pair in pairs]
        lowest = min(correlations)
        shares = [share for pair in pairs for share in pair["transfer"]]
        transfers = [share for share in shares if share is not None]
        number = (
            f"ρ = {lowest:.2f} to {max(correlations):.2f}"
            if len(pairs) > 1
            else f"ρ = {lowest:.2f}"
        )
        transfer = min(transfers, default=1.0)
        if transfers:
            number += f"; another world's heads cost {100 * transfer:.0f}% or more of its own"
        n = min(world["n"] for world in worlds.values())
        if lowest >= self.least_spearman and transfer >= self.least_transfer:
            if len(transfers) < len(shares):
                return Verdict(NOT_JUDGED, number, "a world's own top heads cost nothing there", n)
            if len({name.partition(":")[0] for name in worlds}) < 2:
                return Verdict(CANNOT, number, "its worlds are settings of one, not two domains")
            return Verdict(REPRODUCED, number)
        reasons = []
        if lowest < self.least_spearman:
            reasons.append("the rankings agree too little")
        if transfer < self.least_transfer:
            reasons.append("heads of one world are not needed in another")
        attainable = min(pair["ceiling"] for pair in pairs)
        if transfer >= self.least_transfer and attainable < self.least_spearman:
            reason = f"rankings from so few samples can agree by ρ = {attainable:.2f} at the most"
            return Verdict(NOT_JUDGED, number, reason, n)
        return Verdict(NOT_REPRODUCED, number, "; ".join(reasons))

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """One world alone says nothing."""
        return Verdict(CANNOT, reason="fewer than two worlds are answered")

    def pairs(self, worlds: Mapping[str, Numbers]) -> list[dict[str, Any]]:
        """For every two worlds: ρ, ρ corrected for reliability, the ceiling, and the transfer in
        both directions.

        The ceiling of ρ is √(r_a r_b), with r the reliability of a ranking: its split-half
        correlation, raised to the full number of samples by the Spearman-Brown formula. The
        corrected ρ is divided by the ceiling.
        """
        pairs = []
        for a, b in combinations(worlds, 2):
            first, second = worlds[a], worlds[b]
            rho = spearman(
                np.array(first["values"], dtype=float), np.array(second["values"], dtype=float)
            )
            rho = 0.0 if np.isnan(rho) else rho
            ceiling = float(
                np.sqrt(reliability(first["split_half"]) * reliability(second["split_half"]))
            )
            transfer = [_share(first, a, b), _share(second, b, a)]
            pairs.append(
                {"worlds": [a, b], "spearman": rho, "ceiling": ceiling, "transfer": transfer}
                | {"corrected": min(1.0, rho / ceiling) if ceiling > 0 else None}
            )
        return pairs


def reliability(split_half: float) -> float:
    """The reliability of a ranking from all samples, from the correlation of its halves
    (Spearman-Brown)."""
    r = 0.0 if np.isnan(split_half) else max(split_half, 0.0)
    return 2 * r / (1 + r)


def _share(world: Numbers, own: str, other: str) -> float | None:
    """What the other world's heads cost here, as a share of what this world's own cost; None if
    that cannot be told from nothing."""
    cost = world["transfer"][own]
    return world["transfer"][other]["value"] / cost["value"] if cost["low"] > 0 else None
