"""The model's shape, under TransformerLens's names."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from corelens.layouts.base import Layout
from corelens.model.projections import home
from corelens.model.weights import norm_eps


@dataclass
class Config:
    """The model's shape under TransformerLens's names.

    `normalization_type` is "RMS" or "LN"; `n_vision_layers` is 0 where the tower's layers are not known; `n_deepstack`
    counts the decoder layers after which visual features are added again.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    family: str
    device: torch.device
    dtype: torch.dtype
    eps: float
    n_ctx: int
    model_name: str
    act_fn: str
    normalization_type: str
    n_vision_layers: int
    n_deepstack: int
    attn_only: bool = False
    final_rms: bool = False

    @property
    def n_key_value_heads(self) -> int:
        """TransformerLens's name for `n_kv_heads`."""
        return self.n_kv_heads


def config_of(hf: Any, layout: Layout) -> Config:
    """Read the shape off a Hugging Face model."""
    decoder = layout.decoder(hf)
    text: Any = decoder.config
    n_heads = text.num_attention_heads
    embeddings = hf.get_input_embeddings()
    norm: Any = decoder.norm
    return Config(
        n_layers=text.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        d_head=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        d_model=text.hidden_size,
        d_mlp=text.intermediate_size,
        d_vocab=text.vocab_size,
        family=hf.config.model_type,
        device=home(embeddings),
        dtype=embeddings.weight.dtype,
        eps=norm_eps(norm),
        n_ctx=getattr(text, "max_position_embeddings", 0),
        model_name=getattr(hf.config, "_name_or_path", "") or hf.config.model_type,
        act_fn=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "",
        normalization_type="LN" if isinstance(norm, nn.LayerNorm) else "RMS",
        n_vision_layers=len(layout.vision_layers(hf)),
        n_deepstack=layout.deepstack_layers(hf),
    )
