"""What a study is made of: how heads are ranked, which are ablated and how, how many draws."""

from dataclasses import asdict, dataclass
from typing import Any

from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores

RANKINGS = {  # how heads are ranked → the metric that ranks them; the papers leave rows and reduction open
    "RAM (question rows, max)": "ram[reduce=max]",
    "RAM (question rows, mean)": "ram",
    "RAM (last row)": "ram[rows=last]",
}
CONTROLLED = ("RAM (question rows, max)", "RAM (last row)")  # rankings that get controls and curves of their own
READERS = {  # rows that may read the evidence → what is said of them
    "question": "the question's tokens",
    "last+answer": "the last row (and the answer's)",
    "question+last+answer": "both",
    "text": "every text token",
}
KINDS = ("zero", "mean", "uniform", "knockout")
KIND_WORDS = {
    "zero": "zero: z := 0",
    "mean": "mean: z := its mean",
    "uniform": "uniform: equal attention",
    "knockout": "knockout: the region out of sight",
}
LEVEL = 1 - 0.05 / len(RANKINGS)  # of the intervals that verdicts rest on: three readings of RAM are tried
LEAST_ACCURACY = 0.3  # a model must answer this share before it can lose 20 points


@dataclass(frozen=True)
class Options:
    """How thorough a study is.

    Args:
        fraction: the share of heads that are called CoRe heads.
        draws: how many random and layer-matched sets are drawn for each control.
        kinds: the ablations of the table.
        fractions, sweep_kinds: shares and ablations of the curves.
        kept: shares of heads that keep sight of the picture in F6.
        windows: how many windows and budgets are tried in F7 and F8.
        sparse_samples: at most so many test samples in F7 and F8, which decode step by step.
        score_share: share of the samples that heads are scored on (and the mean z is taken from); the rest tests them.
        scenes: how many samples are shown.
        batch_size: samples a forward.
        seed: of every draw.
    """

    fraction: float = 0.05
    draws: int = 3
    kinds: tuple[str, ...] = KINDS
    fractions: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    sweep_kinds: tuple[str, ...] = ("mean", "knockout")
    kept: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2, 0.5)
    windows: int = 4
    sparse_samples: int = 200
    score_share: float = 0.4
    scenes: int = 5
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [kind for kind in (*self.kinds, *self.sweep_kinds) if kind not in KINDS]
        if wrong or "knockout" not in self.kinds:
            raise CorelensError(
                f"ablations {wrong or self.kinds}",
                f"some of {', '.join(KINDS)}, knockout among them",
                "verdicts rest on it: it is the papers' own",
            )

    def to_json(self) -> dict[str, Any]:
        """As a result carries it."""
        return asdict(self)


def selection_name(role: str, ranking: str) -> str:
    """What a table calls a way to choose heads."""
    return {"random": "random", "layer-matched": f"random, same layers as {ranking}"}.get(role, f"{role}: {ranking}")


def selections(
    scores: dict[str, HeadScores], fraction: float, draws: int, seed: int
) -> dict[tuple[str, str], list[HeadSet]]:
    """{(role, ranking): sets}: the top of each ranking and its controls; random heads lie outside every top."""
    ranked = {name: scores[key] for name, key in RANKINGS.items()}
    tops = {name: one.top(fraction) for name, one in ranked.items()}
    k, every = len(tops[CONTROLLED[0]]), HeadSet([head for top in tops.values() for head in top])
    first = ranked[CONTROLLED[0]]
    found = {("top", name): [top] for name, top in tops.items()}
    found |= {("bottom", name): [ranked[name].bottom(k=k)] for name in CONTROLLED}
    found["random", ""] = [first.random(k=k, seed=seed + i, exclude=every) for i in range(draws)]
    for name in CONTROLLED:
        matched = [ranked[name].random(k=k, seed=seed + i, exclude=tops[name], match="layer") for i in range(draws)]
        found["layer-matched", name] = matched
    return found
