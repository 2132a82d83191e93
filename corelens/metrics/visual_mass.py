"""Visual mass: attention on the whole picture, evidence or not."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def visual_mass(
    visual: Float[Tensor, "*layer head row"], reduce: str = "mean"
) -> Float[Tensor, "*layer head"]:
    """M_V = mean_{i ∈ rows} Σ_{j ∈ V} A_ij, or the maximum over rows; attention mass, 0 to 1.

    V: the visual tokens (patches only). A head that looks at the picture everywhere, or at a
    distractor, scores as high as one that finds the evidence: that is what RAM, precision and lift
    tell apart. Reduced over rows as RAM is.
    """
    return over_rows(visual, reduce)


VISUAL_MASS = Metric(
    "visual_mass", visual_mass, needs=("visual",), keys="sum", reduce="mean", region=False
)
