"""What a metric is: a plain function, the inputs that it needs, and its reductions and options.

    score of a head = over samples ( over rows ( over keys ( attention of a row on a set of keys )))

Its four choices are `rows`, `keys` (the reduction over keys), `reduce` (over rows) and `samples`
(over samples): the axes of the design space of arXiv 2608.27417.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError, did_you_mean
from corelens.metrics.mass import KEY_REDUCTIONS, REDUCTIONS, SETS, Column, key_weights, masses
from corelens.tokens.positions import check_where
from corelens.tokens.token_map import TokenMap

Score = Tensor | tuple[Tensor, Tensor]  # [head], or (numerator, denominator) for a ratio of means
SAMPLE_REDUCTIONS = ("mean", "median", "rank_mean", "vote")
SINKS = ("kept", "left_out")
NULL_MASS = "null_evidence"
NAMED_OPTIONS = ("rows", "keys", "reduce", "samples", "sinks")  # in this order a key names them


@dataclass(frozen=True)
class Metric:
    """A score of heads. Made by `metric(…)`, or by hand for a score of your own.

        Metric("sharpest", lambda pattern: pattern.amax((-2, -1)), needs=("pattern",))

    Args:
        name: what results call it.
        function: the score of one sample. It is called with the inputs that `needs` names, in that
            order, and with `options` by name.
        needs: names of its inputs. Attention of the rows on a set of keys, [*layer, head, row]:
            "evidence" (M_G), "visual" (M_V), "even_mass", "shifted" (see `mass.SETS`),
            "null_evidence" (M_G under the question "N/A"). Or of one layer: "pattern" [head, row,
            key], "layer" (its number), "null_pattern" and "null_token_map", "values" and "w_o".
            While the model writes: "looked" [head, step] (the key with most attention), "steps",
            "texts". And "token_map".
        rows: the query rows it reads, a name of `TokenMap.positions`: "question", "last", "answer",
            …
        keys: how attention is reduced over a set of keys: "sum", "mean", "max" or "hit"; None: only
            the sum makes sense.
        reduce: how rows are reduced, "mean" or "max", which the function gets as `reduce=`; None:
            the function has no such option.
        samples: how samples are reduced: "mean", "median", "rank_mean" (of each sample's ranks of
            heads, 1 the best, 0 the last) or "vote" (the share of samples that have the head in
            their top 5%).
        sinks: "left_out" takes the visual sinks (`cl.metrics.visual_sinks`) out of G and V.
        options: the function's own options and their values.
        ratio: whether it returns (numerator, denominator), summed over samples before they are
            divided.
        region: whether it needs a region that its rows can see.
        finish: turns the numbers of all samples [part, sample, layer, head] into per-sample scores,
            for metrics whose score of a sample depends on the other samples.
        base: the metric with default options of which this one is a variant; None if it is itself
            the default.
    """

    name: str
    function: Callable[..., Any]
    needs: tuple[str, ...] = ("pattern", "token_map")
    rows: str = "question"
    keys: str | None = None
    reduce: str | None = None
    samples: str = "mean"
    sinks: str = "kept"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    ratio: bool = False
    region: bool = True
    finish: Callable[[np.ndarray], np.ndarray] | None = None
    base: "Metric | None" = field(default=None, compare=False, repr=False)

    # --- what it is called

    @property
    def key(self) -> str:
        """The name, followed by the options that differ from the default:
        "ram[rows=last,reduce=max]"."""
        base = self.base or self
        changed = {
            name: getattr(self, name)
            for name in NAMED_OPTIONS
            if getattr(self, name) != getattr(base, name)
        }
        changed |= {
            name: self.options[name] for name in sorted(self.options) if self._differs(base, name)
        }
        options = ",".join(f"{name}={value}" for name, value in changed.items())
        return f"{self.name}[{options}]" if changed else self.name

    def _differs(self, base: "Metric", option: str) -> bool:
        return option not in base.options or self.options[option] != base.options[option]

    def with_options(self, free: bool = False, **options: Any) -> "Metric":
        """This metric with other options: rows, keys, reduce, samples, sinks, and the function's
        own.

        Args:
            free: any option is taken (the function has **kwargs).
        Raises:
            CorelensError: an option that the metric does not have, or a value that does not exist.
        """
        changes = {
            name: value for name in NAMED_OPTIONS if (value := options.pop(name, None)) is not None
        }
        if changes.get("rows", self.rows) != self.rows:
            check_where(changes["rows"])
        self._check_choice("keys", changes.get("keys"), KEY_REDUCTIONS, self.keys is not None)
        self._check_choice("reduce", changes.get("reduce"), REDUCTIONS, self.reduce is not None)
        whole = self.ratio or self.finish is not None
        self._check_choice("samples", changes.get("samples"), SAMPLE_REDUCTIONS, not whole)
        own_map = not {"looked", "null_token_map"} & set(self.needs)
        self._check_choice("sinks", changes.get("sinks"), SINKS, own_map)
        unknown = [name for name in options if name not in self.options and not free]
        if unknown:
            choices = {"keys": self.keys, "reduce": self.reduce}
            takes = [
                "rows",
                *(name for name, value in choices.items() if value is not None),
                *self.options,
            ]
            raise CorelensError(
                f"{unknown[0]}={options[unknown[0]]!r} for {self.name}",
                f"an option that it has: {', '.join(takes)}",
                f"{did_you_mean(unknown[0], takes, 'choose one')} options: {', '.join(takes)}",
            )
        return replace(self, **changes, options={**self.options, **options}, base=self.base or self)

    def _check_choice(
        self, option: str, value: Any, values: tuple[str, ...], has_choice: bool
    ) -> None:
        if value is None or (has_choice and value in values) or value == getattr(self, option):
            return
        raise CorelensError(
            f"{option}={value!r} for {self.name}",
            f"{option}= one of {', '.join(values)}"
            if has_choice
            else f"no {option}: {self.name} says itself how these are taken together",
            "leave it out",
        )

    # --- what it reads

    @property
    def columns(self) -> tuple[Column, ...]:
        """The masses of a run's rows that it needs: a set of keys and the reduction over these
        keys."""
        return tuple(Column(name, self.keys or "sum") for name in self.needs if name in SETS)

    @property
    def of_masses(self) -> bool:
        """Whether it needs only masses of rows (and the token map), so that it can score all layers
        in one call."""
        return all(name in SETS or name in (NULL_MASS, "token_map") for name in self.needs)

    @property
    def needs_null(self) -> bool:
        """Whether it needs a run under the null question "N/A"."""
        return any(name.startswith("null_") for name in self.needs)

    @property
    def needs_values(self) -> bool:
        """Whether it needs v and W_O."""
        return "values" in self.needs

    @property
    def needs_answering(self) -> bool:
        """Whether it needs a run in which the model writes an answer."""
        return "looked" in self.needs

    @property
    def needs_rows_alone(self) -> bool:
        """Whether it needs only rows of one run."""
        more = self.needs_null or self.needs_values or self.needs_answering
        return not more and self.sinks == "kept"

    def row_positions(self, token_map: TokenMap) -> Int[Tensor, " row"]:
        """The rows to read in this sample; an error if they cannot see the evidence that the metric
        is about."""
        with named(self):
            if self.region:
                return token_map.evidence_rows(self.rows)
            return token_map.positions(self.rows, rows=True)

    # --- the score

    def __call__(
        self, pattern: Float[Tensor, "head row key"] | None, token_map: TokenMap, **inputs: Any
    ) -> Score:
        """The score of every head of one layer, for one sample.

        Args:
            pattern: the rows that `row_positions` names, post-softmax, padding excluded, float32;
                None for metrics that watch the model write.
            token_map: the sample's.
            inputs: what else `needs` names (the null run's masses are made of `null_pattern` and
                `null_token_map`).
        Returns:
            [head], or (numerator, denominator), each [head], if `ratio`; `localization` returns two
            to be finished.
        Raises:
            CorelensError: no row, an input or a part of the sample that is missing, a result of
                another shape.
        """
        available = {"pattern": pattern, "token_map": token_map, **inputs}
        with named(self):
            if pattern is not None:
                available |= _masses_of(pattern, token_map, self.columns)
            if NULL_MASS in self.needs and "null_pattern" in inputs:
                evidence = (Column("evidence", self.keys or "sum"),)
                null = _masses_of(inputs["null_pattern"], inputs["null_token_map"], evidence)
                available[NULL_MASS] = null["evidence"]
            score = self.score(available, token_map.id)
            first = pattern if pattern is not None else inputs.get("looked")
            for part in score if isinstance(score, tuple) else (score,):
                _check_shape(part, None if first is None else first.shape[0])
        return score

    def score(self, inputs: Mapping[str, Any], sample: str) -> Score:
        """The function's value for inputs by name; an error names the metric and what is
        missing."""
        with named(self):
            missing = [name for name in self.needs if inputs.get(name) is None]
            if missing:
                raise CorelensError(
                    f"no {', '.join(missing)}", f"what {self.name} needs", "use cl.score_heads"
                )
            first = inputs[self.needs[0]]
            row_axis = -2 if self.needs[0] == "pattern" else -1
            no_rows = isinstance(first, Tensor) and first.shape[row_axis] == 0
            if no_rows and not self.needs_answering:
                raise CorelensError(
                    f"sample {sample!r} without {self.rows} rows",
                    "a row or more",
                    "choose other rows",
                )
            options = dict(self.options)
            if self.reduce is not None:
                options["reduce"] = self.reduce
            return self.function(*(inputs[name] for name in self.needs), **options)


def _masses_of(
    pattern: Float[Tensor, "head row key"], token_map: TokenMap, columns: tuple[Column, ...]
) -> dict[str, Float[Tensor, "head row"]]:
    if not columns:
        return {}
    weights = key_weights([token_map], columns).to(pattern)
    of_columns = masses(pattern[None], weights, columns)[0].unbind(-1)
    return {column.tokens: mass for column, mass in zip(columns, of_columns, strict=True)}


def _check_shape(part: Any, heads: int | None) -> None:
    if not isinstance(part, Tensor) or part.ndim != 1 or (heads is not None and len(part) != heads):
        raise CorelensError(
            f"a score of {tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__}",
            f"a tensor of {heads} numbers, one a head",
            "return a tensor [head]",
        )


def check_finite(scores: Float[Tensor, "layer head"], metric: Metric, sample: str) -> None:
    """Raise if a sample's scores hold NaN or infinity, saying where. Called once a sample: asking
    the GPU after every layer would hold up the forward pass."""
    wrong = (~torch.isfinite(scores)).nonzero().tolist()
    if wrong:
        layer, head = wrong[0]
        raise CorelensError(
            f"{metric.key} of sample {sample!r}: {scores[layer, head].item()} at L{layer}H{head}",
            "finite attention",
            "run in bfloat16 or float32: half precision overflows in some models",
        )


class named:
    """Puts the metric's name in front of an error, so that it says which score wanted what is
    missing."""

    def __init__(self, metric: Metric):
        self.metric = metric

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CorelensError) and not error.given.startswith(f"{self.metric.key}: "):
            raise CorelensError(
                f"{self.metric.key}: {error.given}", error.expected, error.do
            ) from error
