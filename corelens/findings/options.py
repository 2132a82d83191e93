"""How thorough a study is. The rules by which it judges stand in `criteria`, and no option changes
them."""

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
        effect_samples: tested samples for CPR and CMD (0: not measured).
        sparse_samples: tested samples in F7 and F8, which decode step by step.
        batch_size: samples a forward.
        seed: of every draw.
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

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or "zero" not in self.kinds:
            raise CorelensError(
                f"interventions {unknown or self.kinds}", f"some of {', '.join(KINDS)}, zero among them",
                "F5 is judged by zero: the paper masks whole heads",
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As report.json carries it."""
        return asdict(self)
