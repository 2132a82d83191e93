"""Scores taken while a model runs: hooks that read rows of attention and compute every metric of
the same rows.

Only the metrics' numbers are stored, not the rows. They stay on each layer's device until the batch
has run, and are then fetched by one transfer.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.metrics.definition import NULL_MASS, Metric, check_finite
from corelens.metrics.null_rows import NullRows
from corelens.metrics.over_samples import head_scores
from corelens.metrics.registry import metric
from corelens.metrics.rows import Masses, RowIndices, rows_points, stacked
from corelens.metrics.sinks import without

AnyMetric = str | Metric | Callable[..., Any]


def _value_points(name: str) -> bool:
    return name.endswith("attn.hook_v")


@dataclass
class _Batch:
    """The numbers of one batch while it runs.

    Args:
        rows: which rows each metric needs.
        masses: the rows' attention mass on the sets of keys.
        heads: how many heads each layer has.
        scores: {layer: [sample]}, each {key: [part, head]}, of the metrics that need more than
            masses.
    """

    rows: RowIndices
    masses: Masses
    heads: tuple[int, ...]
    scores: dict[int, list[dict[str, Float[Tensor, "part head"]]]] = field(default_factory=dict)


class Record:
    """Metrics of the heads, taken in any run. `hooks` go into the run; `scores()` after it, or
    after several.

    Each sample of each batch that runs is one entry, in the order of running; decode steps add
    nothing. The rows are those that the metrics ask for, unless `model.pattern_rows` says
    otherwise.

    Args:
        metrics: row-based ones; those that need more than rows (see `Metric.needs`) get it from the
            three below.
        w_o: layer → W_O [head, d_head, d_model] (or `value_mass.same_norms` of it), for metrics
            that need values.
        null: from a run of the same samples under the null question, for metrics that need it.
        sinks: per sample of the batch which of its visual tokens are sinks, for metrics that leave
            them out.
    """

    def __init__(
        self, metrics: Sequence[Metric], w_o: Callable[[int], Tensor] | None = None,
        null: NullRows | None = None,
        sinks: Sequence[Tensor] | None = None,
    ):  # fmt: skip
        self.metrics, self._w_o, self._null, self._sinks = list(metrics), w_o, null, sinks
        self._columns = list(
            dict.fromkeys((m.sinks, column) for m in self.metrics for column in m.columns)
        )
        self._of_layer = [m for m in self.metrics if not m.of_masses]
        self._batch: _Batch | None = None
        # the rows that the step reads: while it is the same tensor, so is the step
        self._step: Tensor | None = None
        self._values: Tensor | None = None
        self._done: dict[str, list[Float[np.ndarray, "part layer head"]]] = {
            m.key: [] for m in self.metrics
        }
        self._samples: list[str] = []

        def record_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            self._read(pattern.detach(), hook)

        def record_values(values: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> None:
            self._values = values.detach()

        record_rows.rows = "+".join(dict.fromkeys(m.rows for m in self.metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(rows_points, record_rows)]
        if any(m.needs_values for m in self.metrics):
            self.hooks.insert(0, (_value_points, record_values))

    def _read(self, pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        if self._step is not hook.ctx["rows"]:
            self._step = hook.ctx["rows"]
            self._finish()
            if int(hook.ctx["positions"][0]) == 0:
                rows = RowIndices(hook, self.metrics)
                masses = Masses(rows.token_maps, self._columns, self._sinks)
                self._batch = _Batch(rows, masses, hook.ctx["heads"])
        batch = self._batch
        if batch is None:  # a decode step: what is scored is the prompt
            return
        layer, rows = hook.layer(), batch.rows
        if rows.numbers.step > 1:  # several sequences a sample: the first
            pattern = pattern[:: rows.numbers.step]
        batch.masses.read(layer, pattern)
        if self._of_layer:
            indices = enumerate(rows.on(pattern.device))
            batch.scores[layer] = [self._score(layer, i, pattern[i], of) for i, of in indices]
        self._values = None

    def _score(
        self,
        layer: int,
        sample: int,
        pattern: Float[Tensor, "head row key"],
        indices: dict[str, Tensor],
    ) -> dict[str, Float[Tensor, "part head"]]:
        """The metrics of one sample and layer that need more than masses."""
        assert self._batch is not None
        token_map = self._batch.rows.token_maps[sample]
        rows = {
            name: pattern.index_select(1, indices[name])
            for name in dict.fromkeys(m.rows for m in self._of_layer)
        }
        scores = {}
        for m in self._of_layer:
            inputs: dict[str, Any] = {"layer": layer}
            if m.needs_values and self._values is not None and self._w_o is not None:
                values = self._values[self._batch.rows.numbers[sample]].transpose(0, 1)
                inputs |= {"values": values, "w_o": self._w_o(layer)}
            if m.needs_null and self._null is not None:
                inputs |= self._null.pattern_of(layer, sample, m)
            leave_out = self._sinks is not None and m.sinks == "left_out"
            own_map = without(token_map, self._sinks[sample]) if leave_out else token_map  # type: ignore[index]
            score = m(rows[m.rows], own_map, **inputs)
            scores[m.key] = torch.stack(score if isinstance(score, tuple) else (score,)).float()
        return scores

    def _finish(self) -> None:
        """Score the batch that has run. Only this waits for the device."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        of_rows = batch.masses.fetch()
        more = {}  # {key: [layer, sample, part, head]} of the metrics that need more than masses
        for m in self._of_layer:
            layers = [batch.scores[layer] for layer in sorted(batch.scores)]
            of_layers = [torch.stack([scores[m.key] for scores in layer]) for layer in layers]
            more[m.key] = stacked(of_layers, 2)
        for i, token_map in enumerate(batch.rows.token_maps):
            for m in self.metrics:
                if m.of_masses:
                    inputs: dict[str, Any] = {"token_map": token_map}
                    for column in m.columns:
                        of_sample = of_rows[m.sinks, column][:, i]  # [layer, head, row]
                        indices = batch.rows.indices[i][m.rows]
                        inputs[column.tokens] = of_sample.index_select(-1, indices)
                    if m.needs_null and self._null is not None:
                        inputs[NULL_MASS] = self._null.evidence_of(i, m)
                    score = m.score(inputs, token_map.id)
                    # [part, layer, head]
                    parts = torch.stack(score if isinstance(score, tuple) else (score,))
                else:
                    parts = more[m.key][:, i].transpose(0, 1)
                self._done[m.key].append(in_all_layers(parts, batch.heads, m, token_map.id))
            self._samples.append(token_map.id)

    def per_sample(self, metric: Metric) -> Float[np.ndarray, "sample part layer head"]:
        """The raw numbers of one metric; `part` is 1, or 2 for a ratio's numerator and
        denominator."""
        self._finish()
        if not self._samples:
            raise CorelensError(
                "a record of no run",
                "scores() after a run under record.hooks",
                "run the model first",
            )
        return np.stack(self._done[metric.key])

    def scores(self, meta: dict[str, Any] | None = None) -> dict[str, HeadScores]:
        """The scores of all heads, {key: HeadScores}."""
        raw = {m.key: self.per_sample(m) for m in self.metrics}
        about = {"samples": list(self._samples), **(meta or {})}
        return {m.key: head_scores(m, raw[m.key], describe(m) | about) for m in self.metrics}


def in_all_layers(
    parts: Float[Tensor, "part some head"], heads: Sequence[int], metric: Metric, sample: str
) -> Float[np.ndarray, "part layer head"]:
    """The scores of all layers, from those of the layers that have heads; NaN where a head does not
    exist.

    Args:
        parts: the layers with heads, in their order.
        heads: how many heads each layer of the model has.

    Raises CorelensError if a head that exists has no finite score.
    """
    exists = torch.arange(parts.shape[2]) < torch.tensor(heads)[:, None]
    scores = parts.new_zeros(len(parts), *exists.shape)
    scores[:, exists.any(1)] = parts
    scores[:, ~exists] = 0
    for part in scores:
        check_finite(part, metric, sample)
    scores[:, ~exists] = torch.nan
    return scores.numpy()


def describe(metric: Metric) -> dict[str, Any]:
    """What a result says of its metric; `over_samples` is how samples were reduced ("samples" are
    their names)."""
    return {
        "metric": metric.name,
        "key": metric.key,
        "rows": metric.rows,
        "keys": metric.keys or ("sum" if metric.columns else ""),
        "reduce": metric.reduce or "",
        "over_samples": metric.samples,
        "sinks": metric.sinks,
        "options": dict(metric.options),
    }


def record_metrics(metrics: Iterable[AnyMetric]) -> Record:
    """A record of several metrics from the same rows of the same runs (those that need rows
    alone)."""
    of_rows = [metric(wanted) for wanted in metrics]
    if more := [m.key for m in of_rows if not m.needs_rows_alone]:
        raise CorelensError(
            f"{more[0]} in a record", "metrics of attention rows alone", "use cl.score_heads"
        )
    return Record(of_rows)


class RecordRAM(Record):
    """A record of RAM alone; `scores()` is its HeadScores."""

    def scores(self, meta: dict[str, Any] | None = None) -> HeadScores:  # type: ignore[override]
        """RAM of every head."""
        return super().scores(meta)[self.metrics[0].key]


def record_ram(rows: str = "question", reduce: str = "mean") -> RecordRAM:
    """Record RAM in any run: `r = cl.record_ram(); model.run_with_hooks(inputs, fwd_hooks=r.hooks);
    r.scores()`.

    Args:
        rows, reduce: as for `cl.metric("ram", …)`; by default RAM as published, the mean over the
            question's tokens.
    """
    return RecordRAM([metric("ram", rows=rows, reduce=reduce)])
