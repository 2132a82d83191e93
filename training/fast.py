"""Faster training steps: the same mathematics as transformers' modules, for batches of equal
pictures.

Measured at these sizes on one core with bf16 matrix units: matrix products in bfloat16 are several
times faster than in float32, while fused attention is faster in float32, and a patch embedding's
convolution is slow in any type. On a GPU attention is in bfloat16, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

from corelens.hf import attention_name, forget_attention

_NAME = "corelens_demo_training"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    allowed: Callable[[], Tensor | None] = lambda: None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal in the decoder, whose batches are padded on the right only, so that causality masks
    the padding; everywhere in a tower. `allowed` may give a mask for the decoder, True where a row
    sees a column."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    mask = allowed() if module.is_causal else None
    causal = module.is_causal and mask is None
    out = _fused(query, key, value, attn_mask=mask, is_causal=causal, scale=kwargs.get("scaling"))
    return out.transpose(1, 2), None


def _fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Fused attention: on a CPU in float32, elsewhere as autocast has it (and in one type: norms
    leave float32)."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options)


def _vision_attention(attn: Any) -> Callable[..., Tensor]:
    """The vision attention's forward for equal pictures at once: [tokens, width] → [tokens,
    width]."""

    def forward(
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> Tensor:
        tokens, pictures = hidden_states.shape[0], cu_seqlens.numel() - 1
        qkv = (
            attn.qkv(hidden_states)
            .reshape(tokens, 3, attn.num_heads, -1)
            .permute(1, 0, 2, 3)
            .unbind(0)
        )
        q, k = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
        per_picture = (pictures, tokens // pictures, attn.num_heads, -1)
        q, k, v = (x.reshape(per_picture).transpose(1, 2) for x in (q, k, qkv[2]))
        return attn.proj(_fused(q, k, v, scale=attn.scaling).transpose(1, 2).reshape(tokens, -1))

    return forward


def _patch_embedding(embed: Any) -> Callable[[Tensor], Tensor]:
    def forward(patches: Tensor) -> Tensor:
        weight = embed.proj.weight
        if patches.shape[1] < weight[0].numel():
            weight = weight.sum(2)  # both frames of a temporal patch are the same picture
        weight = weight.flatten(1)
        return F.linear(patches, weight, embed.proj.bias)

    return forward


def _convolution(conv: Any) -> Callable[[Tensor], Tensor]:
    """A patch embedding's Conv2d, whose windows do not overlap, as one matrix product."""

    def forward(pixels: Tensor) -> Tensor:
        side = conv.kernel_size[0]
        patches = rearrange(pixels, "b c (r h) (k w) -> b r k (c h w)", h=side, w=side)
        return rearrange(F.linear(patches, conv.weight.flatten(1), conv.bias), "b r k c -> b c r k")

    return forward


def _swaps(model: Any) -> list[tuple[Any, Callable]]:
    """Modules, and what each computes within `fast_training`."""
    if model.config.model_type == "qwen3_vl":
        tower = model.model.visual
        attention = [(block.attn, _vision_attention(block.attn)) for block in tower.blocks]
        return [(tower.patch_embed, _patch_embedding(tower.patch_embed)), *attention]
    convolutions = [x for x in model.model.vision_tower.modules() if isinstance(x, nn.Conv2d)]
    return [(conv, _convolution(conv)) for conv in convolutions]


@contextmanager
def fast_training(
    model: Any, allowed: Callable[[], Tensor | None] = lambda: None
) -> Iterator[None]:
    """Within it, `model` takes what `families.py` makes of a batch of equally large pictures or
    videos, text padded on the right and no attention mask, and trains faster. Everything is as
    before afterwards.

    `allowed` gives the decoder's mask of the batch that runs [batch, 1, row, column], True where a
    row sees a column; None: causality alone.
    """
    before = {
        key: attention_name(getattr(model.config, key)) for key in ("text_config", "vision_config")
    }
    swapped, during = _swaps(model), dict.fromkeys(before, _NAME)
    AttentionInterface.register(_NAME, partial(_attention, allowed=allowed))
    try:
        model.set_attn_implementation(during)
        for module, forward in swapped:
            module.forward = forward
        yield
    finally:
        for module, _ in swapped:
            module.__dict__.pop("forward", None)
        model.set_attn_implementation(before)
        forget_attention(_NAME)
