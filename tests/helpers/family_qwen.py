"""Tiny models of the Qwen-VL families."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers.family_parts import build_tokenizer, chatml, text_config

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


QWEN_TEMPLATE = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(
        QWEN_SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{value}|>") for key, value in names.items()}


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def qwen3_vl() -> tuple[nn.Module, Any]:
    """DeepStack after two of three vision layers; a picture has 4 to 256 tokens of 32 × 32
    pixels."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    config = Qwen3VLConfig(
        text_config=text_config(tokenizer, head_dim=8, rope_parameters=_mrope()),
        **_qwen3_rest(tokenizer),
    )
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(tokenizer)


def qwen3_vl_moe() -> tuple[nn.Module, Any]:
    """As Qwen3-VL; the second layer is dense, the others choose two of four experts."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = qwen_tokenizer()
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
    }
    text = text_config(tokenizer, head_dim=8, rope_parameters=_mrope(), **experts)
    config = Qwen3VLMoeConfig(text_config=text, **_qwen3_rest(tokenizer))
    return Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(tokenizer)


def _qwen3_rest(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 64,
    }
    vision |= {"patch_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 2]}
    return {"vision_config": vision, "tie_word_embeddings": False, **qwen_ids(tokenizer)}


def _qwen3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(
            **half, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 256 * 32 * 32}
        ),
        tokenizer,
        Qwen3VLVideoProcessor(
            **half, size={"shortest_edge": 8 * 32 * 32, "longest_edge": 256 * 32 * 32}
        ),
        chat_template=QWEN_TEMPLATE,
    )


def qwen2_vl() -> tuple[nn.Module, Any]:
    """A picture has 4 to 256 tokens of 28 × 28 pixels."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    text = text_config(tokenizer, rope_parameters=_mrope())
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config), _qwen2_processor(Qwen2VLProcessor, tokenizer)


def qwen2_5_vl() -> tuple[nn.Module, Any]:
    """As Qwen2-VL; the tower attends in windows of 2 × 2 tokens in all layers but its second."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    tokenizer = qwen_tokenizer()
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
    }
    vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    text = text_config(tokenizer, rope_parameters=_mrope())
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2_5_VLForConditionalGeneration(config), _qwen2_processor(
        Qwen2_5_VLProcessor, tokenizer
    )


def _qwen2_processor(cls: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 256 * 28 * 28}
    return cls(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=QWEN_TEMPLATE,
    )
