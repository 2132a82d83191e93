"""Rows of a run under the null question, for metrics that subtract what is there without one."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.hooks.points import Hook
from corelens.metrics.definition import NULL_MASS, Metric
from corelens.metrics.mass import Column
from corelens.metrics.rows import Masses, RowIndices, rows_points
from corelens.tokens.token_map import TokenMap


class NullRows:
    """What metrics read of a run under the null question: masses, and rows of the pattern over the
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
        self._row_indices: RowIndices | None = None
        self._masses: Masses | None = None
        self._fetched: dict[tuple[str, Column], Float[Tensor, "layer batch head row"]] | None = None
        self._maps: list[TokenMap] = []
        # (layer, sample, rows)
        self._region_rows: dict[tuple[int, int, str], Float[Tensor, "head row key"]] = {}

        def keep_regions(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            pattern = pattern.detach()
            if self._row_indices is None:
                self._row_indices = RowIndices(hook, self._metrics)
                self._masses = Masses(self._row_indices.token_maps, self._columns, self._sinks)
                self._maps = [_region_only(token_map) for token_map in self._row_indices.token_maps]
            assert self._masses is not None
            self._masses.read(hook.layer(), pattern)
            if all(NULL_MASS in m.needs for m in self._metrics):
                return
            for i, of_sample in enumerate(self._row_indices.on(pattern.device)):
                region = self._row_indices.token_maps[i].region.to(pattern.device)
                for rows, where in of_sample.items():
                    region_rows = pattern[i].index_select(1, where).index_select(2, region)
                    self._region_rows[hook.layer(), i, rows] = region_rows

        keep_regions.rows = "+".join(dict.fromkeys(m.rows for m in self._metrics))  # type: ignore[attr-defined]
        self.hooks: list[Hook] = [(rows_points, keep_regions)]

    def pattern_of(self, layer: int, sample: int, metric: Metric) -> dict[str, Any]:
        """`null_pattern` and `null_token_map` of one sample and layer."""
        return {
            "null_pattern": self._region_rows[layer, sample, metric.rows],
            "null_token_map": self._maps[sample],
        }

    def evidence_of(self, sample: int, metric: Metric) -> Float[Tensor, "layer head row"]:
        """`null_evidence` of one sample: what the rows put on the region, in all layers."""
        assert self._row_indices is not None and self._masses is not None
        if self._fetched is None:
            self._fetched = self._masses.fetch()
        every_row = self._fetched[metric.sinks, Column("evidence", metric.keys or "sum")][:, sample]
        return every_row.index_select(-1, self._row_indices.indices[sample][metric.rows])


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
