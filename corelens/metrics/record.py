"""Scores taken while a model runs: hooks that read rows of attention and compute every metric of the same rows.

Of a layer's rows only what the metrics make of them is kept, on the layer's own device; it is fetched once a batch.
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
from corelens.metrics.mass import set_weights
from corelens.metrics.registry import Metric, check_finite, head_scores, metric
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
                "scores of a run on bare tensors", "inputs with token maps", "use model.prepare(sample)"
            )
        there = hook.ctx["rows"].cpu()
        every = len(there) // len(self.token_maps)  # several sequences a sample, if a generation draws several
        self.numbers = range(0, len(there), every)
        self.at: list[dict[str, Int[Tensor, " row"]]] = []
        for number, token_map in zip(self.numbers, self.token_maps, strict=True):
            wanted = [(one, one.row_positions(token_map)) for one in metrics]
            self.at.append({one.rows: _places(there[number], at, one, token_map.id) for one, at in wanted})
        self._moved: dict[torch.device, list[dict[str, Tensor]]] = {}

    def on(self, device: torch.device) -> list[dict[str, Int[Tensor, " row"]]]:
        """`at` on a layer's device."""
        if device not in self._moved:
            self._moved[device] = [{rows: at.to(device) for rows, at in of.items()} for of in self.at]
        return self._moved[device]


def _places(there: Tensor, wanted: Tensor, one: Metric, sample: str) -> Int[Tensor, " row"]:
    there = there[there >= 0]
    at = torch.searchsorted(there, wanted)
    if len(wanted) and (int(at.max()) >= len(there) or not torch.equal(there[at], wanted)):
        raise CorelensError(
            f"{one.key} of sample {sample!r} wants rows {wanted.tolist()}, the run reads {there.tolist()}",
            f"a run that reads the {one.rows} rows",
            f"leave model.pattern_rows(…) out, or name {one.rows!r} in it",
        )
    return at


@dataclass
class _Batch:
    """What is kept of one batch while it runs.

    Args:
        places: of the rows.
        weights: [batch, pos, set] of the sets that metrics ask for, by device.
        masses: by layer, what every row puts on each of the sets, [batch, head, row, set].
        scores: by layer and sample, {key: [part, head]} of the metrics that ask for more than masses.
    """

    places: Places
    weights: dict[torch.device, Tensor]
    masses: dict[int, Float[Tensor, "batch head row set"]] = field(default_factory=dict)
    scores: dict[int, list[dict[str, Float[Tensor, "part head"]]]] = field(default_factory=dict)


class Record:
    """Metrics of the heads, taken in any run. `hooks` go into the run; `scores()` after it, or after several.

    Each sample of each batch that runs is one entry, in the order of running; decode steps add nothing. The rows are
    those that the metrics ask for, unless `model.pattern_rows` says otherwise.

    Args:
        metrics: row-based ones; those that need more (see `Metric.needs`) get it from the two below.
        w_o: layer → W_O [head, d_head, d_model] (or `value_mass.same_norms` of it), for metrics that need values.
        null: from a run of the same samples under the null question, for metrics that need it.
    """

    def __init__(
        self, metrics: Sequence[Metric], w_o: Callable[[int], Tensor] | None = None, null: "NullRows | None" = None
    ):
        self.metrics, self._w_o, self._null = list(metrics), w_o, null
        self._sets = sorted({name for one in self.metrics for name in one.sets})
        self._of_rows = [one for one in self.metrics if not one.sets]
        self._batch: _Batch | None = None
        self._step: Tensor | None = None  # the rows that the step reads: while it is the same tensor, so is the step
        self._values: Tensor | None = None
        self._done: dict[str, list[Float[np.ndarray, "part layer head"]]] = {one.key: [] for one in self.metrics}
        self._samples: list[str] = []

        def record_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            self._read(pattern.detach(), hook)

        def record_values(values: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> None:
            self._values = values.detach()

        record_rows.rows = "+".join(dict.fromkeys(m.rows for m in self.metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, record_rows)]
        if any(m.needs == "values" for m in self.metrics):
            self.hooks.insert(0, (_value_points, record_values))

    def _read(self, pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        if self._step is not hook.ctx["rows"]:
            self._step = hook.ctx["rows"]
            self._finish()
            if int(hook.ctx["positions"][0]) == 0:
                places = Places(hook, self.metrics)
                self._batch = _Batch(places, {torch.device("cpu"): set_weights(places.token_maps, self._sets)})
        batch = self._batch
        if batch is None:  # a decode step: what is scored is the prompt
            return
        layer, places, device = hook.layer(), batch.places, pattern.device
        if places.numbers.step > 1:
            pattern = pattern[:: places.numbers.step]
        if self._sets:
            if device not in batch.weights:
                batch.weights[device] = batch.weights[torch.device("cpu")].to(device)
            heads = pattern.shape[1]
            masses = torch.bmm(pattern.flatten(1, 2), batch.weights[device])
            batch.masses[layer] = masses.unflatten(1, (heads, -1))
        if self._of_rows:
            batch.scores[layer] = [self._score(layer, i, pattern[i], at) for i, at in enumerate(places.on(device))]
        self._values = None

    def _score(
        self, layer: int, sample: int, pattern: Float[Tensor, "head row key"], at: dict[str, Tensor]
    ) -> dict[str, Float[Tensor, "part head"]]:
        """The metrics of one sample and layer that ask for more than masses."""
        assert self._batch is not None
        token_map = self._batch.places.token_maps[sample]
        rows = {name: pattern.index_select(1, at[name]) for name in dict.fromkeys(one.rows for one in self._of_rows)}
        scores = {}
        for one in self._of_rows:
            extra: dict[str, Any] = {}
            if one.needs == "values" and self._values is not None and self._w_o is not None:
                values = self._values[self._batch.places.numbers[sample]].transpose(0, 1)
                extra = {"values": values, "w_o": self._w_o(layer)}
            elif one.needs == "null" and self._null is not None:
                extra = self._null.of(layer, sample, one)
            score = one.compute(rows[one.rows], token_map, layer=layer, **extra)
            scores[one.key] = torch.stack(score if isinstance(score, tuple) else (score,)).float()
        return scores

    def _finish(self) -> None:
        """Make scores of the batch that has run: the one place that waits for the device."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        layers = sorted(batch.masses or batch.scores)
        masses = _stacked([batch.masses[layer] for layer in layers]) if self._sets else None
        more = {
            one.key: _stacked([torch.stack([of[one.key] for of in batch.scores[layer]]) for layer in layers])
            for one in self._of_rows
        }
        for i, token_map in enumerate(batch.places.token_maps):
            for one in self.metrics:
                if masses is not None and one.sets:
                    mine = masses[:, i].index_select(2, batch.places.at[i][one.rows])  # [layer, head, row, set]
                    parts = one.of_masses(dict(zip(self._sets, mine.unbind(-1), strict=True)), token_map)
                else:
                    parts = more[one.key][:, i].transpose(0, 1)
                for part in parts:
                    check_finite(part, one, token_map.id)
                self._done[one.key].append(parts.numpy())
            self._samples.append(token_map.id)

    def per_sample(self, one: Metric) -> Float[np.ndarray, "sample part layer head"]:
        """The raw numbers of one metric; `part` is 1, or 2 for a ratio's numerator and denominator."""
        self._finish()
        if not self._samples:
            raise CorelensError("a record of no run", "scores() after a run under record.hooks", "run the model first")
        return np.stack(self._done[one.key])

    def scores(self, meta: dict[str, Any] | None = None) -> dict[str, HeadScores]:
        """The scores of all heads, {key: HeadScores}."""
        raw = {one.key: self.per_sample(one) for one in self.metrics}
        about = {"samples": list(self._samples), **(meta or {})}
        return {one.key: head_scores(one, raw[one.key], describe(one) | about) for one in self.metrics}


def _stacked(layers: list[Tensor]) -> Tensor:
    """The layers' tensors as one, on the CPU, in one transfer."""
    return torch.stack([layer.to(layers[0].device) for layer in layers]).cpu()


def describe(one: Metric) -> dict[str, Any]:
    """What a result says of its metric."""
    return {"metric": one.name, "key": one.key, "rows": one.rows, "reduce": one.reduce, "options": one.options}


class NullRows:
    """What a run under the null question leaves for its metrics: the rows they want, over the regions' keys alone."""

    def __init__(self, metrics: Sequence[Metric]):
        self._metrics = list(metrics)
        self._places: Places | None = None
        self._maps: list[TokenMap] = []
        self._rows: dict[tuple[int, int, str], Float[Tensor, "head row key"]] = {}  # (layer, sample, rows)

        def keep_regions(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            if self._places is None:
                self._places = Places(hook, self._metrics)
                self._maps = [_region_only(token_map) for token_map in self._places.token_maps]
            for i, at in enumerate(self._places.on(pattern.device)):
                region = self._places.token_maps[i].region.to(pattern.device)
                for rows, where in at.items():
                    kept = pattern[i].detach().index_select(1, where).index_select(2, region)
                    self._rows[hook.layer(), i, rows] = kept

        keep_regions.rows = "+".join(dict.fromkeys(one.rows for one in self._metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, keep_regions)]

    def of(self, layer: int, sample: int, one: Metric) -> dict[str, Any]:
        """What a metric with needs="null" is given."""
        return {"null_pattern": self._rows[layer, sample, one.rows], "null_token_map": self._maps[sample]}


def _region_only(token_map: TokenMap) -> TokenMap:
    """The map of a row that holds nothing but the tokens of the regions."""
    region = token_map.region
    regions = zip(token_map.regions, token_map.region_weights, strict=True)
    covered = [(torch.searchsorted(region, tokens), weights) for tokens, weights in regions]
    keys = torch.arange(len(region))
    return TokenMap(torch.ones(len(region), dtype=torch.bool), keys, keys, keys[-1:], covered=covered, id=token_map.id)


class LookedAt:
    """The key that each head looks at most, in the row that predicts each token of a greedy generation."""

    def __init__(self) -> None:
        self._keys: dict[int, list[Int[Tensor, "batch head"]]] = {}  # layer → steps

        def keep_argmax(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            # one row a step: of the prompt its last one, then each token that was written
            self._keys.setdefault(hook.layer(), []).append(_argmax(pattern[:, :, 0]))

        keep_argmax.rows = "last+answer"  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, keep_argmax)]

    def keys(self) -> Int[Tensor, "layer batch head step"]:
        """Positions in the padded row; −1 where attention is not finite."""
        return _stacked([torch.stack(self._keys[layer], dim=-1) for layer in sorted(self._keys)])


def _argmax(row: Float[Tensor, "batch head key"]) -> Int[Tensor, "batch head"]:
    best = row.max(-1)
    return torch.where(best.values.isfinite(), best.indices, -1)


def record(metrics: Iterable[AnyMetric]) -> Record:
    """A record of several metrics from the same rows of the same runs (those that need rows alone)."""
    chosen = [metric(one) for one in metrics]
    for one in chosen:
        if one.needs:
            raise CorelensError(f"{one.key} in a record", "metrics of attention rows alone", "use cl.score_heads")
    return Record(chosen)


class RecordRAM(Record):
    """A record of RAM alone; `scores()` is its HeadScores."""

    def scores(self, meta: dict[str, Any] | None = None) -> HeadScores:  # type: ignore[override]
        """RAM of every head."""
        return super().scores(meta)[self.metrics[0].key]


def record_ram(rows: str = "question", reduce: str = "max") -> RecordRAM:
    """Record RAM in any run: `r = cl.record_ram(); model.run_with_hooks(inputs, fwd_hooks=r.hooks); r.scores()`."""
    return RecordRAM([metric("ram", rows=rows, reduce=reduce)])
