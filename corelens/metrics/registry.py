"""A metric by its name: which rows it reads, how they are reduced, with which options, and what else it needs."""

import difflib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.metrics.calibrated_ram import calibrated_ram
from corelens.metrics.gaze import gaze
from corelens.metrics.lift import lift
from corelens.metrics.localization import localization, votes
from corelens.metrics.mass import REDUCTIONS
from corelens.metrics.precision import precision
from corelens.metrics.qr import qr
from corelens.metrics.ram import ram
from corelens.metrics.random import random
from corelens.metrics.retrieval import retrieval
from corelens.metrics.value_mass import value_mass
from corelens.metrics.visual_head import share_of_all, visual_head
from corelens.metrics.visual_mass import visual_mass
from corelens.tokens.positions import check_where
from corelens.tokens.token_map import TokenMap

Score = Tensor | tuple[Tensor, Tensor]  # [head], or (numerator, denominator) for a ratio of means


@dataclass(frozen=True)
class Spec:
    """What a metric is before any option is given.

    Args:
        function: the score of one sample and layer.
        rows: the rows it reads unless told otherwise.
        ratio: whether it returns (numerator, denominator).
        needs: what it needs beside rows: "" nothing; "null": the same rows under the question "N/A" (`null_pattern`,
            `null_token_map`); "values": v and W_O (`values`, `w_o`); "decode": a greedy generation (`steps`, `texts`),
            and instead of a pattern the key that each head looks at most at each step.
        region: whether it needs a region that its rows can see.
        finish: what turns the numbers of all samples [part, sample, layer, head] into per-sample scores, for metrics
            that cannot be said sample by sample.
    """

    function: Callable[..., Any]
    rows: str = "question"
    ratio: bool = False
    needs: str = ""
    region: bool = True
    finish: Callable[[np.ndarray], np.ndarray] | None = None


SPECS: dict[str, Spec] = {
    "ram": Spec(ram),
    "visual_mass": Spec(visual_mass, region=False),
    "precision": Spec(precision, ratio=True),
    "lift": Spec(lift, ratio=True),
    "gaze": Spec(gaze, rows="last"),
    "random": Spec(random, region=False),
    "calibrated_ram": Spec(calibrated_ram, needs="null"),
    "qr": Spec(qr, needs="null"),
    "value_mass": Spec(value_mass, needs="values"),
    "localization": Spec(localization, rows="last", region=False, finish=votes),
    "retrieval": Spec(retrieval, rows="generated", ratio=True, needs="decode"),
    "visual_head": Spec(visual_head, rows="generated", needs="decode", finish=share_of_all),
}


@dataclass(frozen=True)
class Metric:
    """A score with its rows and options fixed; made by `metric(…)`.

    Args:
        name: "ram", "lift", … or the name of the user's function.
        rows: the query rows it reads, a name of `TokenMap.positions` ("question", "last", "answer", …).
        reduce: "max" or "mean" over rows; "" where the metric leaves no choice.
        options: what else was given and differs from its default.
        spec: the function behind it and what it needs.
    """

    name: str
    rows: str
    reduce: str
    options: dict[str, Any] = field(hash=False)
    spec: Spec = field(repr=False)

    @property
    def key(self) -> str:
        """The name, with what differs from the default behind it: "ram[rows=last,reduce=mean]"."""
        given = {} if self.rows == self.spec.rows else {"rows": self.rows}
        given |= {} if self.reduce == _default_reduce(self.spec) else {"reduce": self.reduce}
        given |= dict(sorted(self.options.items()))
        return self.name + (f"[{','.join(f'{k}={v}' for k, v in given.items())}]" if given else "")

    @property
    def ratio(self) -> bool:
        """Whether `compute` returns (numerator, denominator), to be summed over samples before they are divided."""
        return self.spec.ratio

    @property
    def finish(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """[part, sample, layer, head] → per-sample scores, or None if what `compute` returns is the score already."""
        return self.spec.finish

    @property
    def sets(self) -> list[str]:
        """The sets of tokens whose mass is all that the score asks of a pattern; empty if it asks for more."""
        return getattr(self.spec.function, "sets", [])

    @property
    def needs(self) -> str:
        """What it needs beside rows: "" (nothing), "null", "values" or "decode"."""
        return self.spec.needs

    def of_masses(
        self, masses: dict[str, Float[Tensor, "layer head row"]], token_map: TokenMap
    ) -> Float[Tensor, "part layer head"]:
        """The score of every head of all layers, from what its rows put on the sets it asks for (`sets`)."""
        given = {**self.options, **({"reduce": self.reduce} if self.reduce else {})}
        asked = [masses[name] for name in self.sets]
        with _named(self):
            self._check_rows(asked[0].shape[-1], token_map)
            score = self.spec.function.of_masses(*asked, token_map, **given)  # type: ignore[attr-defined]
        return torch.stack(score if isinstance(score, tuple) else (score,))

    def row_positions(self, token_map: TokenMap) -> Int[Tensor, " row"]:
        """The rows to read in this sample; an error if they cannot see the evidence that the metric is about."""
        with _named(self):
            if self.spec.region:
                return token_map.evidence_rows(self.rows)
            return token_map.positions(self.rows, rows=True)

    def compute(
        self,
        pattern: Float[Tensor, "head row key"] | Int[Tensor, "head step"],
        token_map: TokenMap,
        layer: int = 0,
        **extra: Any,
    ) -> Score:
        """The score of every head for one sample and one layer.

        Args:
            pattern: the rows `row_positions` named, post-softmax, padding excluded, float32; for metrics that need
                "decode" the key looked at most at each step.
            token_map: the sample's.
            layer: which layer this is, for metrics that depend on it (`random`).
            extra: what `needs` asks for, under the names of the function's parameters.
        Returns:
            [head], or (numerator, denominator), each [head], if `ratio`; `localization` returns two to be finished.
        Raises:
            CorelensError: no row, a part that the sample lacks, or a result of another shape.
        """
        takes = _parameters(self.spec.function)
        given = {**self.options, **extra}
        if "reduce" in takes:
            given["reduce"] = self.reduce
        if "layer" in takes:
            given["layer"] = layer
        with _named(self):
            lacking = [p.name for p in takes.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            lacking = [name for name in lacking[2:] if name not in given]
            if lacking:
                raise CorelensError(
                    f"no {', '.join(lacking)}", f"what a metric with needs={self.needs!r} is given", "use score_heads"
                )
            self._check_rows(pattern.shape[1], token_map)
            score = self.spec.function(pattern, token_map, **given)
            for part in score if isinstance(score, tuple) else (score,):
                _check(part, pattern.shape[0])
        return score

    def _check_rows(self, rows: int, token_map: TokenMap) -> None:
        if rows == 0:
            raise CorelensError(
                f"sample {token_map.id!r} without {self.rows} rows", "a row or more", "choose other rows"
            )


def head_scores(one: Metric, raw: Float[np.ndarray, "sample part layer head"], meta: dict[str, Any]) -> HeadScores:
    """What `compute` returned for every sample and layer, as HeadScores: a mean, a ratio of means, or finished."""
    if one.finish is not None:
        return HeadScores(per_sample=one.finish(raw.swapaxes(0, 1)), meta=meta)
    if one.ratio:
        return HeadScores(parts=(raw[:, 0], raw[:, 1]), meta=meta)
    return HeadScores(per_sample=raw[:, 0], meta=meta)


def metric(
    name: "str | Metric | Callable[..., Any]", rows: str | None = None, reduce: str | None = None, **options: Any
) -> Metric:
    """A metric with its rows, reduction and options.

    Args:
        name: one of `metrics()`; a key as results carry it ("ram[rows=last]"); or a function of your own,
            f(pattern [head, row, key], token_map) → [head], whose name becomes the metric's.
        rows: which query rows it reads: "question" (default of most), "last", "answer", or a sum of names.
        reduce: "max" (default) or "mean" over rows, for metrics that reduce.
        options: what else the metric takes.
    Raises:
        CorelensError: a name, reduction or option that does not exist.
    """
    if isinstance(name, Metric):
        if rows is None and reduce is None and not options:
            return name
        return _build(
            name.name, name.spec, rows or name.rows, reduce or name.reduce or None, {**name.options, **options}
        )
    if callable(name):
        label = getattr(name, "__name__", type(name).__name__)
        return _build(label, Spec(name, region=False), rows, reduce, options)
    label, written = _parse(name)
    if label not in SPECS:
        near = difflib.get_close_matches(label, SPECS, n=3, cutoff=0.4)
        raise CorelensError(
            f"the metric {label!r}",
            f"one of {', '.join(SPECS)}, or a function of your own",
            f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one of these",
        )
    options = {**written, **options}
    rows, reduce = rows or options.pop("rows", None), reduce or options.pop("reduce", None)
    return _build(label, SPECS[label], rows, reduce, options)


def check_finite(scores: Float[Tensor, "layer head"], metric: Metric, sample: str) -> None:
    """Raise if a sample's scores hold NaN or infinity, saying where. Called once a sample: asking the GPU after every
    layer would hold up the forward pass."""
    wrong = (~torch.isfinite(scores)).nonzero().tolist()
    if wrong:
        layer, head = wrong[0]
        raise CorelensError(
            f"{metric.key} of sample {sample!r}: {scores[layer, head].item()} at L{layer}H{head}",
            "finite attention",
            "run in bfloat16 or float32: half precision overflows in some models",
        )


def metrics() -> tuple[str, ...]:
    """The names that `metric` knows."""
    return tuple(SPECS)


def _build(name: str, spec: Spec, rows: str | None, reduce: str | None, options: dict[str, Any]) -> Metric:
    default = _default_reduce(spec)
    if reduce is not None and (reduce not in REDUCTIONS or not default):
        raise CorelensError(
            f"reduce={reduce!r} for {name}",
            "reduce='max' or reduce='mean'"
            if default
            else f"no reduce: {name} says itself how rows are taken together",
            "leave it out",
        )
    known = _options(spec)
    free = any(p.kind is p.VAR_KEYWORD for p in _parameters(spec.function).values())
    for option in () if free else set(options) - set(known):
        raise CorelensError(
            f"{option}={options[option]!r} for {name}",
            f"one of {', '.join(known) or 'no options'}",
            "see its docstring",
        )
    given = {k: v for k, v in options.items() if k not in known or v != known[k]}  # so that equal metrics are equal
    if rows is not None and rows != spec.rows:
        check_where(rows)
    return Metric(name, rows or spec.rows, reduce or default, given, spec)


def _default_reduce(spec: Spec) -> str:
    reduce = _parameters(spec.function).get("reduce")
    return reduce.default if reduce is not None and isinstance(reduce.default, str) else ""


def _options(spec: Spec) -> dict[str, Any]:
    """The options of a metric and their defaults: what has a default and is not handed over by `compute` itself."""
    parameters = list(_parameters(spec.function).values())[2:]
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in ("reduce", "layer")}


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    """ "ram[rows=last,reduce=mean]" → ("ram", {"rows": "last", "reduce": "mean"})."""
    match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(.*)\])?\s*", name)
    if match is None or (match[2] and not all("=" in part for part in match[2].split(","))):
        raise CorelensError(
            f"the metric {name!r}", 'a name or a key like "ram[rows=last,reduce=mean]"', "check brackets"
        )
    options = {}
    for part in match[2].split(",") if match[2] else ():
        key, value = part.split("=", 1)
        try:
            options[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[key.strip()] = value.strip()
    return match[1], options


def _check(part: Any, heads: int) -> None:
    if not isinstance(part, Tensor) or part.shape != (heads,):
        raise CorelensError(
            f"a score of {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}",
            f"a tensor of {heads} numbers, one a head",
            "return a tensor [head]",
        )


@cache
def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


class _named:
    """Puts the metric's name in front of an error, so that it says which score wanted what is missing."""

    def __init__(self, metric: Metric):
        self.metric = metric

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CorelensError):
            raise CorelensError(f"{self.metric.key}: {error.given}", error.expected, error.do) from error
