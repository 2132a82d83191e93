"""How many keys each KV head keeps after the prompt: budgets by head score, and what they are
judged against.

All share out the same total: `budget` keys a KV head on the mean, the last `window` keys of the
prompt in every head among them. Which keys a head keeps is another question, see
`corelens.sparse.selection`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.sparse.patterns import at_least

ALLOCATIONS = ("scores", "random", "adakv", "pyramidkv")


@dataclass(frozen=True)
class KVBudget:
    """How many keys of a prompt each KV head keeps: `budget` on average.

    With L layers of n KV heads, s the query heads' scores summed over each KV head's group and
    normalised to Σs = 1 over the model, B = budget − window and m = int(ρB) (SparseMM, arXiv
    2506.05344):

        capacity = round(s · (B − m) · L · n + m) + window

    Capacity above the prompt's length is given back to the other heads, in proportion to their
    scores; with `give_back=False` it is dropped, as in the paper's own code, and the mean is then
    less than `budget`.

    Args:
        scores: of every query head (or from a file of KV heads' scores), none negative; None: all
            heads alike, which is SnapKV (arXiv 2404.14469).
        budget: keys a KV head keeps on the mean; more than `window`.
        rho: the share of B that every head has whatever its score.
        window: the last tokens of the prompt, which every head keeps, and whose attention chooses
            the other keys.
        allocation: "scores", or a baseline of the same total: "random" (the same capacities, dealt
            to other heads), "adakv" (arXiv 2407.11550: within each layer, to the heads whose keys
            have the highest attention, not less than the share `alpha` of B each), "pyramidkv"
            (arXiv 2406.02069: falling in equal steps from the first layer to the last, which has B
            / `beta`).
        seed: of "random".
        give_back: share out what is above the prompt's length; False drops it.
    """

    scores: HeadScores | Any = None
    budget: int = 256
    rho: float = 0.1
    window: int = 32
    allocation: str = "scores"
    seed: int = 0
    alpha: float = 0.2
    beta: int = 20
    give_back: bool = True

    def __post_init__(self) -> None:
        at_least(
            "window", self.window, 1, "the last tokens of the prompt choose which others are kept"
        )
        at_least(
            "budget",
            self.budget,
            self.window + 1,
            f"every head keeps the last {self.window} tokens (window=)",
        )
        at_least("beta", self.beta, 1, "the paper's is 20")
        for name, usual in (("rho", 0.1), ("alpha", 0.2)):
            if not 0 <= getattr(self, name) <= 1:
                raise CorelensError(
                    f"{name}={getattr(self, name)!r}",
                    "a share from 0 to 1",
                    f"the paper's is {usual}",
                )
        if self.allocation not in ALLOCATIONS:
            raise CorelensError(
                f"allocation={self.allocation!r}", f"one of {', '.join(ALLOCATIONS)}", "take one"
            )
        if self.scores is None:
            if self.allocation == "random":
                raise CorelensError(
                    "allocation='random' without scores", "the scores that are dealt", "give scores"
                )
            return
        if not isinstance(self.scores, HeadScores):
            raise CorelensError(
                f"a KVBudget of a {type(self.scores).__name__}",
                "HeadScores, or None for equal budgets",
                'give scores["ram"] of cl.score_heads',
            )
        if self.allocation not in ("scores", "random"):
            raise CorelensError(
                f"scores with allocation={self.allocation!r}",
                "no scores: it does not look at them",
                "leave them out",
            )
        if (self.scores.values < 0).any():
            raise CorelensError(
                f"a KVBudget of scores down to {self.scores.values.min():g}",
                "scores that are not negative",
                "a budget is a share of the sum; a difference of scores (calibrated RAM) has "
                "none: take RAM itself",
            )

    def capacities(
        self,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        length: int,
        layers: Sequence[int] | None = None,
    ) -> Int[np.ndarray, "layer kv_head"]:
        """How many keys of a prompt of `length` tokens each KV head keeps. (AdaKV moves them within
        a layer later.)

        Args:
            n_layers, n_heads, n_kv_heads: the model's shape.
            length: of the prompt, without padding.
            layers: those the budget speaks of, by default all; the others' rows are 0. L is how
                many they are.
        Raises:
            CorelensError: scores of another model.
        """
        budgeted = list(range(n_layers)) if layers is None else list(layers)
        kv_scores = self._kv_scores(n_layers, n_heads, n_kv_heads)[budgeted]
        if not kv_scores.any():
            raise CorelensError(
                f"a KVBudget of scores that are 0 in layers {budgeted[:5]}",
                "a score above 0 there",
                "take other scores",
            )
        spread = self.budget - self.window  # B
        if self.allocation == "pyramidkv":
            wanted = np.repeat(
                _pyramid(spread, self.beta, len(budgeted), length - self.window)[:, None],
                n_kv_heads,
                1,
            )
        else:
            least = int(self.rho * spread)
            wanted = np.rint(
                kv_scores / kv_scores.sum() * (spread - least) * kv_scores.size + least
            )
        capacities = np.zeros((n_layers, n_kv_heads), dtype=np.int64)
        whole = length <= self.budget  # (rounding could cost the mean a key)
        wanted = wanted.astype(np.int64) + self.window
        if not self.give_back:
            capacities[budgeted] = np.minimum(wanted, length)
        else:
            capacities[budgeted] = length if whole else give_back(wanted, kv_scores, length)
        return capacities

    def _kv_scores(
        self, n_layers: int, n_heads: int, n_kv_heads: int
    ) -> Float[np.ndarray, "layer kv_head"]:
        """The score of each KV head: the sum of its query heads' scores."""
        if self.scores is None:
            return np.ones((n_layers, n_kv_heads))
        values = self.scores.values.astype(np.float64)
        heads = n_kv_heads if self.scores.meta.get("heads") == "kv" else n_heads
        if values.shape != (n_layers, heads):
            raise CorelensError(
                f"a KVBudget of scores of {values.shape[0]} layers × {values.shape[1]} heads",
                f"scores of this model: {n_layers} layers × {heads} heads",
                "score the heads of the model that runs",
            )
        kv_scores = values.reshape(n_layers, n_kv_heads, -1).sum(axis=2)
        if self.allocation == "random":
            kv_scores = (
                np.random.default_rng(self.seed)
                .permutation(kv_scores.ravel())
                .reshape(kv_scores.shape)
            )
        return kv_scores


def give_back(
    wanted: Int[np.ndarray, "layer kv_head"],
    kv_scores: Float[np.ndarray, "layer kv_head"],
    length: int,
) -> Int[np.ndarray, "layer kv_head"]:
    """Capacities capped at the prompt's length; the excess goes to the other heads in proportion to
    their scores.

    The sum stays what it was, or all heads keep the whole prompt.
    """
    capacities = np.minimum(wanted, length)
    spare = int(wanted.sum() - capacities.sum())
    while spare and (room := length - capacities).any():
        weights = np.where(room > 0, kv_scores, 0.0)
        if not weights.any():
            weights = (room > 0).astype(float)
        parts = weights / weights.sum() * spare
        more = np.minimum(np.floor(parts).astype(np.int64), room)
        if not more.any():  # less than one key a head is left: one each to those that are owed most
            owed = np.argsort(-np.where(room > 0, parts, -1.0), axis=None, kind="stable")
            more.ravel()[owed[: min(spare, int((room > 0).sum()))]] = 1
        capacities, spare = capacities + more, spare - int(more.sum())
    return capacities


def _pyramid(spread: int, beta: int, n_layers: int, most: int) -> Float[np.ndarray, " layer"]:
    """PyramidKV's budget of each layer: `spread` on average, falling in equal steps to the last
    layer's spread / beta; flatter where a layer would keep more than `most`.

    (The published code rounds the step down, and so gives out up to L² / 2 keys more; here the mean
    is kept.)
    """
    last = spread // beta
    first = 2 * spread - last
    if first > most:
        first, last = max(most, spread), min(2 * spread - most, spread)
    return (
        np.rint(np.linspace(first, last, n_layers)) if n_layers > 1 else np.array([float(spread)])
    )
