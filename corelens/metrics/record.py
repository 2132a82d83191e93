"""Scores taken while a model runs: hooks that read rows of attention and compute every metric of the same rows."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads import HeadScores
from corelens.hooks import Hook
from corelens.metrics.registry import Metric, check_finite, head_scores, metric

AnyMetric = str | Metric | Callable[..., Any]


def _rows_points(name: str) -> bool:
    return name.endswith("attn.hook_pattern_rows")


def _value_points(name: str) -> bool:
    return name.endswith("attn.hook_v")


class Record:
    """Metrics of the heads, taken in any run. `hooks` go into the run; `scores()` after it, or after several.

    Each sample of each batch that runs is one entry, in the order of running; decode steps add nothing. The rows are
    those that the metrics ask for, unless `model.pattern_rows` says otherwise.

    Args:
        metrics: row-based ones; those that need more (see `Metric.needs`) get it from the two below.
        w_o: layer → W_O [head, d_head, d_model], for metrics that need values.
        null: rows kept from a run of the same samples under the null question, for metrics that need it.
    """

    def __init__(
        self, metrics: Sequence[Metric], w_o: Callable[[int], Tensor] | None = None, null: "KeptRows | None" = None
    ):
        self.metrics, self._w_o, self._null = list(metrics), w_o, null
        self._layers: dict[int, list[dict[str, Tensor]]] = {}  # layer → per sample {key: [part, head]}
        self._samples: list[str] = []
        self._values: Tensor | None = None

        def record_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            self._read(pattern, hook)

        def record_values(values: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> None:
            self._values = values

        record_rows.rows = "+".join(dict.fromkeys(m.rows for m in self.metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, record_rows)]
        if any(m.needs == "values" for m in self.metrics):
            self.hooks.insert(0, (_value_points, record_values))

    def _read(self, pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        if int(hook.ctx["positions"][0]) > 0:  # a decode step: what is scored is the prompt
            return
        inputs, layer = hook.ctx["inputs"], hook.layer()
        there = hook.ctx["rows"].cpu()
        for i, token_map in enumerate(inputs.token_maps):
            scores = {}
            for one in self.metrics:
                at = _places(there[i], one.row_positions(token_map), one, token_map.id)
                score = one.compute(
                    pattern[i][:, at.to(pattern.device)], token_map, layer=layer, **self._extra(one, layer, i)
                )
                parts = score if isinstance(score, tuple) else (score,)
                scores[one.key] = torch.stack([part.detach().float().cpu() for part in parts])
            self._layers.setdefault(layer, []).append(scores)
            if layer == 0:
                self._samples.append(token_map.id)

    def _extra(self, one: Metric, layer: int, sample: int) -> dict[str, Any]:
        if one.needs == "values" and self._values is not None and self._w_o is not None:
            return {"values": self._values[sample].transpose(0, 1), "w_o": self._w_o(layer)}
        if one.needs == "null" and self._null is not None:
            null_map = self._null.token_maps[sample]
            at = _places(self._null.rows[sample], one.row_positions(null_map), one, null_map.id)
            return {"null_pattern": self._null.pattern(layer, sample)[:, at], "null_token_map": null_map}
        return {}

    def per_sample(self, one: Metric) -> Float[np.ndarray, "sample part layer head"]:
        """The raw numbers of one metric; `part` is 1, or 2 for a ratio's numerator and denominator."""
        if not self._layers:
            raise CorelensError("a record of no run", "scores() after a run under record.hooks", "run the model first")
        layers = [torch.stack([scores[one.key] for scores in self._layers[layer]]) for layer in sorted(self._layers)]
        values = torch.stack(layers, dim=2)
        for sample, name in zip(values, self._samples, strict=True):
            for part in sample:
                check_finite(part, one, name)
        return values.numpy()

    def scores(self, meta: dict[str, Any] | None = None) -> dict[str, HeadScores]:
        """The scores of all heads, {key: HeadScores}."""
        about = {"samples": list(self._samples), **(meta or {})}
        return {one.key: head_scores(one, self.per_sample(one), describe(one) | about) for one in self.metrics}


def _places(there: Tensor, wanted: Tensor, one: Metric, sample: str) -> Tensor:
    """Where the rows that a metric wants stand among those that the run reads."""
    there = there[there >= 0]
    at = torch.searchsorted(there, wanted)
    if len(wanted) and (int(at.max()) >= len(there) or not torch.equal(there[at], wanted)):
        raise CorelensError(
            f"{one.key} of sample {sample!r} wants rows {wanted.tolist()}, the run reads {there.tolist()}",
            f"a run that reads the {one.rows} rows",
            f"leave model.pattern_rows(…) out, or name {one.rows!r} in it",
        )
    return at


def describe(one: Metric) -> dict[str, Any]:
    """What a result says of its metric."""
    return {"metric": one.name, "key": one.key, "rows": one.rows, "reduce": one.reduce, "options": one.options}


class KeptRows:
    """Rows of attention kept over a run, layer by layer: of a null question, or of every step of a generation."""

    def __init__(self, rows: str):
        self._patterns: dict[int, list[Float[Tensor, "batch head row key"]]] = {}
        self._rows: list[Tensor] = []
        self.token_maps: list[Any] = []

        def keep_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            self._patterns.setdefault(hook.layer(), []).append(pattern.cpu())
            if hook.layer() == 0:
                self._rows.append(hook.ctx["rows"].cpu())
                self.token_maps = hook.ctx["inputs"].token_maps

        keep_rows.rows = rows  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(_rows_points, keep_rows)]

    @property
    def rows(self) -> Tensor:
        """The rows of every step, [batch, row], −1 pads."""
        return torch.cat(self._rows, dim=1)

    def pattern(self, layer: int, sample: int) -> Float[Tensor, "head row key"]:
        """All rows of one layer and sample over all keys of the last step; zero behind what a row could see."""
        steps = [step[sample] for step in self._patterns[layer]]
        length = steps[-1].shape[-1]
        return torch.cat([torch.nn.functional.pad(step, (0, length - step.shape[-1])) for step in steps], dim=1)


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
