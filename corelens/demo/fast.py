"""Faster training steps on one CPU core: the same mathematics as transformers' modules, for batches of equal pictures.

Measured at these sizes on one core with bf16 matrix units: matrix products in bfloat16 are several times faster than
in float32, while fused attention is faster in float32, and the patch embedding's Conv3d is slow in any type.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

_NAME = "corelens_demo_training"


def patches_of(images: Tensor) -> Tensor:
    """Pictures uint8 [batch, height, width, 3] → patches [batch · patches, 3 · 16 · 16], normalised to −1..1.

    The order is the image processor's (2 × 2 patches of a visual token together), without the second, equal frame.
    Videos [batch, frames, height, width, 3] → [batch · patches, 3 · 2 · 16 · 16], two frames a patch.
    """
    *batch, height, width, _ = images.shape
    pixels = images.float().div_(127.5).sub_(1.0)
    pixels = pixels.view(-1, 2 if len(batch) == 2 else 1, height // 32, 2, 16, width // 32, 2, 16, 3)
    frames = pixels.shape[1]
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * frames * 16 * 16)


def _text_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention in float32; batches are padded on the right only, so causality masks the padding."""
    groups = query.shape[1] // key.shape[1]
    with torch.autocast("cpu", enabled=False):
        key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
        out = F.scaled_dot_product_attention(query.float(), key, value, is_causal=True, scale=kwargs.get("scaling"))
    return out.transpose(1, 2), None


def _vision_attention(attn: Any) -> Callable[..., Tensor]:
    """The vision attention's forward for equal pictures at once: [tokens, width] → [tokens, width]."""

    def forward(
        hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        tokens, pictures = hidden_states.shape[0], cu_seqlens.numel() - 1
        qkv = attn.qkv(hidden_states).reshape(tokens, 3, attn.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        q, k = apply_rotary_pos_emb_vision(qkv[0], qkv[1], *position_embeddings)
        each = (pictures, tokens // pictures, attn.num_heads, -1)
        q, k, v = (x.reshape(each).transpose(1, 2) for x in (q, k, qkv[2]))
        out = F.scaled_dot_product_attention(q, k, v, scale=attn.scaling).transpose(1, 2)
        return attn.proj(out.reshape(tokens, -1))

    return forward


def _patch_embedding(embed: Any) -> Callable[[Tensor], Tensor]:
    def forward(patches: Tensor) -> Tensor:
        weight = embed.proj.weight
        if patches.shape[1] < weight[0].numel():
            weight = weight.sum(2)  # both frames of a temporal patch are the same picture
        weight = weight.flatten(1)
        return F.linear(patches, weight, embed.proj.bias)

    return forward


@contextmanager
def fast_training(model: Any) -> Iterator[None]:
    """Within it, the Qwen3-VL `model` takes `patches_of` a batch of equally large pictures or videos, right-padded text
    and no attention mask, and trains faster. Everything is as before afterwards."""
    tower, attention = model.model.visual, model.config.text_config._attn_implementation
    vision = tower.config._attn_implementation
    swapped = [(tower.patch_embed, _patch_embedding(tower.patch_embed))]
    swapped += [(block.attn, _vision_attention(block.attn)) for block in tower.blocks]
    AttentionInterface.register(_NAME, _text_attention)
    try:
        model.set_attn_implementation({"text_config": _NAME, "vision_config": vision})
        for module, forward in swapped:
            module.forward = forward
        yield
    finally:
        for module, _ in swapped:
            module.__dict__.pop("forward", None)
        model.set_attn_implementation({"text_config": attention, "vision_config": vision})
        cast(dict, AttentionInterface._global_mapping).pop(_NAME, None)
