"""Samples through a model: every row-based score of every head from the rows of one forward.

`record` makes hooks (so scores can be taken in any run, under any other hooks); `score_heads` is the loop over them.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads import HeadScores
from corelens.hooks import Hook
from corelens.inputs import Sample
from corelens.metrics.registry import Metric, check_finite, metric

AnyMetric = str | Metric | Callable[..., Any]


class Record:
    """Scores taken while a model runs. `hooks` go into any run; `scores()` after the runs.

    Each sample of each batch that runs is one entry, in the order of running. Rows are read by
    `hook_pattern_rows`, which reads the rows that the record asks for unless `model.pattern_rows` says otherwise.
    """

    def __init__(self, metrics: Sequence[Metric]):
        self.metrics = list(metrics)
        self._layers: dict[int, list[dict[str, Any]]] = {}  # layer → per sample {key: score}
        self._samples: list[str] = []

        def record_rows(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            self._read(pattern, hook)

        record_rows.rows = "+".join(dict.fromkeys(m.rows for m in self.metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(lambda name: name.endswith("attn.hook_pattern_rows"), record_rows)]

    def _read(self, pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        inputs, rows, layer = hook.ctx["inputs"], hook.ctx["rows"].cpu(), hook.layer()
        seen = self._layers.setdefault(layer, [])
        if int(hook.ctx["positions"][0]) > 0:  # a decode step: what is scored is the prompt
            return
        for i, token_map in enumerate(inputs.token_maps):
            scores: dict[str, Any] = {}
            for one in self.metrics:
                wanted = one.row_positions(token_map)
                at = torch.searchsorted(rows[i][rows[i] >= 0], wanted)
                if len(at) and (int(at.max()) >= int((rows[i] >= 0).sum()) or not torch.equal(rows[i][at], wanted)):
                    raise CorelensError(
                        f"{one.key} of sample {token_map.id!r} wants rows {wanted.tolist()}, the run reads {rows[i].tolist()}",
                        f"a run that reads the {one.rows} rows",
                        f"leave model.pattern_rows(…) out, or name {one.rows!r} in it",
                    )
                score = one.compute(pattern[i][:, at.to(pattern.device)], token_map, layer=layer)
                parts = score if isinstance(score, tuple) else (score,)
                scores[one.key] = torch.stack([part.detach().float().cpu() for part in parts])
            seen.append(scores)
            if layer == 0:
                self._samples.append(token_map.id)

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
        result = {}
        for one in self.metrics:
            values = self.per_sample(one)
            about = {"metric": one.name, "key": one.key, "rows": one.rows, "reduce": one.reduce, "options": one.options}
            about |= {"samples": list(self._samples)} | (meta or {})
            if one.ratio:
                result[one.key] = HeadScores(parts=(values[:, 0], values[:, 1]), meta=about)
            else:
                result[one.key] = HeadScores(per_sample=values[:, 0], meta=about)
        return result


def record(metrics: Iterable[AnyMetric]) -> Record:
    """A record of several metrics from the same rows of the same runs."""
    chosen = [metric(one) for one in metrics]
    return Record(chosen)


class RecordRAM(Record):
    """A record of RAM alone; `scores()` is its HeadScores."""

    def scores(self, meta: dict[str, Any] | None = None) -> HeadScores:  # type: ignore[override]
        """RAM of every head."""
        return super().scores(meta)[self.metrics[0].key]


def record_ram(rows: str = "question", reduce: str = "max") -> RecordRAM:
    """Record RAM in any run: `r = cl.record_ram(); model.run_with_hooks(inputs, fwd_hooks=r.hooks); r.scores()`."""
    return RecordRAM([metric("ram", rows=rows, reduce=reduce)])


def score_heads(
    model: Any,
    samples: Sequence[Sample],
    metrics: Iterable[AnyMetric] | AnyMetric = ("ram",),
    batch_size: int = 8,
    hooks: Sequence[Hook] = (),
    progress: bool = False,
) -> dict[str, HeadScores]:
    """Score every head of a model: one forward a batch, without the language-model head, O(rows × T) memory.

    Args:
        model: a HookedMLLM.
        samples: questions with regions.
        metrics: names ("ram", "lift" …), `cl.metric("ram", rows="last")`, or your own f(pattern [head, row, key],
            token_map) → [head].
        batch_size: samples a forward.
        hooks: other hooks to run under (an ablation, say); what they change is what is scored.
        progress: show a progress bar.

    Returns:
        {key: HeadScores}; the key is the metric's name with options that differ from the default behind it.
    """
    wanted = [metrics] if isinstance(metrics, str | Metric) or callable(metrics) else list(metrics)
    if not samples:
        raise CorelensError(
            "no samples", "one sample or more", "give questions with regions, e.g. cl.synthetic('refer', 200)"
        )
    recorded = record(wanted)
    answer = any("answer" in one.rows for one in recorded.metrics)
    starts = range(0, len(samples), batch_size)
    with torch.no_grad():
        for start in track(starts, "scoring heads", transient=True, disable=not progress):
            inputs = model.prepare(samples[start : start + batch_size], answer=answer)
            model.run_with_hooks(inputs, fwd_hooks=[*hooks, *recorded.hooks], return_type=None)
    return recorded.scores(about(model))


def about(model: Any) -> dict[str, Any]:
    """What a result must say of the model and the libraries that made it."""
    return {
        "model": getattr(model.hf.config, "_name_or_path", "")
        and str(model.hf.config._name_or_path).rstrip("/").split("/")[-1],
        "family": model.cfg.family,
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
