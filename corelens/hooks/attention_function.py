"""The one attention function, and everything that is seen and edited inside it.

transformers calls whatever its AttentionInterface has registered under the name that a config has; here that is
`corelens`, and so rotated q, k and v, scores, pattern and z of every head of every model are reached in one place.

You pay for what you hook: a layer without hooks on scores or pattern calls transformers' own SDPA function, and rows
(a few queries: the question's tokens) are computed beside it from q and k in O(rows × T) memory. The order inside a
layer: q, k, v → edges → scores → softmax → pattern → rows → z. Scores and softmax are in float32.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.hooks.edges import Edges
from corelens.hooks.points import AttentionPoints, HookPoint
from corelens.hooks.rows import Call, KeyAxis, mix, row_scores, rows_z, softmax
from corelens.hooks.running import NAME, Running, Step, current, edits_before_caching, implementation, running


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
        if plan is not None and (z := plan.attend(query, key, value, call)) is not None:
            return z
        if call.softcap is not None or call.sinks is not None:  # SDPA knows neither
            return rows_z(query, key, value, None, None, call)[0]
        return _interface()["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
        )[0]

    call = Call(
        module, attention_mask, scaling if scaling is not None else query.shape[-1] ** -0.5,
        getattr(module, "is_causal", True) if is_causal is None else is_causal,
        kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("position_bias"),
    )  # fmt: skip
    run, plan = current.get(), None
    if run is not None and module in run.vision:
        return run.vision[module](query, key, value, call), None
    points = run.sites.get(module) if run is not None else None
    if run is None or points is None or run.step is None:
        return sdpa(), None
    plan = run.plan
    if plan is None and not any(point.active for point in points.in_function):
        return sdpa(), None

    step, new = run.step, query.shape[2]
    query = run.fire(points.hook_rot_q, query.transpose(1, 2)).transpose(1, 2)
    if getattr(module, "layer_idx", None) not in run.stored:  # otherwise they have fired on the way into the cache
        key = _edit_new(run, points.hook_rot_k, key, new)
        value = _edit_new(run, points.hook_v, value, new)
    if plan is not None:
        key, value, call = plan.restrict(query, key, value, call, points)

    edges = Edges(step, query.shape[0], query.shape[1], query.device)
    if points.hook_edges.active:
        run.fire(points.hook_edges, edges)
    if edges.given:
        key, value = edges.spread(key, value)
        module = SimpleNamespace(is_causal=call.is_causal, training=module.training)  # type: ignore[assignment] # no groups

    rows = step.rows if points.hook_pattern_rows.active else None
    if points.hook_attn_scores.active or points.hook_pattern.active:
        z = _hooked_square(run, points, query, key, value, call, edges, rows, dropout)
    else:
        z = edges.recompute(sdpa(), query, key, value, call)
        if rows is not None and rows.shape[1]:
            z = _hooked_rows(run, points, z, query, key, value, call, edges, rows)
    if plan is not None:
        z = plan.finish(z, query, replace(call, edit=edges.apply) if edges.edits else call)
    return run.fire(points.hook_z, z), None


def _edit_new(
    run: Running, point: HookPoint, x: Float[Tensor, "batch kv_head key d"], new: int
) -> Float[Tensor, "batch kv_head key d"]:
    """Fire a k or v point on this step's tokens, which are the last ones."""
    if not point.active:
        return x
    before, part = x[:, :, : x.shape[2] - new], x[:, :, x.shape[2] - new :].transpose(1, 2)
    if not before.shape[2]:
        return run.fire(point, part).transpose(1, 2)
    # another layer's cache, which this layer shares: it is not ours to write into
    return torch.cat([before, run.fire(point, part.clone()).transpose(1, 2)], dim=2)


# --- the two ways in which hooks see a pattern ------------------------------------------------------------------------


def _hooked_square(
    run: Running, points: AttentionPoints, query: Tensor, key: Tensor, value: Tensor, call: Call,
    edges: Edges, rows: Tensor | None, dropout: float,
) -> Float[Tensor, "batch pos head d"]:  # fmt: skip
    """All rows: the layer's scores and pattern exist, and z is made from what the hooks leave of them."""
    assert run.step is not None
    axis = KeyAxis(key.shape[2], run.step.total)
    every = run.step.positions.expand(query.shape[0], -1)
    scores = edges.apply(row_scores(query, key, None, None, call), every, None)
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
    edges: Edges, rows: Int[Tensor, "batch row"],
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


@cache
def _interface() -> Any:
    # (importing it takes as long as importing transformers' model code: whoever wraps a model has done that already)
    from transformers import AttentionInterface

    return AttentionInterface()


@cache
def register() -> None:
    """Make the attention function, and the mask function that goes with it, known to transformers under `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = [
    "NAME",
    "Edges",
    "Running",
    "Step",
    "attention",
    "edits_before_caching",
    "implementation",
    "register",
    "running",
]
