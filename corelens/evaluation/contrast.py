"""Are these heads the ones? Accuracy under sparse inference with the top heads kept, against as
many others kept.

If the top heads carry the evidence, a model with these heads full and the others sparse answers as
before, and with as many random heads full it does not. The same for KV budgets: keys shared out by
a score, against as many keys shared out evenly, or the same shares dealt to other heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from corelens.errors import CorelensError
from corelens.evaluation.answers import Evaluation
from corelens.evaluation.decoding import Asked, ask
from corelens.evaluation.evaluate import batches
from corelens.evaluation.sparse_run import answered_under, check_scores, machine
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import Interval, accuracy_difference, accuracy_interval, mean_interval
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Sample
from corelens.model.hooked import HookedMLLM
from corelens.runs.provenance import about
from corelens.sparse import KVBudget, SparseInference, Streaming

NONE = "no full head"
CLAIMS = ("top", "by score")  # lines that the others are controls of


@dataclass
class ContrastPoint:
    """The answers under one choice of full heads or budget: a line of the figure at one x.

    Args:
        line: "top", "random", "by score" …; "top, RAM (last row)" where several rankings are
            compared.
        share: the share of heads that are full; for KV budgets None.
        x: the window, or the keys kept a KV head.
        correct, logprob: of each sample, the mean over draws.
        draws: the accuracy of each draw of heads.
        heads: the full heads of each draw.
    """

    line: str
    share: float | None
    x: int
    correct: Float[np.ndarray, " sample"] = field(repr=False)
    logprob: Float[np.ndarray, " sample"] = field(repr=False)
    draws: list[float]
    heads: list[list[list[int]]] = field(repr=False, default_factory=list)

    @property
    def accuracy(self) -> Interval:
        """With its 95% interval over samples."""
        return accuracy_interval(self.correct)

    @property
    def answer_logprob(self) -> Interval:
        """With its 95% interval over samples."""
        return mean_interval(self.logprob)


@dataclass
class SparseContrast:
    """Accuracy over what is kept, for the chosen heads and their controls, all on the same samples.

    Args:
        kind: "pattern" or "kv_budget".
        dense: the model as it is.
        points: one for each line, share and x.
    """

    kind: str
    dense: Evaluation
    points: list[ContrastPoint]
    meta: dict[str, Any] = field(default_factory=dict)

    def point(self, line: str, x: int, share: float | None = None) -> ContrastPoint:
        """The point of this line at this x and share."""
        for point in self.points:
            if point.line == line and point.x == x and point.share in (share, None):
                return point
        raise CorelensError(
            f"{line!r} at {x}" + (f" and a share of {share}" if share is not None else ""),
            f"lines {', '.join(dict.fromkeys(p.line for p in self.points))} at "
            f"{sorted({p.x for p in self.points})}",
            "take one of these",
        )

    def differences(self) -> list[dict[str, Any]]:
        """Each top line minus each of its controls at the same x: accuracy and log-probability,
        paired, with 95% CI."""
        differences = []
        tops = [point for point in self.points if point.line.startswith(CLAIMS)]
        controls = [point for point in self.points if not point.line.startswith(CLAIMS)]
        for point, control in product(tops, controls):
            same_ranking = _ranking(control.line) in (_ranking(point.line), "")
            same_share = control.share in (point.share, None)
            if control.x == point.x and same_share and same_ranking:
                accuracy = accuracy_difference(point.correct, control.correct)
                logprob = mean_interval(point.logprob - control.logprob)
                differences.append(
                    {
                        "line": point.line,
                        "control": control.line,
                        "share": point.share,
                        "x": point.x,
                        "accuracy": accuracy._asdict(),
                        "answer_logprob": logprob._asdict(),
                    }
                )
        return differences

    def plot(self, metric: str = "accuracy", **options: Any) -> Any:
        """`metric` ("accuracy" or "answer_logprob") over window or keys kept, a panel a share of
        full heads."""
        from corelens.viz.speed import speed_curves

        if metric not in ("accuracy", "answer_logprob"):
            raise CorelensError(f"metric={metric!r}", "'accuracy' or 'answer_logprob'", "take one")
        panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
        known = {p.share for p in self.points if p.share is not None}
        shares: list[float | None] = [*sorted(known)] or [None]
        rankings = dict.fromkeys(_ranking(p.line) for p in self.points if p.line.startswith(CLAIMS))
        for ranking, share in product(rankings, shares):
            points = [
                p
                for p in self.points
                if p.share in (share, None) and _ranking(p.line) in (ranking, "")
            ]
            full = (
                "" if share is None else f"{share:.0%} of heads full ({len(points[-1].heads[0])})"
            )
            by_line = panels.setdefault("\n".join(filter(None, (ranking, full))), {})
            for p in sorted(points, key=lambda p: not p.line.startswith(CLAIMS)):
                by_line.setdefault(p.line.removesuffix(f", {ranking}"), []).append(
                    (p.x, *getattr(p, metric))
                )
        options = {"columns": len(shares) if len(shares) > 1 else len(rankings)} | options
        dense = self.dense.accuracy if metric == "accuracy" else self.dense.answer_logprob
        words = "accuracy" if metric == "accuracy" else "answer log-probability, nats"
        xlabel = "window, tokens" if self.kind == "pattern" else "keys kept, mean a KV head"
        return speed_curves(
            panels, xlabel, dense, ylabel=words, percent=metric == "accuracy", **options
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) of every point."""
        columns = ["kept", "full heads", "window" if self.kind == "pattern" else "keys a KV head"]
        rows = [
            [
                p.line,
                "–" if p.share is None else f"{p.share:.0%}",
                str(p.x),
                str(p.accuracy),
                str(p.answer_logprob),
            ]
            for p in self.points
        ]
        return [*columns, "accuracy", "answer log-probability (nats)"], rows

    def _repr_html_(self) -> str:
        from corelens.viz.page import table
        from corelens.viz.view import image_html

        hot = [i for i, point in enumerate(self.points) if point.line.startswith(CLAIMS)]
        metric = "accuracy" if self.kind == "pattern" else "answer_logprob"
        caption = (
            f"On {len(self.dense.per_sample)} samples, 95% intervals; dense {self.dense.interval}."
        )
        return (
            f"{table(*self.table(), caption, hot=hot)}{image_html(self.plot(metric), repr(self))}"
        )

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(point.line for point in self.points))
        dense = f"{len(self.dense.per_sample)} samples, dense accuracy {self.dense.interval}"
        return f"SparseContrast({self.kind}: {names}; {dense})"

    def to_json(self) -> dict[str, Any]:
        """Every point, every paired difference, and the heads of every draw."""
        return {
            "format": "corelens-contrast/1",
            "kind": self.kind,
            "samples": len(self.dense.per_sample),
            "dense": {
                "accuracy": self.dense.interval._asdict(),
                "answer_logprob": self.dense.answer_logprob,
            },
            "points": [
                {
                    "line": p.line,
                    "share": p.share,
                    "x": p.x,
                    "accuracy": p.accuracy._asdict(),
                    "answer_logprob": p.answer_logprob._asdict(),
                    "draws": p.draws,
                    "heads": p.heads,
                }
                for p in self.points
            ],
            "differences": self.differences(),
            **self.meta,
        }


def sparse_contrast(
    model: HookedMLLM,
    samples: Sequence[Sample],
    scores: HeadScores | Mapping[str, HeadScores],
    fractions: Sequence[float] = (0.02, 0.05, 0.1, 0.2),
    windows: Sequence[int] = (64, 256, 1024),
    sink: int = 4,
    last: int = 0,
    draws: int = 5,
    decode: str = "full",
    engine: str = "auto",
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> SparseContrast:
    """Keep the top heads full and the others under Streaming(sink, window, last); then as many
    others full.

    Controls at every share of heads and every window: bottom heads; random heads outside every
    ranking's top; random heads of the same layers as the top (in a small model these are the
    next-best heads); no full head at all.

    Args:
        samples: questions with answers; not those that the scores were taken from.
        scores: one ranking, or several by name.
        draws: how many random and layer-matched sets each.
    """
    ranked = {"": scores} if isinstance(scores, HeadScores) else dict(scores)
    asked = _asked(model, samples, ranked, batch_size)
    dense = answered_under(model, asked)
    points = []
    conditions: list[tuple[float | None, str, list[HeadSet]]] = [(None, NONE, [HeadSet()])]
    for fraction in fractions:
        for line, head_sets in _selections(ranked, fraction, draws, seed).items():
            conditions.append((fraction, line, head_sets))
    total = len(windows) * sum(len(head_sets) for _, _, head_sets in conditions)
    with tqdm(total=total, disable=not progress, desc="contrast") as bar:
        for window in windows:
            pattern = Streaming(sink=sink, window=window, last=last)
            for share, line, head_sets in conditions:
                runs = []
                for heads in head_sets:
                    sparse = SparseInference(heads, pattern, decode=decode, engine=engine)  # type: ignore[arg-type]
                    runs.append(answered_under(model, asked, sparse))
                    bar.update()
                points.append(_point(line, share, window, runs, head_sets))
    settings = {"sink": sink, "last": last, "decode": decode, "draws": draws, "seed": seed}
    return SparseContrast("pattern", dense, points, settings | _about(model, ranked))


def budget_contrast(
    model: HookedMLLM,
    samples: Sequence[Sample],
    scores: HeadScores | Mapping[str, HeadScores],
    budgets: Sequence[int] = (64, 128, 256),
    window: int = 32,
    rho: float = 0.1,
    draws: int = 5,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> SparseContrast:
    """Share out as many keys by each score, evenly, and each score's shares dealt to other heads
    (`draws` times).

    Only tokens after the first one of an answer are read from the cache that the budget left:
    samples need answers of several tokens.
    """
    ranked = {"": scores} if isinstance(scores, HeadScores) else dict(scores)
    asked = _asked(model, samples, ranked, batch_size)
    if all(len(gold) < 2 for batch in asked for gold in batch.gold):
        raise CorelensError(
            "answers of one token",
            "answers of several: the first token is predicted before anything is evicted",
            "ask for longer answers",
        )
    dense = answered_under(model, asked)
    points, keys_kept = [], {}
    with tqdm(
        total=len(budgets) * (1 + (1 + draws) * len(ranked)), disable=not progress, desc="budgets"
    ) as bar:
        for budget in budgets:
            size: Any = {"budget": budget, "window": window, "rho": rho}
            by_line = {"uniform": [KVBudget(**size)]}
            for name, ranking in ranked.items():
                of = f", {name}" if name else ""
                dealt = [
                    KVBudget(ranking, **size, allocation="random", seed=seed + i)
                    for i in range(draws)
                ]
                by_line |= {
                    f"by score{of}": [KVBudget(ranking, **size)],
                    f"dealt at random{of}": dealt,
                }
            for line, kv_budgets in by_line.items():
                runs = []
                for kv_budget in kv_budgets:
                    runs.append(answered_under(model, asked, SparseInference(kv_budget=kv_budget)))
                    bar.update()
                points.append(_point(line, None, budget, runs, []))
                keys = [_keys_kept(model, asked, kv_budget) for kv_budget in kv_budgets]
                keys_kept[f"{line} at {budget}"] = float(np.mean(keys))
    settings = {"window": window, "rho": rho, "draws": draws, "seed": seed, "keys_kept": keys_kept}
    return SparseContrast("kv_budget", dense, points, settings | _about(model, ranked))


def _ranking(line: str) -> str:
    """ "top, RAM (last row)" → "RAM (last row)"."""
    return line.partition(", ")[2]


def _asked(
    model: HookedMLLM, samples: Sequence[Sample], ranked: Mapping[str, HeadScores], batch_size: int
) -> list[Asked]:
    if not ranked:
        raise CorelensError(
            "no scores", "one HeadScores or several by name", "score the heads with cl.score_heads"
        )
    for ranking in ranked.values():
        check_scores(ranking, model.cfg)
    return ask(model, batches(model, samples, batch_size))


def _selections(
    ranked: Mapping[str, HeadScores], fraction: float, draws: int, seed: int
) -> dict[str, list[HeadSet]]:
    """{line: sets} of one size."""
    tops = {name: ranking.top(fraction) for name, ranking in ranked.items()}
    all_tops = HeadSet([head for top in tops.values() for head in top])
    selections: dict[str, list[HeadSet]] = {}
    for role in ("top", "layer-matched", "bottom"):
        for name, ranking in ranked.items():
            line, k = f"{role}, {name}" if name else role, len(tops[name])
            if role == "layer-matched":
                selections[line] = [
                    ranking.random(seed=seed + i, exclude=tops[name], match="layer")
                    for i in range(draws)
                ]
            else:
                selections[line] = [tops[name] if role == "top" else ranking.bottom(k=k)]
    first = next(iter(ranked.values()))
    selections["random"] = [
        first.random(fraction, seed=seed + i, exclude=all_tops) for i in range(draws)
    ]
    return selections


def _point(
    line: str, share: float | None, x: int, runs: list[Evaluation], sets: Sequence[HeadSet]
) -> ContrastPoint:
    correct = np.mean([run.correct for run in runs], axis=0)
    logprob = np.mean([run.logprobs for run in runs], axis=0)
    heads, draws = [of_draw.to_json() for of_draw in sets], [run.accuracy for run in runs]
    return ContrastPoint(line, share, x, correct, logprob, draws, heads)


def _keys_kept(model: HookedMLLM, asked: Sequence[Asked], budget: KVBudget) -> float:
    """How many keys a KV head keeps of these prompts, on the mean."""
    shape = model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_kv_heads
    lengths = [len(token_map.all) for batch in asked for token_map in batch.inputs.token_maps]
    return float(np.mean([budget.capacities(*shape, length).mean() for length in lengths]))


def _about(model: HookedMLLM, ranked: Mapping[str, HeadScores]) -> dict[str, Any]:
    return about(model) | {
        "machine": machine(model),
        "rankings": {name: s.label for name, s in ranked.items()},
    }
