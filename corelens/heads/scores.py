"""Heads and their scores: a number for every head, how sure it is, and whether another score says
the same.

Head and HeadSet live in `corelens.heads.head_set` and are found here too.
"""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from corelens.errors import CorelensError
from corelens.heads import combine, mib
from corelens.heads import files as score_files
from corelens.heads import stats as score_stats
from corelens.heads.agreement import Agreement, agreement
from corelens.heads.controls import how_many, random_heads
from corelens.heads.head_set import Head, HeadSet
from corelens.heads.validity import check_missing, numbers, shapes

__all__ = ["Agreement", "Head", "HeadScores", "HeadSet"]


class HeadScores:
    """A score for every head of a model: `values`, and where known the scores of every sample.

    Args:
        values: float [layer, head]; NaN where the model has no such head (layers of other head
            counts). Computed when left out: the mean of `per_sample`, or Σ numerator / Σ
            denominator.
        per_sample: float [sample, layer, head].
        meta: what was scored and how (metric, rows, reduce, key, unit, model, data set, samples,
            …); JSON only.
        parts: (numerator, denominator) per sample [sample, layer, head], for a metric that is a
            ratio of means over samples (precision, lift). A sample with a zero denominator says
            nothing of that head: it is left out there and counted in `left_out`; a head for which
            all are left out scores 0.
    Raises:
        CorelensError: shapes that do not fit, infinite values, or a head that is NaN in some of its
            numbers only.
    """

    def __init__(
        self,
        values: np.ndarray | None = None,
        per_sample: np.ndarray | None = None,
        meta: dict[str, Any] | None = None,
        parts: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.meta: dict[str, Any] = dict(meta or {})
        self.parts = (
            None
            if parts is None
            else (numbers(parts[0], "numerator", 3), numbers(parts[1], "denominator", 3))
        )
        self.per_sample = None if per_sample is None else numbers(per_sample, "per_sample", 3)
        if self.parts is not None:
            numerator, denominator = self.parts
            if numerator.shape != denominator.shape:
                raise shapes(
                    f"a numerator {numerator.shape} over a denominator {denominator.shape}"
                )
            per_ratio = np.full(numerator.shape, np.nan, dtype=np.float32)
            self.per_sample = np.divide(
                numerator, denominator, out=per_ratio, where=denominator != 0
            )
        if values is None:
            if self.per_sample is None or len(self.per_sample) == 0:
                raise CorelensError(
                    "neither values nor per_sample nor parts", "one of them", "see HeadScores"
                )
            summed = [x.sum(0, dtype=np.float64) for x in (self.parts or (self.per_sample,))]
            values = score_stats.ratio(
                summed[0], summed[1] if self.parts else None, len(self.per_sample)
            )
        self.values = numbers(values, "values", 2)
        if self.per_sample is not None and self.per_sample.shape[1:] != self.values.shape:
            raise shapes(
                f"values {self.values.shape} with per-sample scores {self.per_sample.shape}"
            )
        for name, x in zip(("numerator", "denominator"), self.parts or (), strict=False):
            check_missing(x, name, self.exists)
        if self.parts is None and self.per_sample is not None:
            check_missing(self.per_sample, "per_sample", self.exists)
        if not self.exists.any():
            raise CorelensError(
                "scores that are all NaN", "a number for one head at least", "score again"
            )

    # --- which heads

    @property
    def exists(self) -> Bool[np.ndarray, "layer head"]:
        """True where the model has this head: its score is a number."""
        return ~np.isnan(self.values)

    def top(
        self, fraction: float | int | None = None, *, k: int | None = None, seed: int = 0
    ) -> HeadSet:
        """The best heads, best first: a share of all that exist, or exactly `k`.

        Args:
            fraction: a share, max(1, round(fraction · number of heads)): `top(0.05)`, `top(1.0)`
                for all of them. A whole number is `k`: `top(1)` is one head.
            k: how many.
            seed: of the draw that breaks exact ties, so that an arbitrary order of layers never
                decides.
        """
        return self._named(score_stats.ranking(self.values, seed)[: self._count(fraction, k)])

    def bottom(
        self, fraction: float | int | None = None, *, k: int | None = None, seed: int = 0
    ) -> HeadSet:
        """The lowest heads that exist, lowest first; the same ranking as `top` read from its other
        end."""
        return self._named(score_stats.ranking(self.values, seed)[::-1][: self._count(fraction, k)])

    def random(
        self,
        fraction: float | int | None = None,
        *,
        k: int | None = None,
        seed: int = 0,
        exclude: HeadSet | None = None,
        match: str | None = None,
    ) -> HeadSet:
        """A control for a claim about k heads: k random heads OUTSIDE them.

        Args:
            fraction, k: how many, as for `top`; by default as many as `exclude`.
            seed: the draw; take several.
            exclude: the heads that the claim is about; by default `top` of the same size.
            match: "layer" draws as many in each layer as `exclude` has there. Where a layer has too
                few left, the rest comes from the nearest layers that have some, with a warning: a
                control of fewer heads would look harmless. In a small model a layer-matched draw
                takes the next-best heads: say so where shown.
        Raises:
            CorelensError: fewer than k heads are left in the whole model.
        """
        k = (
            len(exclude)
            if exclude is not None and fraction is None and k is None
            else self._count(fraction, k)
        )
        claim = self.top(k=k) if exclude is None else exclude
        return random_heads(self.exists, claim, k, seed, match)

    # --- how sure

    def ci(
        self, level: float = 0.95, n_boot: int = 1000, seed: int = 0
    ) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """(low, high): percentile bootstrap over samples, in the score's unit. Needs two samples or
        more."""
        numerator, denominator = self._samples("a confidence interval")
        over = np.median if self.meta.get("over_samples") == "median" else None
        return score_stats.bootstrap(numerator, denominator, level, n_boot, seed, over)

    def split_half(self, n_splits: int = 20, seed: int = 0) -> float:
        """Spearman between the scores from two random halves of the samples, mean over `n_splits`
        seeded draws."""
        return score_stats.split_half(*self._samples("split halves"), n_splits, seed)

    @property
    def left_out(self) -> Int[np.ndarray, "layer head"]:
        """For each head the number of samples left out because its ratio was undefined there."""
        if self.parts is None:
            return np.zeros(self.values.shape, dtype=np.int64)
        return (self.parts[1] == 0).sum(axis=0)

    # --- does another score say the same

    def agreement(
        self,
        other: "HeadScores",
        fraction: float = 0.05,
        *,
        k: int | None = None,
        p: float = 0.9,
        seed: int = 0,
    ) -> Agreement:
        """Agreement(spearman, jaccard, rbo, k) with the scores of another metric, data set or
        checkpoint.

        `spearman`: rank correlation over all heads, −1 to 1. `jaccard`: |A ∩ B| / |A ∪ B| of the
        two top sets, 0 to 1. `rbo`: extrapolated rank-biased overlap, 0 to 1; `p` says how deep it
        looks (about 1 / (1 − p) ranks).
        """
        combine.check_same_shape(self, other)
        k = self._count(None if k is not None else fraction, k)
        return agreement(self.values, other.values, k, p, seed)

    def baseline(self, kind: str, seed: int = 0) -> "HeadScores":
        """A ranking that knows less than this one: what any claim about its top heads must beat.

        Args:
            kind: "layer": every head gets the mean of its layer (ties are drawn), so that only the
                layer ranks; "depth-matched": the layer's scores are dealt out to its heads at
                random, so that a top set has as many heads in each layer as this one's; "random":
                all scores are dealt out to all heads at random. (A fourth baseline is a metric:
                "visual_mass".)
            seed: of the draw.
        """
        values = score_stats.baseline(self.values, kind, seed)
        meta = {
            name: value
            for name, value in self.meta.items()
            if name not in ("metric", "key", "unit")
        }
        label = f"{kind} baseline of {self.label}"
        return HeadScores(
            values, meta={**meta, "metric": label, "key": label, "baseline": kind, "seed": seed}
        )

    def gini(self) -> float:
        """How concentrated the score is: 0 when all heads score the same, towards 1 when one head
        holds everything."""
        return score_stats.gini(self.values)

    def mass_of_top(self, fraction: float = 0.05) -> float:
        """The share of the summed score that the top `fraction` of heads holds, 0 to 1; negative
        scores count as 0."""
        ordered = np.sort(np.clip(self.values[self.exists], 0, None).astype(np.float64))[::-1]
        total = ordered.sum()
        return float(ordered[: self._count(fraction, None)].sum() / total) if total else 0.0

    def by_layer(self) -> Float[np.ndarray, " layer"]:
        """The mean score of each layer's heads; NaN for a layer without heads."""
        n = self.exists.sum(axis=1)
        return np.where(n > 0, np.nansum(self.values, axis=1) / np.maximum(n, 1), np.nan)

    def __sub__(self, other: "HeadScores") -> "HeadScores":
        """This score minus another, head by head; sample by sample too when both speak of the same
        samples."""
        return HeadScores(*combine.difference(self, other))

    @staticmethod
    def mean(scores: "Iterable[HeadScores]") -> "HeadScores":
        """The mean over data sets, each with the same weight however many samples it has; no
        per-sample scores."""
        return HeadScores(*combine.mean(list(scores)))

    def normalised(self) -> "HeadScores":
        """The same scores divided by their sum over all heads, so that Σ = 1."""
        total = float(np.nansum(self.values, dtype=np.float64))
        if total <= 0:
            raise CorelensError(
                f"scores whose sum is {total}", "a positive sum", "there is nothing to normalise"
            )
        parts = None if self.parts is None else (self.parts[0], self.parts[1] * total)
        per_sample = None if self.parts or self.per_sample is None else self.per_sample / total
        return HeadScores(self.values / total, per_sample, {**self.meta, "normalised": True}, parts)

    # --- files

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; its format is described in `corelens.heads.files`."""
        tensors = {"values": self.values}
        if self.parts is not None:
            tensors |= {"numerator": self.parts[0], "denominator": self.parts[1]}
        elif self.per_sample is not None:
            tensors["per_sample"] = self.per_sample
        score_files.write(path, tensors, self.meta)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HeadScores":
        """Read what `save` wrote; a truncated file, another format or another version is a
        CorelensError."""
        tensors, meta = score_files.read(path)
        parts = (
            (tensors["numerator"], tensors["denominator"])
            if {"numerator", "denominator"} <= set(tensors)
            else None
        )
        return cls(tensors["values"], None if parts else tensors.get("per_sample"), meta, parts)

    @classmethod
    def from_duo_attention(
        cls, path: str | os.PathLike, n_heads: int | None = None
    ) -> "HeadScores":
        """DuoAttention's trained gates (arXiv 2410.10819) from `full_attention_heads.tsv` or the
        folder it lies in.

        The file has one gate a KV head. With `n_heads` (the model's query heads) each query head
        gets its group's gate; without it the scores stay [layer, kv_head] and `meta["heads"]` says
        so. Where its `config.json` lies beside it, `meta["streaming"]` holds what the other heads
        saw: `cl.Streaming.of(scores)`.
        """
        gates = score_files.read_duo_attention(path)
        meta: dict[str, Any] = {
            "metric": "duo_attention",
            "key": "duo_attention",
            "source": os.fspath(path),
        }
        sizes = score_files.read_duo_config(path)
        if sizes is not None:
            meta["streaming"] = {"sink": sizes["sink_size"], "window": sizes["recent_size"]}
        if n_heads is None:
            return cls(gates, meta={**meta, "heads": "kv"})
        if n_heads % gates.shape[1]:
            raise CorelensError(
                f"n_heads={n_heads} for a file of {gates.shape[1]} KV heads",
                "a multiple of it",
                "see the model's config",
            )
        return cls(np.repeat(gates, n_heads // gates.shape[1], axis=1), meta=meta)

    @classmethod
    def from_sparsemm(cls, path: str | os.PathLike) -> "HeadScores":
        """SparseMM's visual-head scores (arXiv 2506.05344), JSON {"layer-head": [one a sample]};
        the mean of each list.

        As published they are not normalised; `.normalised()` makes Σ = 1.
        """
        values, per_sample = score_files.read_layer_head_lists(path)
        return cls(
            values,
            per_sample,
            {"metric": "visual_head", "key": "visual_head", "source": os.fspath(path)},
        )

    @classmethod
    def from_retrieval_head(cls, path: str | os.PathLike) -> "HeadScores":
        """Retrieval_Head's scores (arXiv 2404.15574), JSON {"layer-head": [one a sample]}; the mean
        of each list."""
        values, per_sample = score_files.read_layer_head_lists(path)
        return cls(
            values,
            per_sample,
            {"metric": "retrieval", "key": "retrieval", "source": os.fspath(path)},
        )

    @classmethod
    def from_mib(cls, path: str | os.PathLike) -> "HeadScores":
        """Node scores of a circuit in the JSON of MIB (arXiv 2504.13151); see
        `corelens.heads.mib`."""
        values, meta = mib.read_nodes(path)
        return cls(values, meta=meta)

    def to_mib(
        self, path: str | os.PathLike, d_model: int | None = None, top: float | int = 1.0
    ) -> None:
        """Write these scores as node scores of a circuit in MIB's JSON; see `corelens.heads.mib`.

        Args:
            path: the file, for instance `importances.json`.
            d_model: the model's width; by default what `meta` says, else 0 (MIB needs it for
                neurons only).
            top: the heads that are in the circuit. (MIB chooses them by the ABSOLUTE score when it
                evaluates.)
        """
        width = d_model if d_model is not None else int(self.meta.get("d_model") or 0)
        mib.write_nodes(path, self.values, self.top(top), width)

    # --- looking

    @property
    def label(self) -> str:
        """What the score is called in tables and on axes."""
        return str(self.meta.get("key") or self.meta.get("metric") or "score")

    def plot(self, highlight: HeadSet | None = None, ax: Any = None) -> Any:
        """The layer × head grid as a matplotlib figure; see `corelens.viz.head_grids`."""
        from corelens.viz.head_grids import head_grid

        return head_grid(self, highlight=highlight, ax=ax)

    def _repr_html_(self) -> str:
        from corelens.viz.head_grids import head_grid_html

        return head_grid_html(self)

    def __repr__(self) -> str:
        n = "" if self.per_sample is None else f", {len(self.per_sample)} samples"
        best = ", ".join(
            f"{head} {self.values[head]:.3g}" for head in self.top(k=min(3, int(self.exists.sum())))
        )
        layers, heads = self.values.shape
        return f"HeadScores({self.label}: {layers} layers × {heads} heads{n}; top {best})"

    # --- inside

    def _count(self, fraction: float | int | None, k: int | None) -> int:
        return how_many(int(self.exists.sum()), fraction, k)

    def _named(self, flat: Int[np.ndarray, " k"]) -> HeadSet:
        return HeadSet(zip(*np.unravel_index(flat, self.values.shape), strict=True))

    def _samples(self, quantity: str) -> "tuple[np.ndarray, np.ndarray | None]":
        if self.parts is not None:
            return self.parts
        if self.per_sample is None:
            raise CorelensError(
                f"scores without per-sample values, for {quantity}",
                "scores of single samples",
                "score the samples again",
            )
        return self.per_sample, None
