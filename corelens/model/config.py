"""The model's shape, under TransformerLens's names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from corelens.hf import source_of
from corelens.layouts.base import Layout
from corelens.model.parts import Parts
from corelens.model.projections import home
from corelens.model.towers import tower_layers
from corelens.model.weights import centres, norm_eps


@dataclass
class Config:
    """The model's shape under TransformerLens's names.

    Layers may differ: `heads` are the query heads of each layer (0: its mixer has none, or they
    attend to the tower's tokens and not to the row), `n_heads`,
    `n_kv_heads` and `d_head` those of the layer with most; `model.blocks[l].attn` has a layer's
    own. `d_mlp` is None where layers differ or are mixtures of experts. `normalization_type` is
    "RMS" or "LN"; `n_vision_layers` is 0 without a tower of layers; `n_deepstack`
    counts the decoder layers after which visual features are added again.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    heads: tuple[int, ...]
    d_model: int
    d_mlp: int | None
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


def config_of(hf: Any, layout: Layout, parts: Sequence[Parts]) -> Config:
    """Read the shape off a Hugging Face model and the parts of its layers."""
    decoder = layout.decoder(hf)
    text: Any = decoder.config
    widest = max(
        parts, key=lambda of_layer: (of_layer.n_heads, of_layer.n_kv_heads * of_layer.d_head)
    )
    widths = {of_layer.d_mlp for of_layer in parts}
    embeddings = hf.get_input_embeddings()
    norm: Any = layout.final_norm(decoder)
    return Config(
        n_layers=len(parts),
        n_heads=widest.n_heads,
        n_kv_heads=widest.n_kv_heads,
        d_head=widest.d_head,
        heads=tuple(0 if of_layer.cross else of_layer.n_heads for of_layer in parts),
        d_model=text.hidden_size,
        d_mlp=widths.pop() if len(widths) == 1 else None,
        d_vocab=text.vocab_size,
        family=hf.config.model_type,
        device=home(embeddings),
        dtype=next(embeddings.parameters()).dtype,
        eps=norm_eps(norm),
        n_ctx=getattr(text, "max_position_embeddings", 0),
        model_name=source_of(hf.config) or hf.config.model_type,
        act_fn=getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None) or "",
        normalization_type="LN" if centres(norm) else "RMS",
        n_vision_layers=len(tower_layers(hf, layout, "vision")),
        n_deepstack=layout.deepstack_layers(hf),
    )
