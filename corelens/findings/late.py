"""Knockouts begun late: edges cut from the rows after the picture change nothing before them, which is run once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from corelens.evaluation.answers import Evaluation
from corelens.evaluation.evaluate import answer_rows, evaluate, read_batch
from corelens.heads.head_set import HeadSet
from corelens.inputs.prepare import Inputs
from corelens.interventions.edges import knockout
from corelens.interventions.replay import Replay
from corelens.tokens.token_map import TokenMap

MOST_BYTES = 1 << 31  # of values that are kept; where they are more, whole forwards are run


class Knockouts:
    """What `evaluate` finds under knockouts, the same numbers, on batches that it is asked about again and again.

    Args:
        model: a HookedMLLM.
        prepared: what `batches` made.
    """

    def __init__(self, model: Any, prepared: Sequence[Inputs]):
        self.model, self.prepared = model, prepared

    @cached_property
    def _base(self) -> list[Replay] | None:
        cfg = self.model.cfg
        width = cfg.d_model * (cfg.n_layers + 1) + 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head
        tokens = sum(len(inputs) * inputs.length for inputs in self.prepared)
        if tokens * width * cfg.dtype.itemsize > MOST_BYTES:
            return None
        return [Replay(self.model, inputs, keep=answer_rows(inputs)) for inputs in self.prepared]

    def evaluate(self, heads: HeadSet | None, rows: str, columns: str) -> Evaluation:
        """The answers with the edges from `rows` to `columns` cut in these heads (all if None)."""
        hooks = knockout(heads, rows, columns)
        if self._base is None:
            return evaluate(self.model, self.prepared, hooks)
        layer = 0 if heads is None else min(head.layer for head in heads)
        answers = []
        for inputs, base in zip(self.prepared, self._base, strict=True):
            row = min(_first_cut(token_map, rows, columns) for token_map in inputs.token_maps)
            logits = base.run(base.begin(layer, row), hooks)
            assert logits is not None
            answers += read_batch(self.model, inputs, logits)
        return Evaluation(answers)


def _first_cut(token_map: TokenMap, rows: str, columns: str) -> int:
    """The first of the rows that stands behind one of the columns: in a causal model those before it lose nothing."""
    chosen, cut = token_map.positions(rows, rows=True), token_map.positions(columns)
    behind = chosen[chosen >= cut.min()]
    return int(torch.cat([behind, token_map.last.reshape(1)]).min())
