"""Which heads are full: by head, or whole layers by the scores of their heads.

A kernel that treats all heads of a layer alike keeps their memory in one piece, and a layer without
full heads needs no full cache: systems that route by layer give up the choice of heads for that.
`benchmarks/patterns.py` compares the two at an equal share of full heads.
"""

import numpy as np

from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores


def full_layers(scores: HeadScores, share: float | int) -> HeadSet:
    """All heads of the best layers; a layer is as good as the mean of its heads.

    Args:
        scores: of the heads; none of a layer without heads counts.
        share: of the layers that have heads, above 0 and up to 1, at least one layer; a whole
            number is how many layers.
    Raises:
        CorelensError: more layers than there are.
    """
    means = scores.by_layer()
    layers = [layer for layer, mean in enumerate(means) if not np.isnan(mean)]
    count = share if isinstance(share, int) else max(1, round(share * len(layers)))
    if not 0 < count <= len(layers):
        raise CorelensError(
            f"{share} of {len(layers)} layers",
            f"a share up to 1, or 1 to {len(layers)} layers",
            "give full_layers(scores, 0.25), say",
        )
    best = sorted(layers, key=lambda layer: (-means[layer], layer))[:count]
    exists = scores.exists
    return HeadSet(
        (layer, head) for layer in best for head in np.flatnonzero(exists[layer]).tolist()
    )
