"""F8, SparseMM in three lines: concentration of visual heads, KV budgets at equal bytes, decoding
speed and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from corelens.evaluation.contrast import budget_contrast
from corelens.evaluation.evaluate import evaluate
from corelens.findings.criteria import BETTER, DECODE, MEMORY, SPARSEMM, VISUAL_HALF_IN
from corelens.findings.f1_sparsity import half_in
from corelens.findings.finding import Finding, Numbers, percent
from corelens.findings.verdict import CANNOT, NOT_JUDGED, NOT_REPRODUCED, REPRODUCED, Verdict
from corelens.findings.world import World, interval, resampled
from corelens.heads.scores import HeadScores
from corelens.metrics.score import score_heads
from corelens.sparse import KVBudget, SparseInference

DIVISORS = (8, 4, 2)  # budgets: the prompt's length over these
TIMED_SAMPLES, ROUNDS = 4, 2
LEAST_SAMPLES = 20  # below that an interval that contains zero says nothing


@dataclass(frozen=True)
class SparseMM(Finding):
    """F8: visual heads are few, and KV budgets by their score keep more of the answer than equal
    ones."""

    half_in: float = VISUAL_HALF_IN.value
    better: float = BETTER.value

    id: ClassVar[str] = "F8"
    title: ClassVar[str] = "Visual heads and KV budgets"
    claim: ClassVar[str] = (
        "Fewer than about 5% of the heads contribute to visual understanding; a KV budget shared "
        "out by their score "
        "decodes 1.38x faster with 52% less memory at parity."
    )
    source: ClassVar[str] = f"SparseMM, {SPARSEMM}, abstract"
    criterion: ClassVar[str] = (
        f"Concentration: half of the visual-head score lies in at most {VISUAL_HALF_IN.value:.0%} "
        "of the heads, the "
        "95% interval included. Budgets: of as many keys in all, budgets by that score keep more "
        "of the answer's "
        "log-probability than equal ones at every budget tried, the intervals above zero. Decoding "
        "speed and bytes "
        f"stand beside {DECODE.value}x and {MEMORY.value:.0%}; no small model can be judged by "
        "them."
    )
    if_reproduced: ClassVar[str] = (
        "Few heads read, and a cache shared out by their score keeps more of the answer."
    )
    if_not: ClassVar[str] = (
        "Sharing out a cache by this score is no gain in general: test it on your model and budget."
    )
    needs: ClassVar[tuple[str, ...]] = ("regions", "answers", "text")
    needs_rows: ClassVar[bool] = False

    def measure(self, world: World, worlds: Sequence[World], reading: str) -> Numbers:
        """The visual-head score's concentration, and budgets by it against equal ones."""
        encode = world.model.tokenizer.encode
        lengths = [
            len(encode(str(sample.answer), add_special_tokens=False)) for sample in world.samples
        ]
        world.advance("visual heads")
        scores = score_heads(
            world.model, world.to_score, ["visual_head"], batch_size=world.options.batch_size,
            out=world.folder / "visual", max_new_tokens=max(lengths) + 2,
        )["visual_head"]  # fmt: skip
        bootstraps = resampled(scores, world.options.seed)
        measured: Numbers = {
            "half_in": interval(half_in(scores.values), [half_in(values) for values in bootstraps]),
            "hit": int((scores.values > 0).sum()),
            "heads": scores.values.size,
            "answer_tokens": float(np.median(lengths)),
            "n": len(world.to_score),
            "budgets": [],
            "speed": None,
        }
        if measured["hit"] and measured["answer_tokens"] >= 2:
            measured |= self._budgets(world, scores)
        return measured

    def _budgets(self, world: World, scores: HeadScores) -> Numbers:
        window = max(2, min(32, world.tokens // 16))
        budgets = sorted({max(window + 1, world.tokens // divisor) for divisor in DIVISORS})
        samples = world.to_test[: world.options.sparse_samples]
        world.advance("budgets against equal ones")
        contrast = budget_contrast(
            world.model, samples, {"score": scores}, budgets, window=window, draws=1,
            batch_size=world.options.batch_size, seed=world.options.seed,
        )  # fmt: skip
        gains = []
        for difference in contrast.differences():
            if difference["line"] == "by score, score" and difference["control"] == "uniform":
                gains.append({"keys": difference["x"], **difference["answer_logprob"]})
        plan = SparseInference(kv_budget=KVBudget(scores, budget=budgets[-1], window=window))
        world.advance("timing")
        report = evaluate(world.model, samples[:TIMED_SAMPLES], sparse=plan, rounds=ROUNDS).speed
        assert report is not None
        dense, sparse = report.dense.kv_bytes, report.sparse.kv_bytes
        saved = 1 - sparse / dense if dense and sparse is not None else None
        speed = {"decode": report.speedup("decode").median, "saved": saved}
        return {"budgets": gains, "tested": len(samples), "speed": speed}

    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """Concentration, then budgets; speed and bytes are shown and not judged."""
        half, gains = numbers["half_in"], numbers["budgets"]
        number = f"half of the score in {percent(half['value'], 1)} of the heads"
        if not gains:
            return Verdict(CANNOT, number, "answers of one token: no budget can change them")
        shown = ", ".join(f"{gain['value']:+.1f} nats at {gain['keys']} keys" for gain in gains)
        number += f"; budgets by score against equal ones {shown}"
        missed, weak = [], []
        if half["low"] > self.half_in:
            missed.append("the score is spread over more heads")
        elif half["high"] > self.half_in:
            weak.append("the interval of the concentration contains the threshold")
        if any(gain["high"] <= self.better for gain in gains):
            missed.append("equal budgets keep more at some size")
        elif any(gain["low"] <= self.better for gain in gains):
            target = weak if numbers["tested"] < LEAST_SAMPLES else missed
            target.append("at some budget the gain is not above zero")
        if missed:
            return Verdict(NOT_REPRODUCED, number, "; ".join(missed))
        if weak:
            return Verdict(NOT_JUDGED, number, "; ".join(weak), numbers["n"])
        return Verdict(REPRODUCED, number)
