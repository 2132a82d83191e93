"""The one attention function of all models under hooks: it fires the hook points of attention.

transformers calls the function that is registered under the name "sdpa". While a hooked run lasts,
that is `attention` below (see `corelens.hooks.exchange`). So rotated q, k and v, scores, pattern
and z of every head of every model pass through this file.

You pay for what you hook. A layer without hooks on scores or pattern calls transformers' own SDPA
function. Rows of the pattern (a few queries, such as the question's tokens) are computed beside it
from q and k, in O(rows × T) memory. The order inside a layer: rotated q, k, v → sparse plan → edges
→ scores → softmax → pattern → rows → z computed → eviction from the cache → `hook_z`. (`hook_q` and
`hook_k` fire before, in the modules of the projections: `corelens.model.wiring`.) Scores and
softmax are in float32.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.hooks.edges import Edges
from corelens.hooks.exchange import original
from corelens.hooks.points import AttentionPoints, HookPoint
from corelens.hooks.prefix import Prefix
from corelens.hooks.rows import Call, KeyAxis, mix, row_scores, rows_z, softmax
from corelens.hooks.running import Running, Step, current


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one layer's attention. They are immutable: code that changes an input
    returns a changed copy.

    Args:
        query, key, value: after rotary; key and value include the tokens that the cache holds.
        call: the module's own arguments: mask, scaling, soft cap and the like.
        kv_per_query_head: True if the KV heads were repeated so that each query head has its own,
            which is needed to edit one head alone.
        prefix: earlier keys and values that are not among `key` and `value`; None: all are.
    """

    query: Float[Tensor, "batch head pos d_head"]
    key: Float[Tensor, "batch kv_head key d_head"]
    value: Float[Tensor, "batch kv_head key d_value"]
    call: Call
    kv_per_query_head: bool = False
    prefix: Prefix | None = None

    def whole(self) -> "AttentionInputs":
        """These inputs with all keys and values in `key` and `value`."""
        if self.prefix is None:
            return self
        key, value = self.prefix.before(self.key, self.value)
        return replace(self, key=key, value=value, prefix=None)


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head pos d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_value"],
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Float[Tensor, "batch pos head d_value"], None]:
    """The attention function that transformers calls, for every attention layer, while a hooked run
    lasts.

    Calls from other models and other threads come here too: no hook fires in them.

    Args:
        module: the attention module that calls.
        query: queries as attention uses them, after rotary.
        key: all keys so far, after rotary and from the cache.
        value: all values so far.
        attention_mask: None (causal), boolean or additive, [1|batch, 1|head, pos, key].
        arguments: the module's other arguments: scaling, dropout, is_causal, softcap, s_aux (sink
            logits), position_bias.

    Returns:
        (z, None). None stands for the pattern, which transformers' SDPA function does not return
        either.
    """
    run = current.get()  # the hooked run of this thread; None outside a run
    inputs = AttentionInputs(query, key, value, Call.of(module, query, attention_mask, arguments))
    if run is not None and module in run.vision:  # a layer of a tower has a function of its own
        return run.vision[module](query, key, value, inputs.call), None
    points = run.sites.get(module) if run is not None else None
    if run is None or run.step is None or points is None:  # no run, or another model
        return _unhooked(inputs, run), None
    if run.prefix is not None:
        inputs = replace(inputs, prefix=run.prefix.of(module.layer_idx))  # type: ignore[arg-type]
    if run.sparse_plan is None and not any(point.active for point in points.in_function):
        return _unhooked(inputs, run), None
    return _hooked(inputs, points, run, run.step), None


def _unhooked(inputs: AttentionInputs, run: Running | None) -> Float[Tensor, "batch pos head d"]:
    """z of a call without hooks: from another model, another thread, or a layer without hooks."""
    # Outside a run the caller asked for "sdpa" and gets exactly that. Within a run the model may
    # have been loaded with eager attention: SDPA would leave out its soft cap or its sink logits,
    # and `_z_without_pattern` keeps them.
    return _sdpa(inputs) if run is None else _z_without_pattern(inputs, None)


def _hooked(
    inputs: AttentionInputs, points: AttentionPoints, run: Running, step: Step
) -> Float[Tensor, "batch pos head d"]:
    """One layer's attention under hooks, from rotated q, k and v to z."""
    inputs = _with_edited_qkv(inputs, points, run)
    patterned = (points.hook_attn_scores, points.hook_pattern, points.hook_pattern_rows)
    if run.sparse_plan is not None or any(p.active for p in (points.hook_edges, *patterned)):
        inputs = inputs.whole()  # these see every key of every run
    # The keys of cross-attention are the tower's tokens, to which a sparse plan does not apply.
    plan = None if points.cross else run.sparse_plan
    if plan is not None:  # before the hooks: they see what the plan leaves
        inputs = AttentionInputs(inputs.query, *plan.restrict(*_parts(inputs), points))

    # The functions at `hook_edges` write into `edges` which edges to cut or to strengthen, and
    # which query heads get keys or values of their own.
    columns = inputs.key.shape[2] if points.cross else None
    edges = Edges(step, inputs.query.shape[0], inputs.query.shape[1], inputs.query.device, columns)
    if points.hook_edges.active:
        run.fire(points.hook_edges, edges)
    if edges.rewrites:  # one query head gets its own keys or values
        key, value = edges.spread(inputs.key, inputs.value)
        inputs = replace(inputs, key=key, value=value, kv_per_query_head=True)

    rows = step.rows if points.hook_pattern_rows.active else None
    if points.hook_attn_scores.active or points.hook_pattern.active:
        z = _z_of_whole_pattern(inputs, edges, rows, points, run, step)
    else:
        # SDPA cannot edit edges: the rows with an edited edge, and only these, are computed again.
        z = edges.recompute(_z_without_pattern(inputs, plan), *_parts(inputs))
        if rows is not None and rows.shape[1]:
            z = _z_with_rows(z, inputs, edges, rows, points, run, step)

    if plan is not None:  # writes pruned heads' fixed outputs, evicts keys from the cache
        call = replace(inputs.call, edit=edges.apply) if edges.edits else inputs.call
        z = plan.finish(z, inputs.query, call)
    return run.fire(points.hook_z, z)


def _parts(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor, Call]:
    return inputs.query, inputs.key, inputs.value, inputs.call


def plain_z(
    query: Tensor, key: Tensor, value: Tensor, call: Call
) -> Float[Tensor, "batch pos head d"]:
    """z of these tensors, soft caps and sink logits included; no hook fires."""
    return _z_without_pattern(AttentionInputs(query, key, value, call), None)


# --- q, k and v


def _with_edited_qkv(
    inputs: AttentionInputs, points: AttentionPoints, run: Running
) -> AttentionInputs:
    """q, k and v after their hooks, which see them as [batch, pos, head, d]."""
    new = inputs.query.shape[2]
    query = run.fire(points.hook_rot_q, inputs.query.transpose(1, 2)).transpose(1, 2)
    if getattr(inputs.call.module, "layer_idx", None) in run.stored:
        # This layer's k and v were edited before they entered the cache, so that later steps see
        # the edits. Their hooks do not fire again.
        return replace(inputs, query=query)
    if points.cross:
        assert run.step is not None
        # After the first step the tower's keys come from the cache; their hooks fired then.
        if run.step.cached and int(run.step.positions[0]):
            return replace(inputs, query=query)
        new = inputs.key.shape[2]
    key = _with_edited_tokens(run, points.hook_rot_k, inputs.key, new)
    value = _with_edited_tokens(run, points.hook_v, inputs.value, new)
    return replace(inputs, query=query, key=key, value=value)


def _with_edited_tokens(
    run: Running, point: HookPoint, x: Float[Tensor, "batch kv_head key d"], new: int
) -> Float[Tensor, "batch kv_head key d"]:
    """Keys or values; the last `new` (this step's tokens) are replaced by what the hooks return."""
    if not point.active:
        return x
    earlier, tokens = x[:, :, : x.shape[2] - new], x[:, :, x.shape[2] - new :].transpose(1, 2)
    if not earlier.shape[2]:
        return run.fire(point, tokens).transpose(1, 2)
    # The tensor may be a view of a KV cache, which several layers can share. The hook gets a copy,
    # so that an edit in place does not change the cache.
    return torch.cat([earlier, run.fire(point, tokens.clone()).transpose(1, 2)], dim=2)


# --- z without a pattern


def _z_without_pattern(inputs: AttentionInputs, plan: Any) -> Float[Tensor, "batch pos head d"]:
    """z by the fastest function that supports this call; no hook sees a pattern."""
    if inputs.prefix is not None:
        z = inputs.prefix.z(*_parts(inputs))
        return _z_without_pattern(inputs.whole(), plan) if z is None else z
    call = inputs.call
    if plan is not None and (z := plan.attend(*_parts(inputs))) is not None:
        return z
    if call.softcap is not None or call.sink_logits is not None:  # SDPA supports neither
        return _z_from_scores(inputs)
    # The KV heads are repeated already; transformers' function would repeat them again.
    if inputs.kv_per_query_head:
        return _sdpa_per_query_head(inputs)
    return _sdpa(inputs)


def _sdpa(inputs: AttentionInputs) -> Float[Tensor, "batch pos head d"]:
    """z by transformers' own function, with the arguments that the module gave."""
    call = inputs.call
    return original()(
        call.module, inputs.query, inputs.key, inputs.value, call.mask, **call.arguments
    )[0]


def _z_from_scores(inputs: AttentionInputs) -> Float[Tensor, "batch pos head d"]:
    """z of all rows and heads from their scores, which may have soft cap, sink logits and bias."""
    query, key, value, call = _parts(inputs)
    return rows_z(query, key, value, None, None, call)[0]


def _sdpa_per_query_head(inputs: AttentionInputs) -> Float[Tensor, "batch pos head d"]:
    """z by torch's SDPA, of keys and values that have one head for each query head."""
    query, key, value, call = _parts(inputs)
    if call.bias is not None:
        return _z_from_scores(inputs)
    causal = call.mask is None and call.is_causal and query.shape[2] > 1
    if causal:  # without the empty slots at the end of a static cache
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
    """z = pattern · v of all rows, after `hook_attn_scores`, `hook_pattern` and
    `hook_pattern_rows` have edited scores and pattern."""
    query, key, value, call = _parts(inputs)
    # Hooks see one key for each position so far. A KV cache may hold more (a static one) or fewer
    # (a sliding window). `axis.show` turns the cache's keys into these, `axis.take` back.
    axis = KeyAxis(key.shape[2], key.shape[2] if points.cross else step.total)
    positions = step.positions.expand(query.shape[0], -1)
    scores = edges.apply(row_scores(query, key, None, None, call), positions, None)
    scores = axis.take(run.fire(points.hook_attn_scores, axis.show(scores, -torch.inf)), -torch.inf)
    pattern = run.fire(points.hook_pattern, axis.show(softmax(scores, call.sink_logits), 0.0))
    # Hooks on pattern rows get these rows of the pattern, and their edits are written back into it.
    if rows is not None and rows.shape[1]:
        batch = torch.arange(rows.shape[0], device=rows.device)[:, None]
        local = _within_step(rows, step)  # [batch, row]
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
    """z after `hook_pattern_rows` has fired on a few rows of the pattern, computed from q and k.
    If a hook edited them, z of these rows is computed again; the other rows are unchanged."""
    query, key, value, call = _parts(inputs)
    axis = KeyAxis(key.shape[2], key.shape[2] if points.cross else step.total)
    local = _within_step(rows, step)
    scores = edges.apply(row_scores(query, key, local, None, call), rows, None)
    pattern = softmax(scores, call.sink_logits).masked_fill((rows < 0)[:, None, :, None], 0.0)
    pattern, edited = run.fire_watched(points.hook_pattern_rows, axis.show(pattern, 0.0), rows=rows)
    if not edited:
        return z
    sample, number = (rows >= 0).nonzero(as_tuple=True)
    written = mix(axis.take(pattern, 0.0), value, None, query.shape[1])
    z = z.clone()
    z[sample, local[sample, number]] = written[sample, number]
    return z


def _within_step(rows: Int[Tensor, "batch row"], step: Step) -> Int[Tensor, "batch row"]:
    """Row positions, counted from this step's first token. Padding (−1) becomes 0; callers
    must mask it."""
    return (rows - step.positions[0]).clamp(min=0)


__all__ = ["AttentionInputs", "attention", "plain_z"]
