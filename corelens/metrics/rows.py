"""Rows of attention as a run reads them: where the rows that a metric wants stand, and the masses
that every row puts on sets of keys."""

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
        self.local_rows: list[dict[str, Int[Tensor, " row"]]] = []
        for number, token_map in zip(self.numbers, self.token_maps, strict=True):
            wanted = [(m, m.row_positions(token_map)) for m in metrics]
            self.local_rows.append(
                {m.rows: _places(there[number], rows, m, token_map.id) for m, rows in wanted}
            )
        self._moved: dict[torch.device, list[dict[str, Tensor]]] = {}

    def on(self, device: torch.device) -> list[dict[str, Int[Tensor, " row"]]]:
        """`local_rows` on a layer's device."""
        if device not in self._moved:
            self._moved[device] = [
                {rows: places.to(device) for rows, places in of.items()} for of in self.local_rows
            ]
        return self._moved[device]


def _places(there: Tensor, wanted: Tensor, metric: Metric, sample: str) -> Int[Tensor, " row"]:
    there = there[there >= 0]
    places = torch.searchsorted(there, wanted)
    if len(wanted) and (int(places.max()) >= len(there) or not torch.equal(there[places], wanted)):
        raise CorelensError(
            f"{metric.key} of sample {sample!r} wants rows {wanted.tolist()}, the run reads "
            f"{there.tolist()}",
            f"a run that reads the {metric.rows} rows",
            f"leave model.pattern_rows(…) out, or name {metric.rows!r} in it",
        )
    return places


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
        layers = stacked([self._of_layer[layer] for layer in sorted(self._of_layer)], 1)
        return dict(zip(self._columns, layers.unbind(-1), strict=True))


def stacked(layers: list[Tensor], head_axis: int) -> Tensor:
    """The layers' tensors as one, on the CPU, in one transfer; fewer heads are filled up with 0."""
    most = max(layer.shape[head_axis] for layer in layers)
    after = [0, 0] * (layers[0].ndim - head_axis - 1)
    filled = [
        torch.nn.functional.pad(layer, [*after, 0, most - layer.shape[head_axis]])
        for layer in layers
    ]
    return torch.stack([layer.to(layers[0].device) for layer in filled]).cpu()
