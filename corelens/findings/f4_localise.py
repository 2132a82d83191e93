"""F4, localisation: the precision of the top heads, against other heads of equal visual mass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float

from corelens.findings.criteria import CORE, DRAWS, QUANTILE, TOP
from corelens.findings.finding import Finding, Numbers, percent
from corelens.findings.options import READINGS
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World
from corelens.heads.scores import HeadScores

NEAREST = 8  # a control draws one of so many heads of similar visual mass for each top head
Parts = tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]


@dataclass(frozen=True)
class Localisation(Finding):
    """F4: the top heads have a higher precision than other heads of the same visual mass."""

    quantile: float = QUANTILE.value
    least_draws: int = int(DRAWS.value)

    id: ClassVar[str] = "F4"
    title: ClassVar[str] = "They localise, others spread"
    claim: ClassVar[str] = (
        "The specialised heads localise what the question asks for; most other heads distribute "
        "attention over broader "
        "contextual regions."
    )
    source: ClassVar[str] = f"{CORE}, abstract"
    criterion: ClassVar[str] = (
        f"Chosen on one half of the samples, the top {TOP.value:.0%} have on the other half a "
        "higher precision (share "
        f"of their attention on the picture that lies on the evidence) than {QUANTILE.value:.0%} "
        "of the sets of other "
        "heads that have the same visual mass in the same rows."
    )
    if_reproduced: ClassVar[str] = (
        "These heads find the evidence; they do not merely look at the picture a lot."
    )
    if_not: ClassVar[str] = (
        "Heads that look at the picture as much are as precise: RAM finds lookers, not finders."
    )
    needs: ClassVar[tuple[str, ...]] = ("regions",)

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """For every reading: the precision of the top heads and of matched sets. Heads are chosen
        on the first half of the samples and measured on the second."""
        measured: Numbers = {"judged": reading}
        for key in READINGS:
            ram, precision = world.scores[key], world.score("precision", key)
            assert ram.per_sample is not None and precision.parts is not None
            half = len(ram.per_sample) // 2
            top = (
                HeadScores(per_sample=ram.per_sample[:half]).top(TOP.value).mask(*ram.values.shape)
            )
            on_evidence, on_picture = (
                np.nan_to_num(part[half:]).sum(0, dtype=np.float64) for part in precision.parts
            )
            sets = matched(top, on_picture, world.options.draws, world.options.seed)
            measured[key] = {
                "precision": precision_of(top, (on_evidence, on_picture)),
                "matched": [precision_of(heads, (on_evidence, on_picture)) for heads in sets],
                "visual_mass": [
                    float(on_picture[top].mean()),
                    float(np.mean([on_picture[s].mean() for s in sets])),
                ],
                "n": len(ram.per_sample) - half,
            }
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Reproduced if the precision exceeds the quantile of the matched sets."""
        measured = numbers[numbers["judged"]]
        if len(measured["matched"]) < self.least_draws:
            return Verdict(
                NOT_JUDGED, reason=f"{len(measured['matched'])} matched sets", n=measured["n"]
            )
        limit = float(np.quantile(measured["matched"], self.quantile))
        precision, most = (percent(x, 1) for x in (measured["precision"], limit))
        number = f"precision {precision}, matched heads {most} at the 95% quantile"
        return Verdict(REPRODUCED if measured["precision"] > limit else NOT_REPRODUCED, number)


def matched(
    top: Bool[np.ndarray, "layer head"],
    visual_mass: Float[np.ndarray, "layer head"],
    draws: int,
    seed: int,
) -> list[Bool[np.ndarray, "layer head"]]:
    """Random sets of other heads with about the same visual mass as the top heads.

    Each set has, for every top head, one of the NEAREST heads by visual mass, each head once.
    """
    masses, taken = visual_mass.ravel(), np.flatnonzero(top.ravel())
    others = np.flatnonzero(~top.ravel())
    rng = np.random.default_rng(seed)
    sets = []
    for _ in range(draws):
        control = np.zeros(top.size, dtype=bool)
        for head in rng.permutation(taken):
            free = others[~control[others]]
            order = np.argsort(np.abs(masses[free] - masses[head]), kind="stable")
            control[rng.choice(free[order[:NEAREST]])] = True
        sets.append(control.reshape(top.shape))
    return sets


def precision_of(heads: Bool[np.ndarray, "layer head"], parts: Parts) -> float:
    """M_G / M_V of these heads together; 0 if they have no visual mass."""
    on_evidence, on_picture = (part[heads].sum() for part in parts)
    return float(on_evidence / on_picture) if on_picture > 0 else 0.0
