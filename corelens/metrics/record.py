"""Scores taken while a model runs: hooks that read rows of attention and compute every metric of
the same rows.

Of a layer's rows only what the metrics make of them is kept, on the layer's own device; it is
fetched once a batch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.metrics.definition import NULL_MASS, Metric, check_finite
from corelens.metrics.mass import Column, key_weights, masses
from corelens.metrics.over_samples import head_scores
from corelens.metrics.registry import metric
from corelens.metrics.sinks import without
from corelens.tokens.token_map import TokenMap

AnyMetric = str | Metric | Callable[..., Any]


def _rows_points(name: str) -> bool:
    return name.endswith("attn.hook_pattern_rows")


def _value_points(name: str) -> bool:
    return name.endswith("attn.hook_v")


class Places:
    """Where the rows that each metric wants of each sample stand among those that a run reads.

    Looked up once a batch, not in every layer: it is work on the CPU that holds up the device.

    Args:
        hook: of a rows point that fires.
        metrics: what is wanted.
    """

    def __init__(self, hook: Any, metrics: Sequence[Metric]):
        self.token_maps: list[TokenMap] = hook.ctx["inputs"].token_maps
        if not self.token_maps:
            raise CorelensError(
                "scores of a run on bare tensors",
                "inputs with token maps",
                "use model.prepare(sample)",
            )
        there = hook.ctx["rows"].cpu()
        # several sequences a sample, if a generation draws several
        every = len(there) // len(self.token_maps)
        self.numbers = range(0, len(there), every)
        self.at: list[dict[str, Int[Tensor, " row"]]] = []
        for number, token_map in zip(self.numbers, self.token_maps, strict=True):
            wanted = [(m, m.row_positions(token_map)) for m in metrics]
            self.at.append(
                {m.rows: _places(there[number], rows, m, token_map.id) for m, rows in wanted}
            )
        self._moved: dict[torch.device, list[dict[str, Tensor]]] = {}

    def on(self, device: torch.device) -> list[dict[str, Int[Tensor, " row"]]]:
        """`at` on a layer's device."""
        if device not in self._moved:
            self._moved[device] = [
                {rows: at.to(device) for rows, at in of.items()} for of in self.at
            ]
        return self._moved[device]


def _places(there: Tensor, wanted: Tensor, metric: Metric, sample: str) -> Int[Tensor, " row"]:
    there = there[there >= 0]
    at = torch.searchsorted(there, wanted)
    if len(wanted) and (int(at.max()) >= len(there) or not torch.equal(there[at], wanted)):
        raise CorelensError(
            f"{metric.key} of sample {sample!r} wants rows {wanted.tolist()}, the run reads {there.tolist()}",
            f"a run that reads the {metric.rows} rows",
            f"leave model.pattern_rows(…) out, or name {metric.rows!r} in it",
        )
    return at


class Masses:
    """What every row of a run puts on the sets of keys that metrics need, layer by layer.

    Args:
        token_maps: of the running batch.
        columns: what is wanted: (whether visual sinks are "kept" or "left_out", the set of keys and
            its reduction).
        sinks: per sample which of its visual tokens are sinks, as indices into `token_map.visual`.
    """

    def __init__(
        self,
        token_maps: Sequence[TokenMap],
        columns: Sequence[tuple[str, Column]],
        sinks: Sequence[Tensor] | None,
    ):
        self._columns = list(columns)
        variants = {"kept": list(token_maps)}
        if sinks is not None:
            variants["left_out"] = [
                without(*of_sample) for of_sample in zip(token_maps, sinks, strict=True)
            ]
        each = [key_weights(variants[variant], [column]) for variant, column in self._columns]
        self._weights = {torch.device("cpu"): torch.cat(each, dim=-1)} if each else {}
        # layers without heads are not there
        self._of_layer: dict[int, Float[Tensor, "batch head row column"]] = {}

    def read(self, layer: int, pattern: Float[Tensor, "batch head row key"]) -> None:
        """Take the masses of one layer's rows."""
        if not self._columns:
            return
        device = pattern.device
        if device not in self._weights:
            self._weights[device] = self._weights[torch.device("cpu")].to(device)
        self._of_layer[layer] = masses(
            pattern, self._weights[device], [column for _, column in self._columns]
        )

    def fetch(self) -> dict[tuple[str, Column], Float[Tensor, "layer batch head row"]]:
        """The masses of all layers, on the CPU: the one place that waits for the device."""
        if not self._of_layer:
            return {}
        stacked = _stacked([self._of_layer[layer] for layer in sorted(self._of_layer)], 1)
        return dict(zip(self._columns, stacked.unbind(-1), strict=True))


@dataclass
class _Batch:
    """What is kept of one batch while it runs.

    Args:
        places: of the rows.
        masses: what the rows put on the sets of keys.
        heads: how many heads each layer has.
        scores: by layer and sample, {key: [part, head]} of the metrics that need more than masses.
    """

    places: Places
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
        self, metrics: Sequence[Metric], w_o: Callable[[int], Tensor] | None = None, null: "NullRows | None" = None,
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
        self.hooks: list[Hook] = [(_rows_points, record_rows)]
        if any(m.needs_values for m in self.metrics):
            self.hooks.insert(0, (_value_points, record_values))

    def _read(self, pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        if self._step is not hook.ctx["rows"]:
            self._step = hook.ctx["rows"]
            self._finish()
            if int(hook.ctx["positions"][0]) == 0:
                places = Places(hook, self.metrics)
                read = Masses(places.token_maps, self._columns, self._sinks)
                self._batch = _Batch(places, read, hook.ctx["heads"])
        batch = self._batch
        if batch is None:  # a decode step: what is scored is the prompt
            return
        layer, places = hook.layer(), batch.places
        if places.numbers.step > 1:
            pattern = pattern[:: places.numbers.step]
        batch.masses.read(layer, pattern)
        if self._of_layer:
            rows_of = enumerate(places.on(pattern.device))
            batch.scores[layer] = [self._score(layer, i, pattern[i], rows) for i, rows in rows_of]
        self._values = None

    def _score(
        self, layer: int, sample: int, pattern: Float[Tensor, "head row key"], at: dict[str, Tensor]
    ) -> dict[str, Float[Tensor, "part head"]]:
        """The metrics of one sample and layer that need more than masses."""
        assert self._batch is not None
        token_map = self._batch.places.token_maps[sample]
        rows = {
            name: pattern.index_select(1, at[name])
            for name in dict.fromkeys(m.rows for m in self._of_layer)
        }
        scores = {}
        for m in self._of_layer:
            inputs: dict[str, Any] = {"layer": layer}
            if m.needs_values and self._values is not None and self._w_o is not None:
                values = self._values[self._batch.places.numbers[sample]].transpose(0, 1)
                inputs |= {"values": values, "w_o": self._w_o(layer)}
            if m.needs_null and self._null is not None:
                inputs |= self._null.pattern_of(layer, sample, m)
            leave_out = self._sinks is not None and m.sinks == "left_out"
            own_map = without(token_map, self._sinks[sample]) if leave_out else token_map  # type: ignore[index]
            score = m(rows[m.rows], own_map, **inputs)
            scores[m.key] = torch.stack(score if isinstance(score, tuple) else (score,)).float()
        return scores

    def _finish(self) -> None:
        """Make scores of the batch that has run: the one place that waits for the device."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        of_rows = batch.masses.fetch()
        more = {
            m.key: _stacked(
                [
                    torch.stack([s[m.key] for s in batch.scores[layer]])
                    for layer in sorted(batch.scores)
                ],
                2,
            )
            for m in self._of_layer
        }
        for i, token_map in enumerate(batch.places.token_maps):
            for m in self.metrics:
                if m.of_masses:
                    inputs: dict[str, Any] = {"token_map": token_map}
                    for column in m.columns:
                        every_row = of_rows[m.sinks, column][:, i]  # [layer, head, row]
                        inputs[column.tokens] = every_row.index_select(
                            -1, batch.places.at[i][m.rows]
                        )
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


def _stacked(layers: list[Tensor], head_axis: int) -> Tensor:
    """The layers' tensors as one, on the CPU, in one transfer; fewer heads are filled up with 0."""
    most = max(layer.shape[head_axis] for layer in layers)
    after = [0, 0] * (layers[0].ndim - head_axis - 1)
    filled = [
        torch.nn.functional.pad(layer, [*after, 0, most - layer.shape[head_axis]])
        for layer in layers
    ]
    return torch.stack([layer.to(layers[0].device) for layer in filled]).cpu()


def in_all_layers(
    parts: Float[Tensor, "part some head"], heads: Sequence[int], metric: Metric, sample: str
) -> Float[np.ndarray, "part layer head"]:
    """Scores of the layers that have heads, put where these layers stand; NaN where there is no
    head.

    Args:
        parts: the layers with heads, in their order.
        heads: how many heads each layer of the model has.

    Raises CorelensError if a head that exists has no finite score.
    """
    exists = torch.arange(parts.shape[2]) < torch.tensor(heads)[:, None]
    every = parts.new_zeros(len(parts), *exists.shape)
    every[:, exists.any(1)] = parts
    every[:, ~exists] = 0
    for part in every:
        check_finite(part, metric, sample)
    every[:, ~exists] = torch.nan
    return every.numpy()


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


class NullRows:
    """What a run under the null question leaves for its metrics: masses, and the rows over the
    regions' keys alone.

    Args:
        metrics: those that need it.
        sinks: as for `Record`.
    """

    def __init__(self, metrics: Sequence[Metric], sinks: Sequence[Tensor] | None = None):
        self._metrics, self._sinks = list(metrics), sinks
        self._columns = list(
            dict.fromkeys(
                (m.sinks, Column("evidence", m.keys or "sum"))
                for m in self._metrics
                if NULL_MASS in m.needs
            )
        )
        self._places: Places | None = None
        self._masses: Masses | None = None
        self._fetched: dict[tuple[str, Column], Float[Tensor, "layer batch head row"]] | None = None
        self._maps: list[TokenMap] = []
        # (layer, sample, rows)
        self._rows: dict[tuple[int, int, str], Float[Tensor, "head row key"]] = {}

        def keep_regions(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            pattern = pattern.detach()
            if self._places is None:
                self._places = Places(hook, self._metrics)
                self._masses = Masses(self._places.token_maps, self._columns, self._sinks)
                self._maps = [_region_only(token_map) for token_map in self._places.token_maps]
            assert self._masses is not None
            self._masses.read(hook.layer(), pattern)
            if all(NULL_MASS in m.needs for m in self._metrics):
                return
            for i, at in enumerate(self._places.on(pattern.device)):
                region = self._places.token_maps[i].region.to(pattern.device)
                for rows, where in at.items():
                    region_rows = pattern[i].index_select(1, where).index_select(2, region)
                    self._rows[hook.layer(), i, rows] = region_rows

        keep_regions.rows = "+".join(dict.fromkeys(m.rows for m in self._metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, keep_regions)]

    def pattern_of(self, layer: int, sample: int, metric: Metric) -> dict[str, Any]:
        """`null_pattern` and `null_token_map` of one sample and layer."""
        return {
            "null_pattern": self._rows[layer, sample, metric.rows],
            "null_token_map": self._maps[sample],
        }

    def evidence_of(self, sample: int, metric: Metric) -> Float[Tensor, "layer head row"]:
        """`null_evidence` of one sample: what the rows put on the region, in all layers."""
        assert self._places is not None and self._masses is not None
        if self._fetched is None:
            self._fetched = self._masses.fetch()
        every_row = self._fetched[metric.sinks, Column("evidence", metric.keys or "sum")][:, sample]
        return every_row.index_select(-1, self._places.at[sample][metric.rows])


def _region_only(token_map: TokenMap) -> TokenMap:
    """The map of a row that holds nothing but the tokens of the regions."""
    region = token_map.region
    regions = zip(token_map.regions, token_map.region_weights, strict=True)
    covered = [(torch.searchsorted(region, tokens), weights) for tokens, weights in regions]
    keys = torch.arange(len(region))
    return TokenMap(
        torch.ones(len(region), dtype=torch.bool),
        keys,
        keys,
        keys[-1:],
        covered=covered,
        id=token_map.id,
    )


class LookedAt:
    """The key that each head looks at most, in the row that predicts each token of a greedy
    generation."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Int[Tensor, "batch head"]]] = {}  # layer → steps

        def keep_argmax(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            # one row a step: of the prompt its last one, then each token that was written
            self._keys.setdefault(hook.layer(), []).append(_argmax(pattern[:, :, 0]))

        keep_argmax.rows = "last+answer"  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, keep_argmax)]

    def keys(self) -> Int[Tensor, "layer batch head step"]:
        """Positions in the padded row; −1 where attention is not finite."""
        return _stacked([torch.stack(self._keys[layer], dim=-1) for layer in sorted(self._keys)], 1)


def _argmax(row: Float[Tensor, "batch head key"]) -> Int[Tensor, "batch head"]:
    best = row.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)


def record_metrics(metrics: Iterable[AnyMetric]) -> Record:
    """A record of several metrics from the same rows of the same runs (those that need rows
    alone)."""
    chosen = [metric(wanted) for wanted in metrics]
    if more := [m.key for m in chosen if not m.needs_rows_alone]:
        raise CorelensError(
            f"{more[0]} in a record", "metrics of attention rows alone", "use cl.score_heads"
        )
    return Record(chosen)


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
