"""F1, functional sparsity: how few heads hold half of the attention mass on the evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from corelens.findings.criteria import CORE, HALF_IN
from corelens.findings.finding import Finding, Numbers, percent
from corelens.findings.options import READINGS
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World, interval, resampled


@dataclass(frozen=True)
class Sparsity(Finding):
    """F1: a small share of the heads holds half of the positive excess RAM."""

    half_in: float = HALF_IN.value

    id: ClassVar[str] = "F1"
    title: ClassVar[str] = "Functional sparsity"
    claim: ClassVar[str] = (
        "Cross-modal retrieval is functionally sparse: a small, specialised subset of heads (about "
        "30 in the models of "
        "the paper) extracts what the question asks for."
    )
    source: ClassVar[str] = (
        f"{CORE}, abstract; the number of heads as summaries of the paper give it"
    )
    criterion: ClassVar[str] = (
        "Half of the positive excess RAM (RAM minus what an even spread of the head's visual mass "
        "would put on the "
        f"evidence) lies in at most {HALF_IN.value:.1%} of the heads; the 95% interval included."
    )
    if_reproduced: ClassVar[str] = (
        "Attention on the evidence is concentrated in few heads, as the paper says."
    )
    if_not: ClassVar[str] = (
        "Many heads look at the evidence: sparsity of this mass is not a property of every model."
    )
    needs: ClassVar[tuple[str, ...]] = ("regions",)

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """For every reading: the share of heads that holds half, the share of the top 5%, the Gini
        coefficient."""
        return {key: self._concentration(world, key) for key in READINGS} | {"judged": reading}

    def _concentration(self, world: World, reading: str) -> Numbers:
        excess = world.score("ram_excess", reading)
        bootstraps = resampled(excess, world.options.seed)
        return {
            "half_in": interval(half_in(excess.values), [half_in(values) for values in bootstraps]),
            "top_share": excess.mass_of_top(),
            "gini": excess.gini(),
            "ideal": 1 / int((~np.isnan(excess.values)).sum()),
            "n": len(world.to_score),
        }

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Reproduced if the whole interval lies at or below the threshold, not reproduced if it
        lies above it, else not judged."""
        measured = numbers[numbers["judged"]]
        half = measured["half_in"]
        ci = f"[{100 * half['low']:.1f}, {100 * half['high']:.1f}]"
        number = f"half in {percent(half['value'], 1)} {ci} of the heads"
        if half["high"] <= self.half_in:
            return Verdict(REPRODUCED, number)
        if half["low"] > self.half_in:
            return Verdict(NOT_REPRODUCED, number)
        return Verdict(NOT_JUDGED, number, "the interval contains the threshold", measured["n"])


def half_in(values: Float[np.ndarray, "layer head"]) -> float:
    """The smallest share of the heads that holds half of the positive values; 1 if none is
    positive."""
    existing = values[~np.isnan(values)]  # NaN: a head that does not exist
    positive = np.sort(np.clip(existing, 0, None).astype(np.float64))[::-1]
    if not positive.any():
        return 1.0
    # The factor keeps a rounding error from asking for one head more.
    reached = np.cumsum(positive) >= 0.5 * positive.sum() * (1 - 1e-9)
    return float((np.argmax(reached) + 1) / positive.size)
