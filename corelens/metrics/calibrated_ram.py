"""Calibrated RAM: what a head does for this question, beyond what it does for any."""

from jaxtyping import Float
from torch import Tensor

from corelens.metrics.definition import Metric
from corelens.metrics.mass import over_rows


def calibrated_ram(
    evidence: Float[Tensor, "*layer head row"],
    null_evidence: Float[Tensor, "*layer head null_row"],
    reduce: str = "mean",
) -> Float[Tensor, "*layer head"]:
    """RAM minus RAM under the null question "N/A" on the same picture and region; attention mass,
    −1 to 1.

    A head that always stares at salient places has RAM without retrieving anything: calibration
    takes that away. With the mean over rows this is S_cal of MMRetHeads (arXiv 2605.27243); the
    null question is that of QRHead's calibration (arXiv 2506.09944).

    Args:
        evidence: what each row puts on G.
        null_evidence: what the same rows put on G in a forward whose question is "N/A".
        reduce: over rows, "mean" or "max".
    """
    return over_rows(evidence, reduce) - over_rows(null_evidence, reduce)


CALIBRATED_RAM = Metric(
    "calibrated_ram", calibrated_ram, needs=("evidence", "null_evidence"), keys="sum", reduce="mean"
)
