"""Attention that gives zeros, so that each token answers for its own pixels or its own sound
alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from corelens.hf.attention import attention_set


@contextmanager
def attention_off(modules: Iterable[Any]) -> Iterator[None]:
    """Within this context attention of these modules mixes no tokens, whatever function they use;
    their configs' own implementation is put back afterwards. (There is no documented way to change
    it for a part of a model.)
    """
    # (importing it takes as long as importing transformers' model code)
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("corelens_off", _unmixed)
    AttentionMaskInterface.register("corelens_off", sdpa_mask)
    owned = (getattr(module, "config", None) for module in modules)
    with attention_set(
        [x for x in owned if hasattr(x, "_attn_implementation_internal")], "corelens_off"
    ):
        yield


def _unmixed(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
) -> tuple[Any, None]:
    """Zeros among a sequence's own tokens. Queries of another length pool: they get the mean of the
    values that they may see, a pooled cell's few patches or the whole picture."""
    batch, heads, length = query.shape[:3]
    z = value.new_zeros(batch, heads, length, value.shape[3])
    if length != key.shape[2]:
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
        seen = (z[..., :1] + 1).expand(-1, -1, -1, key.shape[2])
        if attention_mask is not None:
            # (what hides is False, or the lowest number of a dtype, in float16 −65504)
            lowest = -30000.0 if attention_mask.is_floating_point() else 0
            seen = seen * (attention_mask > lowest)
        z = (seen / seen.sum(-1, keepdim=True).clamp(min=1)) @ value
    return z.transpose(1, 2), None


@contextmanager
def silent(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within this context these modules give zeros."""

    def zeros(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [module.register_forward_hook(zeros) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
