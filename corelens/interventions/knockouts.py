"""Interventions on edges: who may look at what. Only the rows named are computed anew, beside
SDPA."""

from collections.abc import Callable
from typing import Any

from corelens.heads.head_set import HeadSet
from corelens.hooks.edges import Edges, every_edges
from corelens.hooks.points import Hook
from corelens.interventions.ablation import Heads
from corelens.tokens.positions import Where, check_where

QUESTION_ON = "question+last+answer"  # what reads evidence for the answer, generated rows included


def knockout(
    heads: Heads | None, rows: Where = QUESTION_ON, columns: Where = "region"
) -> list[Hook]:
    """Hooks that remove the edges from `rows` to `columns` before the softmax.

    What is left is renormalised by the softmax; a row that loses every edge gives z = 0 and a
    warning.

    Args:
        heads: these heads; all heads of all layers if None.
        rows: "question+last+answer" by default (while generating, the generated rows too); or other
            names, positions.
        columns: "region", "visual", "image:1", "frame:3", "thumbnail", "tile:0", positions …

    Errors: a name that does not exist, when the hooks are made.
    """

    check_where(rows), check_where(columns)

    def knockout_edges(edges: Edges, numbers: list[int] | None) -> None:
        edges.cut(numbers, rows, columns)

    return _hooks(heads, knockout_edges, "knockout")


def edge_bias(
    heads: Heads | None, rows: Where = QUESTION_ON, columns: Where = "region", value: float = 1.0
) -> list[Hook]:
    """Hooks that add `value` to the scores (after scaling, before softmax) of the edges from `rows`
    to `columns`."""

    check_where(rows), check_where(columns)

    def bias_edges(edges: Edges, numbers: list[int] | None) -> None:
        edges.add(numbers, rows, columns, value)

    return _hooks(heads, bias_edges, "edge_bias")


def _hooks(
    heads: Heads | None, edit: Callable[[Edges, list[int] | None], None], name: str
) -> list[Hook]:
    def on(numbers: list[int] | None) -> Callable[..., None]:
        def hook_function(edges: Edges, hook: Any) -> None:
            edit(edges, numbers)

        hook_function.__name__ = name
        return hook_function

    if heads is None:
        return [(every_edges, on(None))]
    head_set = heads if isinstance(heads, HeadSet) else HeadSet(heads)
    return [
        (f"blocks.{layer}.attn.hook_edges", on(numbers))
        for layer, numbers in head_set.by_layer().items()
    ]
