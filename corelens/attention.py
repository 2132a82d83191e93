"""The one attention function, and everything that is seen and edited inside it.

transformers calls whatever its AttentionInterface has registered under `config._attn_implementation`; here that is
`corelens`, and so rotated q, k and v, scores, pattern and z of every head of every model are reached in one place.

You pay for what you hook: a layer without hooks on scores or pattern calls transformers' own SDPA function, and rows
(a few queries: the question's tokens) are computed beside it from q and k in O(rows × T) memory. The order inside a
layer: q, k, v → edges → scores → softmax → pattern → rows → z. Scores and softmax are in float32.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from corelens.errors import CorelensError
from corelens.hooks import AttentionPoints, HookPoint, fire_watched
from corelens.positions import Where, member, resolve, within
from corelens.rows import Call, KeyAxis, all_rows, mix, row_scores, rows_z, softmax

NAME = "corelens"
ROW_CHUNK_ELEMENTS = 1 << 25  # scores of edited rows are built in chunks of at most this many numbers (128 MB)


@dataclass
class Step:
    """One forward of the decoder: which tokens are new, and what its hooks may know.

    Args:
        inputs: the running batch, or None.
        positions: of this step's tokens in the padded row; they go on counting while tokens are generated.
        rows: what `hook_pattern_rows` reads of them, [batch, row], −1 pads.
        cached: whether keys and values live in a cache that later steps read.
    """

    inputs: Any
    positions: Int[Tensor, " pos"]
    rows: Int[Tensor, "batch row"] | None
    cached: bool

    @property
    def total(self) -> int:
        """How many positions there are so far."""
        return int(self.positions[-1]) + 1

    @property
    def ctx(self) -> dict[str, Any]:
        """What a hook function finds in `hook.ctx`."""
        return {"inputs": self.inputs, "positions": self.positions}


@dataclass
class Running:
    """A run under hooks: which attention modules have points, and the step that is under way."""

    sites: dict[nn.Module, AttentionPoints] = field(default_factory=dict)
    step: Step | None = None

    def fire(self, point: HookPoint, x: Any) -> Any:
        """Fire a point with this step's context."""
        return point.fire(x, self.step.ctx if self.step else {})

    def fire_watched(self, point: HookPoint, x: Tensor, **ctx: Any) -> tuple[Tensor, bool]:
        """`fire`, and whether anything was edited; `ctx` is more for the functions to find."""
        return fire_watched(point, x, (self.step.ctx if self.step else {}) | ctx)


_running: ContextVar[Running | None] = ContextVar("corelens_running", default=None)


@contextmanager
def running(run: Running) -> Iterator[Running]:
    """Within this context the attention function fires the points of `run`."""
    token = _running.set(run)
    try:
        yield run
    finally:
        _running.reset(token)


@contextmanager
def implementation(configs: list[Any]) -> Iterator[None]:
    """Switch these configs to the attention function of CoreLens, and back to what each had."""
    # The setter would switch every sub-config too; each is switched, and switched back, on its own.
    before = [(config, config._attn_implementation_internal) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch pos head d_value"], None]:
    """What transformers calls for every attention of a hooked run."""

    def sdpa() -> Tensor:
        if call.softcap is not None or call.sinks is not None:  # SDPA knows neither
            return rows_z(query, key, value, all_rows(query), None, call)[0]
        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )[0]

    call = Call(
        module, attention_mask, scaling if scaling is not None else query.shape[-1] ** -0.5,
        getattr(module, "is_causal", True) if is_causal is None else is_causal,
        kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("position_bias"),
    )  # fmt: skip
    run = _running.get()
    points = run.sites.get(module) if run is not None else None
    if run is None or points is None or run.step is None or not any(point.active for point in points.in_function):
        return sdpa(), None

    step, new = run.step, query.shape[2]
    query = run.fire(points.hook_rot_q, query.transpose(1, 2)).transpose(1, 2)
    key = _edit_new(run, points.hook_rot_k, key, new)
    value = _edit_new(run, points.hook_v, value, new)

    edges = Edges(step, query.shape[0], query.shape[1], query.device)
    if points.hook_edges.active:
        run.fire(points.hook_edges, edges)

    rows = step.rows if points.hook_pattern_rows.active else None
    if points.hook_attn_scores.active or points.hook_pattern.active:
        z = _hooked_square(run, points, query, key, value, call, edges, rows, dropout)
    else:
        z = edges.recompute(sdpa(), query, key, value, call)
        if rows is not None and rows.shape[1]:
            z = _hooked_rows(run, points, z, query, key, value, call, edges, rows)
    return run.fire(points.hook_z, z), None


def _edit_new(
    run: Running, point: HookPoint, x: Float[Tensor, "batch kv_head key d"], new: int
) -> Float[Tensor, "batch kv_head key d"]:
    """Fire a k or v point on this step's tokens; with a cache the edit is written into it, so that later steps see it."""
    if not point.active:
        return x
    assert run.step is not None
    # A static cache is longer than what was seen so far; any other ends with this step's tokens.
    start = int(run.step.positions[0]) if x.shape[2] > run.step.total else x.shape[2] - new
    part = x[:, :, start : start + new].transpose(1, 2)
    edited = run.fire(point, part)
    if edited is part:  # untouched, or edited in place in this very memory
        return x
    if not run.step.cached:
        return edited.transpose(1, 2)
    x[:, :, start : start + new] = edited.transpose(1, 2)
    return x


# --- the two ways in which hooks see a pattern ------------------------------------------------------------------------


def _hooked_square(
    run: Running, points: AttentionPoints, query: Tensor, key: Tensor, value: Tensor, call: Call,
    edges: "Edges", rows: Tensor | None, dropout: float,
) -> Float[Tensor, "batch pos head d"]:  # fmt: skip
    """All rows: the layer's scores and pattern exist, and z is made from what the hooks leave of them."""
    assert run.step is not None
    axis = KeyAxis(key.shape[2], run.step.total)
    every = all_rows(query)
    scores = edges.apply(row_scores(query, key, every, None, call), run.step.positions[every], None)
    scores = axis.take(run.fire(points.hook_attn_scores, axis.show(scores, -torch.inf)), -torch.inf)
    pattern = run.fire(points.hook_pattern, axis.show(softmax(scores, call.sinks), 0.0))
    if rows is not None and rows.shape[1]:
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        local = (rows - run.step.positions[0]).clamp(min=0)
        read = pattern[batch, :, local].transpose(1, 2).masked_fill((rows < 0)[:, None, :, None], 0.0)
        read, edited = run.fire_watched(points.hook_pattern_rows, read, rows=rows)
        if edited:
            at, line = (rows >= 0).nonzero(as_tuple=True)
            pattern = pattern.clone()
            pattern[at, :, local[at, line]] = read[at, :, line]
    pattern = axis.take(pattern, 0.0)
    if dropout and call.module.training:
        pattern = nn.functional.dropout(pattern, dropout)
    return mix(pattern, value, None, query.shape[1])


def _hooked_rows(
    run: Running, points: AttentionPoints, z: Tensor, query: Tensor, key: Tensor, value: Tensor, call: Call,
    edges: "Edges", rows: Int[Tensor, "batch row"],
) -> Float[Tensor, "batch pos head d"]:  # fmt: skip
    """A few rows beside SDPA; z is touched only where a hook wrote."""
    assert run.step is not None
    axis = KeyAxis(key.shape[2], run.step.total)
    local = (rows - run.step.positions[0]).clamp(min=0)
    scores = edges.apply(row_scores(query, key, local, None, call), rows, None)
    pattern = softmax(scores, call.sinks).masked_fill((rows < 0)[:, None, :, None], 0.0)
    pattern, edited = run.fire_watched(points.hook_pattern_rows, axis.show(pattern, 0.0), rows=rows)
    if not edited:
        return z
    at, line = (rows >= 0).nonzero(as_tuple=True)
    written = mix(axis.take(pattern, 0.0), value, None, query.shape[1])
    z = z.clone()
    z[at, local[at, line]] = written[at, line]
    return z


# --- edges -----------------------------------------------------------------------------------------------------------


class Edges:
    """The edges of one layer in one step, handed to the functions at `attn.hook_edges`.

    An edge is (head, row, column): a query looking at a key. `cut` removes edges before the softmax, `add` adds a
    number to their scores; only the rows named are computed anew, the others stay SDPA's.
    """

    def __init__(self, step: Step, batch: int, n_heads: int, device: torch.device):
        self.step, self.batch, self.n_heads, self.device = step, batch, n_heads, device
        self.edits: list[tuple[Tensor, Bool[Tensor, "batch key"], Bool[Tensor, "batch key"], float | None]] = []

    def cut(self, heads: list[int] | None, rows: Where, columns: Where) -> None:
        """Remove the edges from `rows` to `columns` of these heads (all if None)."""
        self._edit(heads, rows, columns, None)

    def add(self, heads: list[int] | None, rows: Where, columns: Where, value: float) -> None:
        """Add `value` to the scores (after scaling, before softmax) of the edges from `rows` to `columns`."""
        self._edit(heads, rows, columns, float(value))

    def _edit(self, heads: list[int] | None, rows: Where, columns: Where, value: float | None) -> None:
        chosen = torch.tensor(list(range(self.n_heads) if heads is None else heads), device=self.device)
        if len(chosen) and not (0 <= int(chosen.min()) and int(chosen.max()) < self.n_heads):
            raise CorelensError(f"heads {heads}", f"heads from 0 to {self.n_heads - 1}", "take heads of this model")
        step = self.step
        new = step.positions
        row_table = member(within(resolve(rows, step.inputs, new, self.batch, rows=True), new), step.total)
        if len(chosen) and row_table.any():
            column_table = member(resolve(columns, step.inputs, new, self.batch, rows=False), step.total)
            self.edits.append((chosen, row_table, column_table, value))

    def apply(
        self, scores: Float[Tensor, "batch some row key"], rows: Int[Tensor, "batch row"], heads: Tensor | None
    ) -> Float[Tensor, "batch some row key"]:
        """The scores of these rows (absolute positions, −1 pads) and heads (all if None) with every edit made."""
        first = max(self.step.total - scores.shape[-1], 0)
        heads = torch.arange(self.n_heads, device=scores.device) if heads is None else heads
        could = scores > -torch.inf
        for chosen, row_table, column_table, value in self.edits:
            here = torch.isin(heads, chosen)[None, :, None, None]
            lines = (row_table.gather(1, rows.clamp(min=0)) & (rows >= 0))[:, None, :, None]
            columns = column_table[:, None, None, first : first + scores.shape[-1]]
            columns = nn.functional.pad(columns, (0, scores.shape[-1] - columns.shape[-1]))
            where = here & lines & columns
            scores = scores.masked_fill(where, -torch.inf) if value is None else torch.where(where, scores + value, scores)
        if self.edits:
            blind = (could.any(-1) & ~(scores > -torch.inf).any(-1)).any(dim=1) & (rows >= 0)
            if blind.any():
                warnings.warn(
                    f"{int(blind.sum())} rows lost every edge: their z is 0 there (nothing is left to attend to)",
                    stacklevel=2,
                )
        return scores

    def recompute(
        self, z: Float[Tensor, "batch pos head d"], query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> Float[Tensor, "batch pos head d"]:
        """z with the edited rows of the edited heads computed anew."""
        if not self.edits:
            return z
        heads = torch.unique(torch.cat([chosen for chosen, *_ in self.edits]))
        touched = torch.stack([table for _, table, _, _ in self.edits]).any(0)[:, self.step.positions]  # [batch, pos]
        # the same number of rows for every sample: those touched first, the rest is not written
        order = touched.int().argsort(dim=1, descending=True, stable=True)[:, : int(touched.sum(1).max())]
        chunk = max(1, ROW_CHUNK_ELEMENTS // (len(heads) * key.shape[2] * query.shape[0]))
        z = z.clone()
        for local in order.split(chunk, dim=1):
            rows = torch.where(touched.gather(1, local), self.step.positions[local], -1)
            anew, _ = rows_z(
                query, key, value, local, heads, call, lambda scores, rows=rows: self.apply(scores, rows, heads)
            )
            at, line = (rows >= 0).nonzero(as_tuple=True)
            # a head is written only where one of its own edits names the row
            own = torch.stack([self._edited(int(head))[at, rows[at, line]] for head in heads], dim=1)
            old = z[at[:, None], local[at, line][:, None], heads]
            z[at[:, None], local[at, line][:, None], heads] = torch.where(own[..., None], anew[at, line], old)
        return z

    def _edited(self, head: int) -> Bool[Tensor, "batch key"]:
        tables = [table for chosen, table, _, _ in self.edits if head in chosen.tolist()]
        return torch.stack(tables).any(0)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
