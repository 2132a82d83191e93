"""Every threshold of the study, and where it comes from. The findings read them here; a test stands
at each of them.

They were fixed before the study was run. A threshold whose source is "ours" is ours; the others are
published numbers (S: known to us from summaries of the paper's text, not from the text itself).

A measured number is compared with its 95% interval: where that contains the threshold, the samples
are too few to tell, and the finding is not judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

CORE, MM_HEADS, SPARSEMM = "arXiv 2606.05843", "arXiv 2605.27243", "arXiv 2506.05344"


@dataclass(frozen=True)
class Threshold:
    """A number that a verdict depends on.

    Args:
        finding: "F1" to "F8", or "all".
        value: the number; shares and accuracies are between 0 and 1.
        meaning: what is compared with it.
        source: the publication that it is taken from, or "ours".
    """

    finding: str
    value: float
    meaning: str
    source: str = "ours"


ACCURACY = Threshold("all", 0.8, "a world counts if the model answers at least this share of it")
TOP = Threshold("all", 0.05, "share of the heads that are called CoRe heads", f"{CORE}, abstract")
QUANTILE = Threshold(
    "all", 0.95, "the quantile of the random controls that the top heads must exceed"
)
DRAWS = Threshold("all", 20, "random sets at the least: fewer have no 95% quantile")

HALF_IN = Threshold(
    "F1", 0.102, "half of the positive excess RAM lies in at most this share of the heads, "
        "interval included",
    f"{MM_HEADS}: 4.4 to 10.2%",
)  # fmt: skip
SPEARMAN = Threshold(
    "F2",
    0.79,
    "rank correlation of RAM between two worlds, at the least",
    f"{CORE} (S): 0.79 to 0.92",
)
TRANSFER = Threshold(
    "F2", 0.5, "cost of another world's heads, as a share of what the world's own heads cost"
)
DEPTH = Threshold(
    "F3", 0.5, "mean relative depth of the top heads, interval included", f"{CORE}, abstract"
)
SIZES = Threshold("F3", 3, "sizes of one family from which a slope over sizes is judged")
NECESSARY = Threshold(
    "F5", 0.2, "share of the clean accuracy that masking the top heads costs", f"{CORE}, abstract"
)
HARMLESS = Threshold(
    "F5", 0.05, "share of the clean accuracy that masking the bottom heads costs, at the most"
)
SUFFICIENT = Threshold(
    "F6", 0.9, "share of the clean accuracy with only these heads seeing the picture"
)
PARITY = Threshold(
    "F7", 0.01, "accuracy lost with the top heads full, at the most", f"{CORE} (S): below 1 point"
)
PARITY_HIGH = Threshold("F7", 0.03, "upper end of the 95% interval of that loss")
ALLOWED = Threshold("F7", 1.2, "speed is judged where the operation count allows this speed-up")
REACHED = Threshold("F7", 0.7, "share of the allowed speed-up that is reached")
VISUAL_HALF_IN = Threshold(
    "F8", 0.05, "half of the visual-head score lies in at most this share of the heads", SPARSEMM
)
BETTER = Threshold(
    "F8", 0.0, "log-probability that budgets by score gain over equal ones, interval above this"
)
DECODE = Threshold("F8", 1.38, "speed-up of decoding", SPARSEMM)
MEMORY = Threshold("F8", 0.52, "share of the KV cache's bytes that is saved", SPARSEMM)

THRESHOLDS = tuple(value for value in list(globals().values()) if isinstance(value, Threshold))


def at_least(interval: Mapping[str, float], threshold: float) -> bool | None:
    """Whether the whole interval lies at or above the threshold; False: below it; None: it contains
    it, and these samples do not tell."""
    if interval["low"] >= threshold:
        return True
    return False if interval["high"] < threshold else None


def above(interval: Mapping[str, float], threshold: float) -> bool | None:
    """As `at_least`, but an interval that ends at the threshold is not above it."""
    if interval["low"] > threshold:
        return True
    return False if interval["high"] <= threshold else None


def at_most(interval: Mapping[str, float], threshold: float) -> bool | None:
    """Whether the whole interval lies at or below the threshold; False: above it; None: it contains
    it."""
    if interval["high"] <= threshold:
        return True
    return False if interval["low"] > threshold else None
