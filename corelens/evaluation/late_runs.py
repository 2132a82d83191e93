"""Interventions on heads begun late: a head changes nothing before its layer, an edge cut from the
rows after the picture nothing before these. What is before is run once."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from corelens.evaluation.answers import Answer, Evaluation
from corelens.evaluation.evaluate import evaluate, n_answer_rows, read_batch
from corelens.evaluation.own_scoring import has_rule
from corelens.heads.head_set import HeadSet
from corelens.inputs.prepare import Inputs
from corelens.interventions.ablation import ablate
from corelens.interventions.knockouts import knockout
from corelens.interventions.replay import Replay
from corelens.model.hooked import HookedMLLM
from corelens.tokens.positions import member, resolve

MOST_BYTES = 1 << 31  # of values that are kept; where they are more, whole forwards are run
# a name, or for each batch the rows of its samples, padded with −1
Rows = str | Sequence[Int[Tensor, "_ _"]]


class LateRuns:
    """What `evaluate` finds under knockouts and ablations, the same numbers, on batches that it is
    asked about again and again.

    Args:
        model: a HookedMLLM.
        prepared: what `batches` made.
    """

    def __init__(self, model: HookedMLLM, prepared: Sequence[Inputs]):
        self.model, self.prepared = model, list(prepared)
        # of written texts
        self._scored = has_rule([sample for inputs in prepared for sample in inputs.samples])

    @cached_property
    def _base(self) -> list[Replay] | None:
        cfg = self.model.cfg
        width = (
            cfg.d_model * (cfg.n_layers + 1) + 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head
        )
        tokens = sum(len(inputs) * inputs.length for inputs in self.prepared)
        if tokens * width * cfg.dtype.itemsize > MOST_BYTES:
            return None
        return [Replay(self.model, inputs, keep=n_answer_rows(inputs)) for inputs in self.prepared]

    @cached_property
    def clean(self) -> Evaluation:
        """The answers without an intervention."""
        return evaluate(self.model, self.prepared)

    def ablated(self, heads: HeadSet, kind: str) -> Evaluation:
        """The answers under `ablate(heads, kind)`, for kinds without a reference ("zero",
        "uniform")."""
        if not heads:
            return self.clean
        hooks = ablate(heads, kind)
        if self._scored or self._base is None:
            return evaluate(self.model, self.prepared, hooks)
        answers: list[Answer] = []
        for inputs, base in zip(self.prepared, self._base, strict=True):
            logits = base.run(base.begin(min(head.layer for head in heads), 0), hooks)
            assert logits is not None
            answers += read_batch(self.model, inputs, logits)
        return Evaluation(answers)

    def evaluate(self, heads: HeadSet | None, rows: Rows, columns: str = "region") -> Evaluation:
        """The answers with the edges from `rows` to `columns` cut in these heads (all if None)."""
        if heads is not None and not heads:
            return self.clean
        layer = 0 if heads is None else min(head.layer for head in heads)
        answers: list[Answer] = []
        for number, inputs in enumerate(self.prepared):
            own_rows = rows if isinstance(rows, str) else rows[number]
            hooks = knockout(heads, own_rows, columns)
            first = _first_cut(inputs, own_rows, columns)
            if first is None:  # no row stands behind a column: nothing is cut
                answers += self.clean.per_sample[len(answers) : len(answers) + len(inputs)]
            elif self._scored or self._base is None:
                answers += evaluate(self.model, [inputs], hooks).per_sample
            else:
                base = self._base[number]
                logits = base.run(base.begin(layer, first), hooks)
                assert logits is not None
                answers += read_batch(self.model, inputs, logits)
        return Evaluation(answers)


def _first_cut(inputs: Inputs, rows: str | Tensor, columns: str) -> int | None:
    """The first row of the batch that loses an edge, or the first that predicts an answer, if that
    stands before it."""
    every = torch.arange(inputs.length)
    cut_rows = member(resolve(rows, inputs, every, len(inputs), rows=True), inputs.length)
    cut_columns = member(resolve(columns, inputs, every, len(inputs), rows=False), inputs.length)
    behind = cut_rows & (cut_columns.cumsum(1) > 0)
    if not behind.any():
        return None
    last = min(int(token_map.last) for token_map in inputs.token_maps)
    return min(int(behind.any(0).nonzero()[0, 0]), last)
