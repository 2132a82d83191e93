"""F6, sufficiency: only the top heads see the picture; if that is not enough, also the heads that
feed them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from corelens.findings.criteria import CORE, DRAWS, QUANTILE, SUFFICIENT, TOP, above, at_most
from corelens.findings.feeders import feeders
from corelens.findings.finding import Finding, Numbers
from corelens.findings.verdict import NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import accuracy_interval

NOTHING: HeadSet = HeadSet([])


@dataclass(frozen=True)
class Sufficiency(Finding):
    """F6: with the picture cut from all other heads, the model still answers."""

    sufficient: float = SUFFICIENT.value
    quantile: float = QUANTILE.value
    least_draws: int = int(DRAWS.value)

    id: ClassVar[str] = "F6"
    title: ClassVar[str] = "Sufficiency"
    claim: ClassVar[str] = (
        "The specialised heads are dedicated information extractors: they fetch what is asked for."
    )
    source: ClassVar[str] = f"{CORE}, abstract; the test (all other heads blind) is ours"
    criterion: ClassVar[str] = (
        f"The picture is cut from every text token in all heads but the top {TOP.value:.0%}. "
        "The whole 95% interval of the remaining accuracy lies "
        f"at {SUFFICIENT.value:.0%} of the clean one or more, and above {QUANTILE.value:.0%} of "
        "sets of as many random heads. If not, heads that feed the top ones (by path patching) see "
        "it, too."
    )
    if_reproduced: ClassVar[str] = "These few heads fetch all that the answer needs."
    if_not: ClassVar[str] = "What the answer needs is fetched by more heads than these."

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """Accuracy when only the top or random heads see the picture, alone and together with the
        feeders."""
        top, options = world.top(reading, TOP.value), world.options
        curve = []
        for share in options.shares:
            heads = world.top(reading, share)
            curve.append([len(heads) / len(world.every()), float(world.only_seeing(heads).mean())])
        random = world.random_sets(reading, len(top), options.draws)
        measured: Numbers = {
            "k": len(top),
            "n": len(world.to_test),
            "clean": world.clean.accuracy,
            "blind": float(world.only_seeing(NOTHING).mean()),
            "alone": _when_only_these_see(world, top, random, NOTHING),
            "curve": curve,
            "enough": next(
                (share for share, x in curve if x >= self.sufficient * world.clean.accuracy), None
            ),
            "with feeders": None,
        }
        if measured["alone"]["value"] < self.sufficient * world.clean.accuracy:
            feeding = world.stored("feeders", lambda: feeders(world, top).to_json())
            feeder_heads = HeadSet(feeding) - top
            if feeder_heads:
                # (fewer sets than above, but no fewer than a verdict needs)
                controls = random[: max(options.curve_draws, self.least_draws)]
                measured["with feeders"] = _when_only_these_see(world, top, controls, feeder_heads)
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Reproduced by the top heads alone, or with their feeders; the verdict's text says
        which."""
        verdicts = []
        for name in ("alone", "with feeders"):
            if numbers[name] is not None:
                verdicts.append(self._judge_variant(numbers[name], numbers))
        return next((verdict for verdict in verdicts if verdict.word == REPRODUCED), verdicts[-1])

    def _judge_variant(self, variant: Numbers, numbers: Numbers) -> Verdict:
        if len(variant["random"]) < self.least_draws:
            return Verdict(
                NOT_JUDGED,
                reason=f"only {len(variant['random'])} random sets",
                n=numbers["n"],
            )
        limit = float(np.quantile(variant["random"], self.quantile))
        fed = f" and {len(variant['feeders'])} feeders" if variant["feeders"] else ""
        clean = numbers["clean"] or 1.0
        lost = {end: variant["lost"][end] / clean for end in ("value", "low", "high")}
        number = f"only {numbers['k']} heads{fed} see: {1 - lost['value']:.0%} "
        number += f"[{100 * (1 - lost['high']):.0f}, {100 * (1 - lost['low']):.0f}] of the clean "
        number += f"accuracy; random {limit / clean:.0%} at the {self.quantile:.0%} quantile"
        parts = (
            (at_most(lost, 1 - self.sufficient), "they do not suffice"),
            (above(variant, limit), "no better than random heads"),
        )
        missed = [words for holds, words in parts if holds is False]
        unsure = [words for holds, words in parts if holds is None]
        if missed:
            return Verdict(NOT_REPRODUCED, number, "; ".join(missed))
        if unsure:
            reason = f"too few samples to exclude that {'; '.join(unsure)}"
            return Verdict(NOT_JUDGED, number, reason, numbers["n"])
        return Verdict(REPRODUCED, number)


def _when_only_these_see(
    world: World, top: HeadSet, random: Sequence[HeadSet], feeder_heads: HeadSet
) -> Numbers:
    correct = world.only_seeing(top | feeder_heads)
    accuracy = accuracy_interval(correct)
    lost = world.costs(correct)
    controls = [float(world.only_seeing(heads | feeder_heads).mean()) for heads in random]
    return {
        **accuracy._asdict(), "lost": lost, "random": controls, "feeders": feeder_heads.to_json()
    }  # fmt: skip
