"""Edge edits: single connections from a query to a key, removed or strengthened before the
softmax."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hooks.rows import Call, rows_z
from corelens.hooks.running import Step
from corelens.tokens.positions import Where, member, resolve, within

# scores of edited rows are built in chunks of at most this many numbers (128 MB)
ROW_CHUNK_ELEMENTS = 1 << 25


def every_edges(name: str) -> bool:
    """Whether a name is `attn.hook_edges` of a layer. (Other callable filters are not asked about
    these points.)"""
    return name.endswith("attn.hook_edges")


class Edges:
    """The edges of one layer in one step, handed to the functions at `attn.hook_edges`.

    An edge is (head, row, column): the connection from a query (row) to a key (column). `cut`
    removes edges before the softmax, `add` adds a number to their scores. Only the rows named are
    computed again; the other rows keep SDPA's result.
    """

    def __init__(
        self,
        step: Step,
        batch: int,
        n_heads: int,
        device: torch.device,
        tower_columns: int | None = None,
    ):
        self.step, self.batch, self.n_heads, self.device = step, batch, n_heads, device
        self.tower_columns = tower_columns  # in cross-attention: how many tokens the tower has
        self.edits: list[
            tuple[Tensor, Bool[Tensor, "batch key"], Bool[Tensor, "batch key"], float | None]
        ] = []
        self.rewrites: list[tuple[int, str, Callable[[Tensor], Tensor]]] = []

    def give(self, head: int, what: str, edit: Callable[[Tensor], Tensor]) -> None:
        """Give one query head its own rotated keys (`what` = "key") or values ("value"), while the
        other heads of its group keep theirs.

        `edit` gets the tensor [batch, key, d] of its KV head and returns the one for this head.
        """
        self.rewrites.append((head, what, edit))

    def spread(
        self, key: Tensor, value: Tensor
    ) -> tuple[Float[Tensor, "b head key d"], Float[Tensor, "b head key e"]]:
        """Keys and values repeated to one KV head per query head, after the edits of `give`."""
        group = self.n_heads // key.shape[1]
        per_query_head = {
            "key": key.repeat_interleave(group, dim=1),
            "value": value.repeat_interleave(group, dim=1),
        }
        for head, what, edit in self.rewrites:
            tensor = per_query_head[what]
            tensor[:, head] = edit(tensor[:, head].clone())
        return per_query_head["key"], per_query_head["value"]

    def cut(self, heads: list[int] | None, rows: Where, columns: Where) -> None:
        """Remove the edges from `rows` to `columns` of these heads (all if None)."""
        self._edit(heads, rows, columns, None)

    def add(self, heads: list[int] | None, rows: Where, columns: Where, value: float) -> None:
        """Add `value` to the scores (after scaling, before softmax) of the edges from `rows` to
        `columns`."""
        self._edit(heads, rows, columns, float(value))

    def _edit(
        self, heads: list[int] | None, rows: Where, columns: Where, value: float | None
    ) -> None:
        named = torch.tensor(
            list(range(self.n_heads) if heads is None else heads), device=self.device
        )
        if len(named) and not (int(named.min()) >= 0 and int(named.max()) < self.n_heads):
            raise CorelensError(
                f"heads {heads}", f"heads from 0 to {self.n_heads - 1}", "take heads of this model"
            )
        step = self.step
        new = step.positions
        row_table = member(
            within(resolve(rows, step.inputs, new, self.batch, rows=True), new), step.total
        )
        if len(named) and row_table.any():
            column_table = member(*self._columns(columns, new))
            self.edits.append((named, row_table, column_table, value))

    def _columns(self, columns: Where, new: Tensor) -> tuple[Int[Tensor, "batch n"], int]:
        """The columns' positions, and how many columns there are."""
        step, count = self.step, self.tower_columns
        if count is None:
            return resolve(columns, step.inputs, new, self.batch, rows=False), step.total
        if isinstance(columns, str):
            if columns != "all":
                raise CorelensError(
                    f"the columns {columns!r} in a cross-attention layer, whose columns are the "
                    f"{count} tokens of the tower",
                    f"numbers from 0 to {count - 1}, or 'all': which part of the picture each of "
                    "them sees is not measured",
                    "give numbers, or leave the layer out; hook_pattern shows the same columns",
                )
            columns = list(range(count))
        return resolve(columns, step.inputs, new, self.batch, rows=False), count

    def apply(
        self,
        scores: Float[Tensor, "batch some row key"],
        rows: Int[Tensor, "batch row"],
        heads: Tensor | None,
    ) -> Float[Tensor, "batch some row key"]:
        """The scores of these rows (absolute positions, −1 pads) and heads (all if None), after all
        edits."""
        if not self.edits:
            return scores
        # A sliding window's cache has dropped the first keys: its key axis begins at `first`.
        n_keys = scores.shape[-1]
        first = 0 if self.tower_columns is not None else max(self.step.total - n_keys, 0)
        heads = torch.arange(self.n_heads, device=scores.device) if heads is None else heads
        visible_before = scores > -torch.inf
        for edited, row_table, column_table, value in self.edits:
            of_heads = torch.isin(heads, edited)[None, :, None, None]
            of_rows = (row_table.gather(1, rows.clamp(min=0)) & (rows >= 0))[:, None, :, None]
            columns = column_table[:, None, None, first : first + n_keys]
            columns = nn.functional.pad(columns, (0, n_keys - columns.shape[-1]))  # a static cache
            edges = of_heads & of_rows & columns
            scores = (
                scores.masked_fill(edges, -torch.inf)
                if value is None
                else torch.where(edges, scores + value, scores)
            )
        visible_after = (scores > -torch.inf).any(-1)
        lost_all = (visible_before.any(-1) & ~visible_after).any(dim=1) & (rows >= 0)
        if lost_all.any():
            warnings.warn(
                f"{int(lost_all.sum())} rows lost every edge: their z is 0 there (nothing is left "
                "to attend to)",
                stacklevel=2,
            )
        return scores

    def recompute(
        self,
        z: Float[Tensor, "batch pos head d"],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: Call,
    ) -> Float[Tensor, "batch pos head d"]:
        """z, with the edited rows of the edited heads computed again."""
        if not self.edits:
            return z
        heads = torch.unique(torch.cat([edited for edited, *_ in self.edits]))
        row_tables = torch.stack([row_table for _, row_table, _, _ in self.edits])
        edited = row_tables.any(0)[:, self.step.positions]  # [batch, pos]
        # Samples may have different numbers of edited rows. All compute as many as the largest
        # number, their edited rows first; what is computed beyond these is not written.
        order = edited.int().argsort(dim=1, descending=True, stable=True)
        order = order[:, : int(edited.sum(1).max())]
        chunk = max(1, ROW_CHUNK_ELEMENTS // (len(heads) * key.shape[2] * query.shape[0]))
        z = z.clone()
        for local in order.split(chunk, dim=1):
            rows = torch.where(edited.gather(1, local), self.step.positions[local], -1)
            edit = partial(self.apply, rows=rows, heads=heads)
            new, _ = rows_z(query, key, value, local, heads, call, edit)
            sample, number = (rows >= 0).nonzero(as_tuple=True)
            # Edits of several heads may name different rows: a head is written only in its own.
            of_head = [self._rows_of(int(head))[sample, rows[sample, number]] for head in heads]
            where = sample[:, None], local[sample, number][:, None], heads
            is_edited = torch.stack(of_head, dim=1)[..., None]
            z[where] = torch.where(is_edited, new[sample, number], z[where])
        return z

    def _rows_of(self, head: int) -> Bool[Tensor, "batch key"]:
        """The rows that edits of this head name."""
        tables = [row_table for edited, row_table, _, _ in self.edits if head in edited.tolist()]
        return torch.stack(tables).any(0)
