"""Rows of attention as a run reads them: which of them each metric needs, and the attention mass
that each row puts on sets of keys."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.metrics.definition import Metric
from corelens.metrics.mass import Column, key_weights, masses
from corelens.metrics.sinks import without
from corelens.tokens.token_map import TokenMap


def rows_points(name: str) -> bool:
    """Whether a hook point holds rows of a pattern."""
    return name.endswith("attn.hook_pattern_rows")


class RowIndices:
    """Which of the rows that a run reads each metric needs, as indices, for each sample.

    They are looked up once a batch and not in every layer, because the device would wait for this
    work on the CPU.

    Args:
        hook: of a rows point that fires.
        metrics: that need rows.
    """

    def __init__(self, hook: Any, metrics: Sequence[Metric]):
        self.token_maps: list[TokenMap] = hook.ctx["inputs"].token_maps
        if not self.token_maps:
            raise CorelensError(
                "scores of a run on bare tensors",
                "inputs with token maps",
                "use model.prepare(sample)",
            )
        run_rows = hook.ctx["rows"].cpu()
        # A generation may draw several sequences for each sample: their prompts are equal, and the
        # first is scored.
        self.numbers = range(0, len(run_rows), len(run_rows) // len(self.token_maps))
        self.indices: list[dict[str, Int[Tensor, " row"]]] = []
        for number, token_map in zip(self.numbers, self.token_maps, strict=True):
            of_sample = {}
            for m in metrics:
                needed = m.row_positions(token_map)
                of_sample[m.rows] = _indices_among(run_rows[number], needed, m, token_map.id)
            self.indices.append(of_sample)
        self._moved: dict[torch.device, list[dict[str, Tensor]]] = {}

    def on(self, device: torch.device) -> list[dict[str, Int[Tensor, " row"]]]:
        """`indices` on a layer's device."""
        if device not in self._moved:
            self._moved[device] = [
                {rows: indices.to(device) for rows, indices in of_sample.items()}
                for of_sample in self.indices
            ]
        return self._moved[device]


def _indices_among(
    run_rows: Tensor, needed: Tensor, metric: Metric, sample: str
) -> Int[Tensor, " row"]:
    """The indices of the needed rows among those of the run (ascending, −1 pads)."""
    run_rows = run_rows[run_rows >= 0]
    indices = torch.searchsorted(run_rows, needed)
    if len(needed) and (
        int(indices.max()) >= len(run_rows) or not torch.equal(run_rows[indices], needed)
    ):
        raise CorelensError(
            f"{metric.key} of sample {sample!r} wants rows {needed.tolist()}, the run reads "
            f"{run_rows.tolist()}",
            f"a run that reads the {metric.rows} rows",
            f"leave model.pattern_rows(…) out, or name {metric.rows!r} in it",
        )
    return indices


class Masses:
    """The attention mass of every row of a run on the sets of keys that metrics need, layer by
    layer.

    Args:
        token_maps: of the running batch.
        columns: the masses to compute, each a pair: whether visual sinks are "kept" or "left_out",
            and the set of keys with its reduction.
        sinks: for each sample which of its visual tokens are sinks, as indices into
            `token_map.visual`.
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
        weights = [key_weights(variants[variant], [column]) for variant, column in self._columns]
        self._weights = {torch.device("cpu"): torch.cat(weights, dim=-1)} if weights else {}
        # without layers that have no heads
        self._of_layer: dict[int, Float[Tensor, "batch head row column"]] = {}

    def read(self, layer: int, pattern: Float[Tensor, "batch head row key"]) -> None:
        """Compute and store the masses of one layer's rows."""
        if not self._columns:
            return
        device = pattern.device
        if device not in self._weights:
            self._weights[device] = self._weights[torch.device("cpu")].to(device)
        self._of_layer[layer] = masses(
            pattern, self._weights[device], [column for _, column in self._columns]
        )

    def fetch(self) -> dict[tuple[str, Column], Float[Tensor, "layer batch head row"]]:
        """The masses of all layers, on the CPU. Only this call waits for the device."""
        if not self._of_layer:
            return {}
        layers = stacked([self._of_layer[layer] for layer in sorted(self._of_layer)], 1)
        return dict(zip(self._columns, layers.unbind(-1), strict=True))


def stacked(layers: list[Tensor], head_axis: int) -> Tensor:
    """The layers' tensors stacked, on the CPU, by one transfer. Layers with fewer heads than others
    get zeros."""
    most = max(layer.shape[head_axis] for layer in layers)
    after = [0, 0] * (layers[0].ndim - head_axis - 1)
    filled = [
        torch.nn.functional.pad(layer, [*after, 0, most - layer.shape[head_axis]])
        for layer in layers
    ]
    return torch.stack([layer.to(layers[0].device) for layer in filled]).cpu()
