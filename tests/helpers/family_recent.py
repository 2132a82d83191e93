"""Tiny random models of families that have no layout of their own, with their real processors:
their cells are measured."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers.family_parts import build_tokenizer, chatml, text_config
from helpers.family_qwen import QWEN_TEMPLATE, qwen_ids, qwen_tokenizer

SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    return build_tokenizer(
        names, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def qwen3_5() -> tuple[nn.Module, Any]:
    """Linear attention in two of four layers, a gate in the query projection of the others."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer()
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    }
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "linear_conv_kernel_dim": 4}
    text = text_config(tokenizer, head_dim=16, rope_parameters=rope, **linear)
    text["layer_types"] = ["linear_attention", "full_attention"] * 2
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "num_position_embeddings": 64,
    }
    vision |= {"patch_size": 16, "out_hidden_size": 32}
    config = Qwen3_5Config(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    grid = {**HALF, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(
            **grid, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 256 * 32 * 32}
        ),
        tokenizer,
        Qwen3VLVideoProcessor(
            **grid, size={"shortest_edge": 8 * 32 * 32, "longest_edge": 256 * 32 * 32}
        ),
        chat_template=QWEN_TEMPLATE,
    )
    return Qwen3_5ForConditionalGeneration(config), processor


def glm46v() -> tuple[nn.Module, Any]:
    """Norms behind attention and MLP; patches of 14 pixels, 2 × 2 a token."""
    from transformers import (
        Glm46VConfig,
        Glm46VForConditionalGeneration,
        Glm46VImageProcessor,
        Glm46VProcessor,
        Glm46VVideoProcessor,
    )

    names = [
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|video|>",
    ]
    tokenizer = _tokenizer(*names)
    ids = dict(zip(
        ("image_start_token_id", "image_end_token_id", "image_token_id", "video_start_token_id", "video_end_token_id",
         "video_token_id"), tokenizer.convert_tokens_to_ids(names), strict=True,
    ))  # fmt: skip
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    }
    text = text_config(tokenizer, head_dim=16, rope_parameters=rope)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "intermediate_size": 48,
    }
    config = Glm46VConfig(
        text_config=text, vision_config={**vision, "patch_size": 14, "image_size": 56}, **ids
    )
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 256 * 28 * 28}
    template = chatml(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
    )
    processor = Glm46VProcessor(
        Glm46VImageProcessor(size=size),
        tokenizer,
        Glm46VVideoProcessor(size=size),
        chat_template=template,
    )
    return Glm46VForConditionalGeneration(config), processor


def mistral3() -> tuple[nn.Module, Any]:
    """A tower at native resolution, 2 × 2 patches a token, a break token a row that is no image
    token."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    tokenizer = _tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vision = {
        "model_type": "pixtral",
        **SIGLIP,
        "patch_size": 14,
        "image_size": 336,
        "head_dim": 16,
    }
    text = {"model_type": "mistral", **text_config(tokenizer, head_dim=16)}
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    images = PixtralImageProcessor(size={"longest_edge": 336}, patch_size=14)
    options = {"patch_size": 14, "spatial_merge_size": 2, "chat_template": chatml("[IMG]", "")}
    return Mistral3ForConditionalGeneration(config), PixtralProcessor(images, tokenizer, **options)


def aya_vision() -> tuple[nn.Module, Any]:
    """Tiles of 56 pixels with markers between them, then a thumbnail; 2 × 2 patches shuffled into a
    token."""
    from transformers import (
        AyaVisionConfig,
        AyaVisionForConditionalGeneration,
        AyaVisionProcessor,
        GotOcr2ImageProcessor,
    )

    special = [
        "<image>",
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE_GLOBAL",
    ]
    tokenizer = _tokenizer(*special, *(f"TILE_{n}" for n in range(1, 13)))
    vision = {"model_type": "siglip_vision_model", **SIGLIP, "patch_size": 14, "image_size": 56}
    text = {"model_type": "cohere2", **text_config(tokenizer, head_dim=8, sliding_window=64)}
    config = AyaVisionConfig(
        vision_config=vision | {"vision_use_head": False}, text_config=text, downsample_factor=2,
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"), alignment_intermediate_size=64,
    )  # fmt: skip
    images = GotOcr2ImageProcessor(
        size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    options = {
        "patch_size": 28,
        "img_size": 56,
        "downsample_factor": 1,
        "chat_template": chatml("<image>", ""),
    }
    return AyaVisionForConditionalGeneration(config), AyaVisionProcessor(
        images, tokenizer, **options
    )


def lfm2_vl() -> tuple[nn.Module, Any]:
    """Short convolutions in two of four layers; a tower at native resolution, tiles for large
    pictures."""
    from transformers import (
        Lfm2VlConfig,
        Lfm2VlForConditionalGeneration,
        Lfm2VlImageProcessor,
        Lfm2VlProcessor,
    )

    special = ["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"]
    special += [f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)]
    tokenizer = _tokenizer(*special)
    names = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
    }
    for name, token in {**names, "image_thumbnail_token": "<|img_thumbnail|>"}.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    vision = {"model_type": "siglip2_vision_model", **SIGLIP, "patch_size": 8, "num_patches": 64}
    text = {
        "model_type": "lfm2",
        **text_config(tokenizer),
        "norm_eps": 1e-5,
        "block_auto_adjust_ff_dim": False,
    }
    text["layer_types"] = ["conv", "full_attention"] * 2
    config = Lfm2VlConfig(
        vision_config=vision | {"vision_use_head": False}, text_config=text, downsample_factor=2,
        projector_hidden_size=48, image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    images = Lfm2VlImageProcessor(
        downsample_factor=2, do_image_splitting=True, min_tiles=2, max_tiles=4, use_thumbnail=True, min_image_tokens=4,
        max_image_tokens=64, encoder_patch_size=8, tile_size=64, max_pixels_tolerance=2.0,
    )  # fmt: skip
    processor = Lfm2VlProcessor(images, tokenizer, chat_template=chatml("<image>", ""))
    return Lfm2VlForConditionalGeneration(config), processor


def llama4() -> tuple[nn.Module, Any]:
    """Tiles on the best of several canvases and the whole picture; 2 × 2 patches shuffled; experts
    in every second layer."""
    from transformers import (
        Llama4Config,
        Llama4ForConditionalGeneration,
        Llama4ImageProcessor,
        Llama4Processor,
    )

    special = [
        "<|image|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    ]
    tokenizer = _tokenizer(*special)
    vision = {
        **SIGLIP,
        "patch_size": 14,
        "image_size": 56,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
    }
    vision |= {"projector_output_dim": 32, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5}
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
    text = text_config(tokenizer, head_dim=8, attention_chunk_size=512, **experts)
    config = Llama4Config(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
    )  # fmt: skip
    images = Llama4ImageProcessor(
        size={"height": 56, "width": 56}, max_patches=4, resize_to_max_canvas=False
    )
    processor = Llama4Processor(
        images, tokenizer, patch_size=14, chat_template=chatml("<|image|>", "")
    )
    hf = Llama4ForConditionalGeneration(config)
    hf.language_model.register_forward_hook(_without_image_outputs)
    return hf, processor


def _without_image_outputs(module: nn.Module, args: Any, output: Any) -> None:
    """transformers 5.24's Llama 4 reads this of its decoder's output, which has no such field: a
    plain run raises."""
    if not hasattr(output, "image_outputs"):
        object.__setattr__(output, "image_outputs", None)


def gemma4(
    audio: dict[str, Any] | None = None, template: str | None = None
) -> tuple[nn.Module, Any]:
    """Wider heads in its full-attention layers, shared KV layers, inputs a layer; patches pooled to
    a budget of tokens. With the config of an `audio` tower it hears, too."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    special = [
        "<|image|>",
        "<|image>",
        "<image|>",
        "<|audio|>",
        "<|audio>",
        "<audio|>",
        "<|video|>",
    ]
    tokenizer = _tokenizer(*special)
    for name, token in {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
                        "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
                        "video_token": "<|video|>"}.items():  # fmt: skip
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    vision = {
        "model_type": "gemma4_vision",
        **SIGLIP,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 8,
    }
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 64}
    kinds = ["sliding_attention", "full_attention"] * 2
    text = text_config(
        tokenizer, head_dim=8, global_head_dim=16, sliding_window=64, layer_types=kinds
    )
    text |= {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": text["vocab_size"],
        "num_kv_shared_layers": 0,
    }
    ids = {"image_token_id": "<|image|>", "boi_token_id": "<|image>", "eoi_token_id": "<image|>",
           "video_token_id": "<|video|>", "audio_token_id": "<|audio|>"}  # fmt: skip
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=audio,
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )  # fmt: skip
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2), tokenizer,
        Gemma4VideoProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        chat_template=template or chatml("<|image|>", "<|video|>"),
    )  # fmt: skip
    return Gemma4ForConditionalGeneration(config), processor


BUILDERS = {f.__name__: f for f in (qwen3_5, glm46v, mistral3, aya_vision, lfm2_vl, llama4, gemma4)}
