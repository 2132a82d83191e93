"""The `reference` engine: dense attention under the mask, in float32: what every other engine is
tested against."""

from jaxtyping import Float
from torch import Tensor

from corelens.hooks.rows import Call, rows_z
from corelens.sparse.visible import Visible


def reference(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    call: Call,
) -> Float[Tensor, "batch pos head d_value"]:
    """Attention under the call's mask and pattern."""
    if isinstance(call.allowed, Visible):
        call.allowed.ran.add("reference")
    return rows_z(query, key, value, None, None, call)[0].to(query.dtype)
