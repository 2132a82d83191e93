"""How thorough a study is. The rules by which it judges stand in `criteria`, and no option changes
them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from corelens.errors import CorelensError

PUBLISHED, LAST = "ram", "ram[rows=last]"
READINGS = {
    PUBLISHED: "RAM at the question's tokens, as published",
    LAST: "RAM at the last row (ours)",
}
# the rows that a reading reads; also groups of `where_read`
ROWS = {PUBLISHED: "question", LAST: "last"}
KINDS = ("zero", "uniform", "knockout")
# what stands beside the findings, and can be left out
CURVES, FAITHFULNESS, CAUSAL, DESIGN, REPEATS = (
    "curves", "faithfulness", "causal", "design", "repeats",
)  # fmt: skip
BESIDE = (CURVES, FAITHFULNESS, CAUSAL, DESIGN, REPEATS)
# parameters from which on so many samples are tested by default
LARGE, LARGE_SAMPLES = 50_000_000, 50


@dataclass(frozen=True)
class Options:
    """How thorough a study is.

    Args:
        score_share: share of the samples on which heads are scored; the others are tested.
        draws: random sets at the 5% of the heads.
        curve_draws: random sets at every other share.
        shares: of the heads, for the curves of F5 and F6.
        kinds: interventions of F5's table: "zero" (judged), "uniform", "knockout".
        effect_samples: tested samples for CPR and CMD and for the design space, and scoring
            samples for causal ranks (0: none of them).
        sparse_samples: tested samples in F8, which decodes step by step.
        batch_size: samples a forward.
        seed: of every draw.
        hours: core-hours (processor time) that the study of one model may take, all sessions
            together; what is not measured by then is left out and named. A study that is started
            again with more hours goes on.
        without: what stands beside the findings and is not measured: "curves", "faithfulness",
            "causal" (ranks by single heads' effects), "design" (the space of rankings), "repeats"
            (of rankings, over samples and wordings).
    """

    score_share: float = 1 / 3
    draws: int = 100
    curve_draws: int = 20
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
    kinds: tuple[str, ...] = KINDS
    effect_samples: int = 50
    sparse_samples: int = 200
    batch_size: int = 32
    seed: int = 0
    hours: float = 8.0
    without: Sequence[str] = ()

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or "zero" not in self.kinds:
            raise CorelensError(
                f"interventions {unknown or self.kinds}",
                f"some of {', '.join(KINDS)}, zero among them",
                "F5 is judged by zero: the paper masks whole heads",
            )  # fmt: skip
        wrong = [name for name in self.without if name not in BESIDE]
        if wrong or not self.hours > 0:
            raise CorelensError(
                f"without={wrong}" if wrong else f"hours={self.hours}",
                f"some of {', '.join(BESIDE)}; more than 0 hours", "leave out what is not needed",
            )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """What two sessions of one study have in common: not how long it may take, nor what is
        left out."""
        return {k: v for k, v in self.to_json().items() if k not in ("hours", "without")}

    def to_json(self) -> dict[str, Any]:
        """As report.json carries it."""
        return asdict(self)
