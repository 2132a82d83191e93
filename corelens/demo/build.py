"""The demo models before training: architectures and their real processors, from configs alone."""

from typing import Any

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from corelens.demo.text import CHAT_TEMPLATE, build_tokenizer
from corelens.errors import CorelensError

_IMAGE: dict[str, Any] = {
    "patch_size": 16,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3vl-s": {
        "family": "qwen3_vl",
        "text": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "mrope_section": [4, 2, 2],
        },
        "vision": {
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_heads": 4,
            "deepstack_visual_indexes": [1],
        },
    },
}
# The same model, trained on to longer contexts, and from there on videos.
PRESETS["qwen3vl-s-long"] = PRESETS["qwen3vl-s-video"] = PRESETS["qwen3vl-s"]
"""One entry a model: its family and the sizes that differ from the family's small defaults."""


def build_processor(name: str) -> Qwen3VLProcessor:
    """The processor of a preset: text and PIL images (or video frames) in, the model's tensors out."""
    _preset(name)
    # A video's limits are of all its frames together: `LONG` of the world `video` must pass.
    video = Qwen3VLVideoProcessor(**_IMAGE, size={"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096})
    return Qwen3VLProcessor(
        # A picture whose sides are multiples of 32 px passes unresized from 64 × 64 to 2048 × 2048.
        image_processor=Qwen2VLImageProcessor(**_IMAGE, size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048}),
        tokenizer=build_tokenizer(),
        video_processor=video,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(name: str, processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """The model of a preset with fresh random weights in float32; seed torch before."""
    preset, tokenizer = _preset(name), processor.tokenizer
    text = dict(preset["text"])
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": text.pop("mrope_section")}
    special = {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **text,
        },
        vision_config={
            "patch_size": _IMAGE["patch_size"],
            "spatial_merge_size": _IMAGE["merge_size"],
            "temporal_patch_size": _IMAGE["temporal_patch_size"],
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 256,
            **preset["vision"],
        },
        tie_word_embeddings=True,
        **special,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    return model


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise CorelensError(f"demo model {name!r}", f"one of {', '.join(PRESETS)}", "name one of these models")
    return PRESETS[name]
