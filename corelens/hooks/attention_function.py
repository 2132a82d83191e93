"""The one attention function, and everything that is seen and edited inside it.

transformers calls whatever is behind the name "sdpa"; while a hooked run lasts that is `attention`
(see `corelens.hooks.exchange`), and so rotated q, k and v, scores, pattern and z of every head of
every model are reached in one place.

You pay for what you hook: a layer without hooks on scores or pattern calls transformers' own SDPA
function, and rows (a few queries: the question's tokens) are computed beside it from q and k in
O(rows × T) memory. The order inside a layer: rotated q, k, v → sparse plan → edges → scores →
softmax → pattern → rows → eviction from the cache → z (`hook_q` and `hook_k` fire earlier, see
model/wiring.py). Scores and softmax are in float32.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.hooks.edges import Edges
from corelens.hooks.exchange import original
from corelens.hooks.points import AttentionPoints, HookPoint
from corelens.hooks.rows import Call, KeyAxis, mix, row_scores, rows_z, softmax
from corelens.hooks.running import Running, Step, current


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention. They are immutable: a step that changes something
    returns a changed copy.

    Args:
        query, key, value: after rotary; key and value with what the cache holds.
        call: the module's own arguments: mask, scaling, soft cap and the like.
        kv_per_query_head: True once keys and values were repeated to one KV head per query head:
            an edit of one query head's keys needs that.
    """

    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    call: Call
    kv_per_query_head: bool = False


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Float[Tensor, "batch pos head d_value"], None]:
    """The attention function: transformers calls it for every attention while a hooked run lasts.
    Calls of other models and of other threads come here, too, and are passed on.

    Args:
        module: the attention module that calls.
        query: queries as attention uses them, after rotary.
        key: all keys so far, after rotary and from the cache.
        value: all values so far.
        attention_mask: None (causal), boolean or additive, [1|batch, 1|head, pos, key].
        arguments: what else the module gives: scaling, dropout, is_causal, softcap, s_aux (sinks),
            position_bias.

    Returns:
        z, and None in the place of the pattern, which transformers' SDPA does not give either.
    """
    run = current.get()
    inputs = AttentionInputs(query, key, value, Call.of(module, query, attention_mask, arguments))
    if run is not None and module in run.vision:
        return run.vision[module](query, key, value, inputs.call), None
    points = run.sites.get(module) if run is not None else None
    hooked = points is not None and any(point.active for point in points.in_function)
    if run is None or run.step is None or points is None or not (hooked or run.plan is not None):
        return _unhooked(inputs, run), None
    return _hooked(inputs, points, run, run.step), None


def _unhooked(inputs: AttentionInputs, run: Running | None) -> Float[Tensor, "batch pos head d"]:
    """z without hooks: the call is another model's, another thread's, or that of a layer without
    hooks."""
    # Outside a run only models that asked for "sdpa" come here. In a run, models that were loaded
    # with eager attention arrive too: SDPA cannot do their soft cap or sinks, `_kernel` can.
    return _sdpa(inputs) if run is None else _kernel(inputs, None)


def _hooked(
    inputs: AttentionInputs, points: AttentionPoints, run: Running, step: Step
) -> Float[Tensor, "batch pos head d"]:
    """One layer's attention under hooks, from rotated q, k and v to z."""
    inputs = _with_edited_qkv(inputs, points, run)
    plan = None if points.cross else run.plan
    if plan is not None:  # sparse inference says who may see whom, before hooks look at it
        inputs = AttentionInputs(inputs.query, *plan.restrict(*_parts(inputs), points))

    # Hooks at `hook_edges` say which edges they want cut or strengthened, and which heads get keys
    # of their own.
    columns = inputs.key.shape[2] if points.cross else None
    edges = Edges(step, inputs.query.shape[0], inputs.query.shape[1], inputs.query.device, columns)
    if points.hook_edges.active:
        run.fire(points.hook_edges, edges)
    if edges.rewrites:  # from here on every query head has a KV head of its own
        key, value = edges.spread(inputs.key, inputs.value)
        inputs = replace(inputs, key=key, value=value, kv_per_query_head=True)

    rows = step.rows if points.hook_pattern_rows.active else None
    if points.hook_attn_scores.active or points.hook_pattern.active:
        z = _z_of_whole_pattern(inputs, edges, rows, points, run, step)
    else:
        # SDPA ignored the edits of edges: only the edited rows are computed again.
        z = edges.recompute(_kernel(inputs, plan), *_parts(inputs))
        if rows is not None and rows.shape[1]:
            z = _z_with_rows(z, inputs, edges, rows, points, run, step)

    if plan is not None:  # pruned heads get their constants, and keys are evicted from the cache
        call = replace(inputs.call, edit=edges.apply) if edges.edits else inputs.call
        z = plan.finish(z, inputs.query, call)
    return run.fire(points.hook_z, z)


def _parts(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Call]:
    return inputs.query, inputs.key, inputs.value, inputs.call


def plain_z(
    query: Tensor, key: Tensor, value: Tensor, call: Call
) -> Float[Tensor, "batch pos head d"]:
    """z of these tensors, soft caps and sinks included; no hook fires."""
    return _kernel(AttentionInputs(query, key, value, call), None)


# --- q, k and v


def _with_edited_qkv(
    inputs: AttentionInputs, points: AttentionPoints, run: Running
) -> AttentionInputs:
    """q, k and v after their hooks, which see them as [batch, pos, head, d]."""
    new = inputs.query.shape[2]
    query = run.fire(points.hook_rot_q, inputs.query.transpose(1, 2)).transpose(1, 2)
    if getattr(inputs.call.module, "layer_idx", None) in run.stored:
        # k and v have fired on the way into the cache: later steps must see the edits
        return replace(inputs, query=query)
    if points.cross:
        assert run.step is not None
        if run.step.cached and int(run.step.positions[0]):  # they fired when they were cached
            return replace(inputs, query=query)
        new = inputs.key.shape[2]
    key = _with_edited_tokens(run, points.hook_rot_k, inputs.key, new)
    value = _with_edited_tokens(run, points.hook_v, inputs.value, new)
    return replace(inputs, query=query, key=key, value=value)


def _with_edited_tokens(
    run: Running, point: HookPoint, x: Float[Tensor, "batch kv_head key d"], new: int
) -> Float[Tensor, "batch kv_head key d"]:
    """Fire a k or v point on this step's tokens, which are the last ones."""
    if not point.active:
        return x
    earlier, tokens = x[:, :, : x.shape[2] - new], x[:, :, x.shape[2] - new :].transpose(1, 2)
    if not earlier.shape[2]:
        return run.fire(point, tokens).transpose(1, 2)
    # The earlier tokens lie in a cache, perhaps of another layer that this one shares: the hook
    # gets a copy, so that an edit does not write into it.
    return torch.cat([earlier, run.fire(point, tokens.clone()).transpose(1, 2)], dim=2)


# --- z without a pattern


def _kernel(inputs: AttentionInputs, plan: Any) -> Float[Tensor, "batch pos head d"]:
    """z by the fastest function that knows this call; no pattern is built."""
    call = inputs.call
    if plan is not None and (z := plan.attend(*_parts(inputs))) is not None:
        return z
    if call.softcap is not None or call.sinks is not None:  # SDPA knows neither
        return rows_z(*_all_rows(inputs))[0]
    # transformers' function repeats each KV head for its group of query heads; here each query
    # head has its own already.
    if inputs.kv_per_query_head:
        return _spread_sdpa(inputs)
    return _sdpa(inputs)


def _sdpa(inputs: AttentionInputs) -> Float[Tensor, "batch pos head d"]:
    """transformers' own function, called as the module called ours."""
    call = inputs.call
    return original()(
        call.module, inputs.query, inputs.key, inputs.value, call.mask, **call.arguments
    )[0]


def _all_rows(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, None, None, Call]:
    """The arguments of `rows_z` that ask for all rows and all heads."""
    return inputs.query, inputs.key, inputs.value, None, None, inputs.call


def _spread_sdpa(inputs: AttentionInputs) -> Float[Tensor, "batch pos head d"]:
    """torch's own SDPA, with a KV head for every query head."""
    query, key, value, call = _parts(inputs)
    if call.bias is not None:
        return rows_z(*_all_rows(inputs))[0]
    causal = call.mask is None and call.is_causal and query.shape[2] > 1
    if causal:  # a static cache's empty tail lies beyond every row
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    z = nn.functional.scaled_dot_product_attention(
        query, key, value, call.mask, call.arguments.get("dropout", 0.0), causal, scale=call.scaling
    )
    return z.transpose(1, 2)


# --- the two ways in which hooks see a pattern


def _z_of_whole_pattern(
    inputs: AttentionInputs,
    edges: Edges,
    rows: Int[Tensor, "batch row"] | None,
    points: AttentionPoints,
    run: Running,
    step: Step,
) -> Float[Tensor, "batch pos head d"]:
    """z from the whole pattern: scores and pattern of all rows are built and shown to their hooks,
    and z is computed from what these return."""
    query, key, value, call = _parts(inputs)
    # Hooks count keys by position. A cache may hold more keys (a static one's empty tail) or fewer
    # (a sliding window's): `axis` shows hooks one key for each position, and takes them back.
    axis = KeyAxis(key.shape[2], key.shape[2] if points.cross else step.total)
    positions = step.positions.expand(query.shape[0], -1)
    scores = edges.apply(row_scores(query, key, None, None, call), positions, None)
    scores = axis.take(run.fire(points.hook_attn_scores, axis.show(scores, -torch.inf)), -torch.inf)
    pattern = run.fire(points.hook_pattern, axis.show(softmax(scores, call.sinks), 0.0))
    # A hook on pattern rows reads them off the pattern, and an edit is written back into it.
    if rows is not None and rows.shape[1]:
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        local = _within_step(rows, step)
        selected = pattern[batch, :, local].transpose(1, 2)
        selected = selected.masked_fill((rows < 0)[:, None, :, None], 0.0)
        selected, edited = run.fire_watched(points.hook_pattern_rows, selected, rows=rows)
        if edited:
            sample, number = (rows >= 0).nonzero(as_tuple=True)
            pattern = pattern.clone()
            pattern[sample, :, local[sample, number]] = selected[sample, :, number]
    pattern = axis.take(pattern, 0.0)
    dropout = call.arguments.get("dropout", 0.0)
    if dropout and call.module.training:
        pattern = nn.functional.dropout(pattern, dropout)
    return mix(pattern, value, None, query.shape[1])


def _z_with_rows(
    z: Float[Tensor, "batch pos head d"],
    inputs: AttentionInputs,
    edges: Edges,
    rows: Int[Tensor, "batch row"],
    points: AttentionPoints,
    run: Running,
    step: Step,
) -> Float[Tensor, "batch pos head d"]:
    """z of SDPA, with the rows of `hook_pattern_rows` computed beside it from q and k; z changes
    only in rows that a hook has edited."""
    query, key, value, call = _parts(inputs)
    axis = KeyAxis(key.shape[2], key.shape[2] if points.cross else step.total)
    local = _within_step(rows, step)
    scores = edges.apply(row_scores(query, key, local, None, call), rows, None)
    pattern = softmax(scores, call.sinks).masked_fill((rows < 0)[:, None, :, None], 0.0)
    pattern, edited = run.fire_watched(points.hook_pattern_rows, axis.show(pattern, 0.0), rows=rows)
    if not edited:
        return z
    sample, number = (rows >= 0).nonzero(as_tuple=True)
    written = mix(axis.take(pattern, 0.0), value, None, query.shape[1])
    z = z.clone()
    z[sample, local[sample, number]] = written[sample, number]
    return z


def _within_step(rows: Int[Tensor, "batch row"], step: Step) -> Int[Tensor, "batch row"]:
    """Rows, counted from this step's first token. Samples with fewer rows are filled up with −1,
    which becomes 0 here and is masked by the caller."""
    return (rows - step.positions[0]).clamp(min=0)


__all__ = ["AttentionInputs", "Edges", "attention", "plain_z"]
