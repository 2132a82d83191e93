"""Rankings by what each head alone is worth for the answer: the ceiling of rankings by
attention."""

import numpy as np

from corelens.errors import CorelensError
from corelens.evaluation.causal import KINDS, causal_scores
from corelens.findings.world import World, number_rows
from corelens.heads.scores import HeadScores


def causal_rankings(world: World) -> dict[str, HeadScores]:
    """{"causal_knockout": scores, "causal_attribution": scores}, of scoring samples; see
    `corelens.evaluation.causal`. One that cannot be made of these samples is left out."""

    def measured() -> dict[str, list[list[float | None]]]:
        samples, values = world.to_score[: world.options.effect_samples], {}
        for kind in KINDS:
            world.limit.check()
            world.advance(f"single heads, {kind}")
            try:
                scores = causal_scores(
                    world.model, samples, kind, batch_size=world.options.batch_size
                )
            except CorelensError:  # a twin without the evidence cannot be made
                continue
            values[f"causal_{kind}"] = number_rows(scores.values)
        return values

    stored = world.stored("causal", measured)
    return {key: HeadScores(np.array(rows, dtype=float)) for key, rows in stored.items()}
