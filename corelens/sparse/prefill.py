"""Prefill engines: attention in which some heads see all and the others what their pattern leaves.

reference   dense attention under the mask, in float32: the definition that every other engine is tested against
"""

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.rows import Call, rows_z

ENGINES = ("reference",)


def reference(
    query: Float[Tensor, "batch head pos d"],
    key: Float[Tensor, "batch kv_head key d"],
    value: Float[Tensor, "batch kv_head key d_value"],
    call: Call,
) -> Float[Tensor, "batch pos head d_value"]:
    """Dense attention under the call's mask and pattern."""
    return rows_z(query, key, value, None, None, call)[0].to(query.dtype)


def engine_for(name: str, device: torch.device) -> str:
    """The engine that runs: the one named, or the fastest that this device has."""
    return "reference" if name == "auto" else name
