"""Tiny random models of two types whose hooked runs were wrong in silence: what they branch on is
kept here whole."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers.family_parts import randomise

IMAGE = 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TEXT |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _class(name: str) -> Any:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)


def merges_by_ids() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Its decoder merges the picture itself, by the ids: without ids it runs without its
    picture."""
    config = _class("Phi4MultimodalConfig")(
        **TEXT, num_key_value_heads=2,
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14, "crop_size": 448, "image_token_id": IMAGE,
        },
        audio_config={
            "hidden_size": 32, "intermediate_size": 48, "num_blocks": 1, "num_attention_heads": 2,
            "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8,
            "audio_token_id": IMAGE + 1,
        },
    )  # fmt: skip
    hf = randomise(_class("Phi4MultimodalForCausalLM")(config))
    hf.set_attn_implementation("sdpa")
    ids = torch.randint(3, 50, (1, 557), generator=torch.Generator().manual_seed(0))
    ids[:, 6:551] = IMAGE
    pixels = torch.randn(1, 2, 3, 448, 448, generator=torch.Generator().manual_seed(1))
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_pixel_values": pixels,
    }
    tensors |= {
        "image_sizes": torch.tensor([[448, 448]]),
        "image_attention_mask": torch.ones(1, 2, 32, 32),
    }
    return hf, tensors


def masks_by_name() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """It builds the mask of its sparse layers only if the implementation is called "eager" or
    "sdpa"."""
    text = TEXT | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
    }
    text |= {
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    text |= {
        "qk_nope_head_dim": 8,
        "head_dim": 8,
        "index_topk": 4,
        "index_head_dim": 8,
        "index_n_heads": 2,
    }
    text |= {
        "layer_types": ["indexed_attention"] * 3,
        "indexer_types": ["full"] * 3,
        "no_rope_layers": [1, 1, 0],
    }
    text |= {"mlp_layer_types": ["dense", "sparse", "sparse"], "kv_source_layers": [0, 1, 2]}
    text |= {"model_type": "mistral_large4_text"}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision |= {"image_size": 56, "patch_size": 14, "head_dim": 16, "model_type": "pixtral"}
    config = _class("MistralLarge4Config")(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        spatial_merge_size=2,
    )
    hf = randomise(_class("MistralLarge4ForConditionalGeneration")(config))
    ids = torch.randint(3, 50, (1, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 6:10] = IMAGE
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return hf, tensors | {"image_sizes": torch.tensor([[56, 56]])}
