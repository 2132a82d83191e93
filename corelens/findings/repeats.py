"""How far a ranking can be trusted: agreement with rankings from other samples, by their number,
and from the same samples asked in other words."""

from dataclasses import replace
from typing import Any

import numpy as np

from corelens.evaluation.evaluate import evaluate
from corelens.findings.options import READINGS
from corelens.findings.world import World
from corelens.heads.scores import HeadScores
from corelens.metrics.score import score_heads

# {} is the question
WORDINGS = ("Look at the picture. {}", "{} Answer in one word.")

COUNTS = (5, 10, 20, 50, 100, 200)
DRAWS = 20


def agreement_over_n(scores: HeadScores, seed: int = 0) -> list[dict[str, float]]:
    """For n of COUNTS (up to half of the samples): mean Spearman ρ and Jaccard overlap of the top
    5% of two rankings.

    The two rankings come from n samples each that have none in common; the mean of 20 draws.
    """
    assert scores.per_sample is not None
    rng, rows = np.random.default_rng(seed), []
    for n in COUNTS:
        if 2 * n > len(scores.per_sample):
            break
        agreements: list[Any] = []
        for _ in range(DRAWS):
            order = rng.permutation(len(scores.per_sample))[: 2 * n]
            first, second = (
                HeadScores(per_sample=scores.per_sample[half]) for half in (order[:n], order[n:])
            )
            agreements.append(first.agreement(second))
        spearman = np.nanmean([agreement.spearman for agreement in agreements])
        jaccard = np.mean([agreement.jaccard for agreement in agreements])
        rows.append({"n": n, "spearman": float(spearman), "jaccard": float(jaccard)})
    return rows


def repeats(world: World) -> dict[str, Any]:
    """How far the rankings agree with those from samples that were drawn with other seeds (the
    tested ones), and from the scoring samples asked in other words.

    Returns:
        {"other samples": {"n", reading: {"spearman", "jaccard"}}, "wordings": [{"wording",
        "accuracy", reading: …}, …]}; no wordings where the samples are chats.
    """
    batch_size = world.options.batch_size
    world.advance("scoring other samples")
    others = score_heads(world.model, world.to_test, list(READINGS), batch_size=batch_size)
    measured: dict[str, Any] = {
        "other samples": {"n": len(world.to_test)} | _agreements(world, others),
        "wordings": [],
    }
    if any(s.question is None or s.messages is not None for s in world.to_score):
        return measured
    for wording in WORDINGS:
        world.limit.check()
        world.advance("other words")
        samples = [
            replace(sample, question=wording.format(sample.question)) for sample in world.to_score
        ]
        scores = score_heads(world.model, samples, list(READINGS), batch_size=batch_size)
        accuracy = evaluate(world.model, samples, batch_size=batch_size).accuracy
        measured["wordings"].append(
            {"wording": wording, "accuracy": accuracy} | _agreements(world, scores)
        )
    return measured


def _agreements(world: World, scores: dict[str, HeadScores]) -> dict[str, dict[str, float]]:
    agreements = {}
    for key in READINGS:
        agreement = world.scores[key].agreement(scores[key])
        agreements[key] = {"spearman": agreement.spearman, "jaccard": agreement.jaccard}
    return agreements
