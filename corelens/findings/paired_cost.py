"""Exact intervals of paired differences of right and wrong answers."""

import numpy as np
from jaxtyping import Float

from corelens.heads.intervals import Interval, bootstrap_mean, clopper_pearson, is_binary


def cost(
    clean: Float[np.ndarray, " sample"], changed: Float[np.ndarray, " sample"], level: float = 0.95
) -> Interval:
    """Clean accuracy minus the changed run's, paired by sample.

    The interval joins exact intervals of the share lost and the share won, each at half of the
    error, so that it covers at least `level`; it is conservative. Scores between 0 and 1 have a
    bootstrap interval instead.
    """
    if not (is_binary(clean) and is_binary(changed)):
        return bootstrap_mean(clean - changed, level)
    lost, won = int((clean > changed).sum()), int((clean < changed).sum())
    half = (1 + level) / 2
    losses, wins = clopper_pearson(lost, len(clean), half), clopper_pearson(won, len(clean), half)
    return Interval((lost - won) / len(clean), losses.low - wins.high, losses.high - wins.low)
