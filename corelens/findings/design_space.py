"""The design space of rankings by attention: rows × keys × reduction over rows × over samples, each
judged by what its top heads cost.

The space is that of arXiv 2608.27417. Its points are scored in one pass: how samples are reduced
changes what is made of the same numbers.
"""

from collections.abc import Iterator
from typing import Any

from corelens.findings.causal import causal_rankings
from corelens.findings.criteria import TOP
from corelens.findings.options import CAUSAL
from corelens.findings.world import World
from corelens.heads.scores import HeadScores
from corelens.metrics.definition import Metric
from corelens.metrics.mass import KEY_REDUCTIONS, REDUCTIONS
from corelens.metrics.over_samples import head_scores
from corelens.metrics.registry import metric
from corelens.metrics.score import score_heads

OVER_SAMPLES = ("mean", "median", "rank_mean", "vote")
KINDS = ("zero", "knockout")


def design_space(world: World, reading: str) -> dict[str, Any]:
    """What the top 5% of every point's ranking cost on a few tested samples, whole heads set to
    zero and their sight of the evidence cut; random sets and rankings by causal effect beside
    them.

    Returns:
        {"n", "clean", "k", "points": [{"key", "heads", "zero", "knockout"}, …], "random": {kind:
        [share of clean accuracy lost, …]}}
    """
    few = world.of_few(world.options.effect_samples)
    rankings = dict(_rankings(world))
    if CAUSAL not in world.options.without:
        rankings |= causal_rankings(world)
    points = []
    for key, scores in rankings.items():
        heads = scores.top(TOP.value)
        costs = {kind: few.costs(few.ablated(heads, kind)) for kind in KINDS}
        points.append({"key": key, "heads": heads.to_json()} | costs)
    k = len(world.top(reading, TOP.value))
    sets = world.random_sets(reading, k, world.options.curve_draws)
    random = {
        kind: [few.costs(few.ablated(heads, kind))["relative"] for heads in sets] for kind in KINDS
    }
    clean = few.clean.accuracy
    return {"n": len(few.to_test), "clean": clean, "k": k, "points": points, "random": random}


def read_points() -> list[Metric]:
    """The rows and reductions that are read: the last row is one, so nothing is reduced over
    it."""
    read = []
    for keys in KEY_REDUCTIONS:
        read += [metric("ram", rows="question", keys=keys, reduce=reduce) for reduce in REDUCTIONS]
        read.append(metric("ram", rows="last", keys=keys))
    return read


def _rankings(world: World) -> Iterator[tuple[str, HeadScores]]:
    read = read_points()
    world.advance("scoring the design space")
    scores = score_heads(
        world.model,
        world.to_score,
        read,
        batch_size=world.options.batch_size,
        out=world.folder / "design scores",
    )
    for of_rows in read:
        per_sample = scores[of_rows.key].per_sample
        assert per_sample is not None
        for samples in OVER_SAMPLES:
            options = {"rows": of_rows.rows, "keys": of_rows.keys, "samples": samples}
            reduced = metric("ram", reduce=of_rows.reduce, **options)
            yield reduced.key, head_scores(reduced, per_sample[:, None], {})
