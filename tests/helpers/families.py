"""Tiny random models of every family with their real processors, built from configs, offline.

All parameters are random (norm weights and biases too, and projectors that a family initialises to
zero: a weight of 1 or 0 hides errors). Image geometry is shrunk so that a forward pass takes
milliseconds, but every mechanism of the family's checkpoints stays: tiles, thumbnails, newline
tokens, merging, pooling, DeepStack.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from helpers.family_parts import build_tokenizer, chatml, randomise, text_config
from helpers.family_qwen import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe

# --- LLaVA

LLAVA_TEMPLATE = (
    "{%- for message in messages -%}{{- message.role.upper() + ': ' -}}"
    "{%- for part in message.content if part.type == 'image' -%}{{- '<image>\n' -}}{%- endfor -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text + ' ' -}}{%- endfor "
    "-%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return build_tokenizer(special, adds_bos=True, padding_side="left", **names)


def llava() -> tuple[nn.Module, Any]:
    """8 × 8 tokens from a centre crop; features of the tower's last layer but one."""
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _llama_tokenizer()
    vision = {"model_type": "clip_vision_model", **CLIP, "image_size": 112}
    text, image_id = (
        {"model_type": "llama", **text_config(tokenizer)},
        tokenizer.convert_tokens_to_ids("<image>"),
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image_id, image_seq_length=64
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    return LlavaForConditionalGeneration(config), LlavaProcessor(
        images, tokenizer, **_llava_options()
    )


def llava_next() -> tuple[nn.Module, Any]:
    """Tiles of 4 × 4 tokens on canvases of 2 to 4 tiles, unpadded, a newline token a row."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = _llama_tokenizer()
    pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    vision = {"model_type": "clip_vision_model", **CLIP, "image_size": 56}
    text, image_id = (
        {"model_type": "llama", **text_config(tokenizer)},
        tokenizer.convert_tokens_to_ids("<image>"),
    )
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_id,
        image_grid_pinpoints=pinpoints,
    )
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    images = LlavaNextImageProcessor(**size, image_grid_pinpoints=pinpoints)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(
        images, tokenizer, **_llava_options()
    )


def _llava_options() -> dict[str, Any]:
    template = {"chat_template": LLAVA_TEMPLATE, "vision_feature_select_strategy": "default"}
    return {**template, "patch_size": 14, "num_additional_image_tokens": 1}


def llava_onevision() -> tuple[nn.Module, Any]:
    """Tiles of 5 × 5 tokens (the last 4 of 74 pixels are unseen), at most 9 tiles' worth; video
    pooled to 3 × 3."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = build_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    pinpoints = [[74 * rows, 74 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    vision = {
        "model_type": "siglip_vision_model",
        **CLIP,
        "image_size": 74,
        "vision_use_head": False,
    }
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": 74, "width": 74}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>\n", "<video>\n"),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


# --- InternVL, Gemma, Idefics


def internvl() -> tuple[nn.Module, Any]:
    """Up to 12 tiles of 4 × 4 tokens (8 × 8 patches, shuffled 2 × 2) and a thumbnail."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<video>",
    ]
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    names |= {"video_token": "<video>"}
    end = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"}
    tokenizer = build_tokenizer(special, **end, extra_special_tokens=names)
    vision = {**CLIP, "image_size": [112, 112], "patch_size": [14, 14]}
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    size = {"height": 112, "width": 112}
    images, videos = GotOcr2ImageProcessor(size=size), InternVLVideoProcessor(size=size)
    template = chatml("<IMG_CONTEXT>\n", "<video>\n")
    processor = InternVLProcessor(
        images, tokenizer, videos, image_seq_length=16, chat_template=template
    )
    return InternVLForConditionalGeneration(config), processor


GEMMA_TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}"
    "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content | trim -}}{%- else -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<start_of_image>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text | trim -}}{%- endif -%}{%- endfor -%}{%- endif "
    "-%}"
    "{{- '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
)
GEMMA_NAMES = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "padding_side": "left",
}


def gemma3() -> tuple[nn.Module, Any]:
    """4 × 4 tokens, each the mean of 4 × 4 patches; every other layer attends in a window of 48
    tokens."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *names.values()]
    tokenizer = build_tokenizer(special, adds_bos=True, **GEMMA_NAMES, extra_special_tokens=names)
    layers = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 48}
    vision = {
        "model_type": "siglip_vision_model",
        **CLIP,
        "image_size": 112,
        "patch_size": 7,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text_config(tokenizer, head_dim=8, query_pre_attn_scalar=8, **layers),
        vision_config=vision,
        mm_tokens_per_image=16,
        **{
            f"{key.replace('_token', '_token_index')}": tokenizer.convert_tokens_to_ids(n)
            for key, n in names.items()
        },
    )
    images = Gemma3ImageProcessor(size={"height": 112, "width": 112})
    processor = Gemma3Processor(
        images, tokenizer, image_seq_length=16, chat_template=GEMMA_TEMPLATE
    )
    return Gemma3ForConditionalGeneration(config), processor


def paligemma() -> tuple[nn.Module, Any]:
    """8 × 8 tokens, then BOS, text and a newline; the prompt attends both ways; no chat template,
    as published."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    tokenizer = build_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<image>"], adds_bos=True, **GEMMA_NAMES
    )
    images = SiglipImageProcessor(size={"height": 112, "width": 112}, image_seq_length=64)
    processor = PaliGemmaProcessor(images, tokenizer)  # adds 1152 location and segmentation tokens
    vision = {
        "model_type": "siglip_vision_model",
        **CLIP,
        "image_size": 112,
        "vision_use_head": False,
    }
    config = PaliGemmaConfig(
        text_config={
            "model_type": "gemma",
            **text_config(tokenizer, head_dim=8),
            "num_key_value_heads": 1,
        },
        vision_config={**vision, "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config), processor


IDEFICS_TEMPLATE = (
    "<|begin_of_text|>{%- for message in messages -%}{{- message.role | capitalize + ':' -}}"
    "{%- if message.content[0].type != 'image' -%}{{- ' ' -}}{%- endif -%}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}{{- '<image>' -}}"
    "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
    "{{- '<end_of_utterance>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- 'Assistant:' "
    "-}}{%- endif -%}"
)


def _idefics_tokenizer(bos: str, names: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<pad>",
        "<|im_start|>",
        "<fake_token_around_image>",
        "<image>",
    ]
    special += ["<end_of_utterance>", "<global-img>", *tiles, "<video>"]
    ends = {"bos_token": bos, "eos_token": "<end_of_utterance>", "pad_token": "<pad>"}
    more = {"extra_special_tokens": names} if names else {}
    return build_tokenizer(special, adds_bos=True, padding_side="left", **ends, **more)


def idefics3() -> tuple[nn.Module, Any]:
    """Tiles of 3 × 3 tokens (6 × 6 patches, shuffled 2 × 2), up to 4 × 4 of them, then the whole
    picture."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    tokenizer = _idefics_tokenizer("<|begin_of_text|>")
    images = Idefics3ImageProcessor(size={"longest_edge": 336}, max_image_size={"longest_edge": 84})
    processor = Idefics3Processor(
        images, tokenizer, image_seq_len=9, chat_template=IDEFICS_TEMPLATE
    )
    config = Idefics3Config(**_idefics_config(tokenizer, size=84, patch=14), scale_factor=2)
    return Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> tuple[nn.Module, Any]:
    """As Idefics3 with tiles of 2 × 2 tokens (8 × 8 patches, shuffled 4 × 4); videos too."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    names = {
        "image_token": "<image>",
        "video_token": "<video>",
        "global_image_token": "<global-img>",
    }
    names |= {
        "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tokenizer = _idefics_tokenizer("<|im_start|>", names)
    size = {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**size),
        tokenizer,
        SmolVLMVideoProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 64}),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE.replace("<|begin_of_text|>", "<|im_start|>", 1),
    )
    config = SmolVLMConfig(**_idefics_config(tokenizer, size=64, patch=8), scale_factor=4)
    return SmolVLMForConditionalGeneration(config), processor


def _idefics_config(tokenizer: PreTrainedTokenizerFast, size: int, patch: int) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "llama", **text_config(tokenizer)},
        "vision_config": {**CLIP, "image_size": size, "patch_size": patch},
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "pad_token_id": tokenizer.pad_token_id,
    }


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    build.__name__: build
    for build in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, llava, llava_next, llava_onevision),
        *(internvl, gemma3, idefics3, smolvlm, paligemma),
    )
}
FAMILIES: list[str] = list(BUILDERS)


@cache
def tiny(family: str) -> tuple[nn.Module, Any]:
    """The family's tiny random model (float32, eval mode) and its processor; shared, so leave no
    change on them."""
    model, processor = BUILDERS[family]()
    randomise(model)
    tokenizer = processor.tokenizer
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    generation.pad_token_id = tokenizer.pad_token_id
    return model, processor


def rounding(logits: torch.Tensor) -> float:
    """How far float32 logits may lie apart when they are summed in another order: 1e-5, and of
    logits that spread more than one, as those of the Gemma decoders do (3), so much more: CPUs
    differ in it."""
    return 1e-5 * max(1.0, logits.std().item())
