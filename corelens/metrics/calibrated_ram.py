"""Calibrated RAM: what a head does for this question, beyond what it does for any."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.ram import ram
from corelens.tokens.token_map import TokenMap


def calibrated_ram(
    pattern: Float[Tensor, "head row key"],
    token_map: TokenMap,
    null_pattern: Float[Tensor, "head null_row null_key"],
    null_token_map: TokenMap,
    reduce: str = "max",
) -> Float[Tensor, " head"]:
    """RAM minus RAM under the null question "N/A" on the same picture and region; attention mass, −1 to 1.

    A head that always stares at salient places has RAM without retrieving anything: calibration takes that away. The
    null question is that of QRHead's calibration (arXiv 2506.09944).

    Args:
        null_pattern: the same rows of the same layer in a forward whose question is "N/A".
        null_token_map: the token map of that forward, with the same regions.
    """
    return ram(pattern, token_map, reduce) - ram(null_pattern, null_token_map, reduce)
