"""F7, acceleration at parity: the top heads attend fully and the others in a window. Two lines:
parity, and speed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from corelens.evaluation.evaluate import evaluate
from corelens.evaluation.sparse_account import left_pairs
from corelens.findings import paired_cost
from corelens.findings.criteria import (
    ALLOWED,
    CORE,
    DRAWS,
    PARITY,
    PARITY_HIGH,
    QUANTILE,
    REACHED,
    TOP,
)
from corelens.findings.finding import Finding, Numbers
from corelens.findings.verdict import CANNOT, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import percent_interval
from corelens.sparse import SparseInference, Streaming

SINK, WINDOWS = 128, (1024, 2048)  # of related code: the paper's own are not known to us
TIMED_SAMPLES, ROUNDS = 4, 3


@dataclass(frozen=True)
class Acceleration(Finding):
    """F7: parity with the top heads full, and as much speed as the operation count allows."""

    parity: float = PARITY.value
    parity_high: float = PARITY_HIGH.value
    allowed: float = ALLOWED.value
    reached: float = REACHED.value
    quantile: float = QUANTILE.value
    least_draws: int = int(DRAWS.value)

    id: ClassVar[str] = "F7"
    title: ClassVar[str] = "Acceleration at parity"
    claim: ClassVar[str] = (
        "With the specialised heads full and the others sparse, inference is significantly faster "
        "at robust task "
        "performance."
    )
    source: ClassVar[str] = (
        f"{CORE}, abstract; 1.8x to 2.3x and a loss below 1 point as summaries give it"
    )
    criterion: ClassVar[str] = (
        f"Parity: with the top {TOP.value:.0%} full at most {100 * PARITY.value:.0f} point is "
        "lost, the 95% interval "
        f"up to {100 * PARITY_HIGH.value:.0f}, and less than with {QUANTILE.value:.0%} of the sets "
        "of as many random "
        "heads full. Speed, of the very plan that met parity: the prefill reaches "
        f"{REACHED.value:.0%} of what the "
        f"operation count allows, judged where that is {ALLOWED.value}x or more."
    )
    if_reproduced: ClassVar[str] = (
        "Keeping these heads full buys the speed that the operation count allows."
    )
    if_not: ClassVar[str] = "The saving is not had at parity on this model and machine."

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """For each window in which most keys are hidden: the loss, that of random heads; the speed
        at parity."""
        top = world.top(reading, TOP.value)
        measured: Numbers = {"tokens": world.tokens, "n": 0, "plans": [], "speed": None}
        for window in WINDOWS:
            plan = SparseInference(top, Streaming(sink=SINK, window=window))
            measured["plans"].append(
                {"window": window, "allows": allowed_speedup(world.model.cfg, world.tokens, plan)}
            )
        if max(plan["allows"] for plan in measured["plans"]) < self.allowed:
            return measured
        clean = world.under(None)
        measured["n"] = len(clean)
        random_sets = world.random_sets(reading, len(top), int(DRAWS.value))
        for plan in measured["plans"]:
            if plan["allows"] < self.allowed:
                continue
            pattern = Streaming(sink=SINK, window=plan["window"])

            def lost(heads: HeadSet, pattern: Streaming = pattern) -> Any:
                return paired_cost.cost(clean, world.under(SparseInference(heads, pattern)))

            plan |= lost(top)._asdict() | {"random": [lost(heads).value for heads in random_sets]}
            if measured["speed"] is None and self._parity(plan).word == REPRODUCED:
                world.advance("timing")
                sparse = SparseInference(top, pattern)
                speed = evaluate(
                    world.model, world.to_test[:TIMED_SAMPLES], sparse=sparse, rounds=ROUNDS
                ).speed
                assert speed is not None
                ratio = speed.speedup("prefill")._asdict()
                measured["speed"] = {"window": plan["window"], "allows": plan["allows"], **ratio}
        return measured

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Parity first; speed of the plan that met it."""
        allows = max(plan["allows"] for plan in numbers["plans"])
        if allows < self.allowed:
            reason = f"prompts of {numbers['tokens']} tokens are too short: the operation count "
            reason += f"allows {allows:.2f}x"
            return Verdict(CANNOT, reason=reason)
        parity = [self._parity(plan, numbers["n"]) for plan in numbers["plans"] if "value" in plan]
        met = next((verdict for verdict in parity if verdict.word == REPRODUCED), None)
        speed = numbers["speed"]
        if met is None or speed is None:
            open_still = (verdict for verdict in parity if verdict.word == NOT_JUDGED)
            shown = next(open_still, parity[-1])
            return replace(shown, number="; ".join(verdict.number for verdict in parity))
        share = speed["median"] / speed["allows"]
        number = f"{met.number}; prefill {speed['median']:.2f}x, {share:.0%} of the "
        number += f"{speed['allows']:.2f}x allowed"
        if share >= self.reached:
            return Verdict(REPRODUCED, number)
        return Verdict(NOT_REPRODUCED, number, "parity is met; the allowed speed-up is not reached")

    def _parity(self, plan: Numbers, n: int | None = None) -> Verdict:
        number = f"{percent_interval(plan)} points lost with a window of {plan['window']}"
        if len(plan["random"]) < self.least_draws:
            return Verdict(NOT_JUDGED, number, f"only {len(plan['random'])} random sets", n)
        random = float(np.quantile(plan["random"], 1 - self.quantile))
        number += f"; random heads full {100 * random:.0f} at the {1 - self.quantile:.0%} quantile"
        if plan["low"] > self.parity:
            return Verdict(NOT_REPRODUCED, number, "more is lost than parity allows")
        if plan["value"] > self.parity or plan["high"] > self.parity_high:
            return Verdict(NOT_JUDGED, number, "the interval reaches past what parity allows", n)
        if plan["value"] >= random:
            return Verdict(NOT_REPRODUCED, number, "random heads full lose as little")
        return Verdict(REPRODUCED, number)


def allowed_speedup(cfg: Any, tokens: int, plan: SparseInference) -> float:
    """Dense over sparse multiply-adds of the decoder's prefill, its projections and MLPs included
    (not the head)."""
    projections = cfg.d_model * cfg.d_head * 2 * (cfg.n_heads + cfg.n_kv_heads)
    linear = tokens * cfg.n_layers * (projections + 3 * cfg.d_model * cfg.d_mlp)
    attention = cfg.n_layers * cfg.n_heads * 2 * cfg.d_head * tokens * (tokens + 1) / 2
    left = left_pairs(plan, cfg, [tokens])
    return (linear + attention) / (linear + attention * (1.0 if left is None else left))
