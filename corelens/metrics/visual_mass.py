"""Visual mass: attention on the whole picture, evidence or not."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.mass import of_masses, over_rows
from corelens.tokens.token_map import TokenMap


@of_masses
def visual_mass(
    visual: Float[Tensor, "*layer head row"], token_map: TokenMap, reduce: str = "max"
) -> Float[Tensor, "*layer head"]:
    """M_V = max_{i ∈ rows} Σ_{j ∈ V} A_ij, or the mean over rows; attention mass, 0 to 1.

    V: the visual tokens (patches only). A head that looks at the picture everywhere, or at a distractor, scores as
    high as one that finds the evidence: that is what RAM, precision and lift tell apart.
    """
    return over_rows(visual, reduce)
