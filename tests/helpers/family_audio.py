"""Tiny random models that hear, with their real feature extractors."""

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerFast

from families.shrink import tiny_config
from helpers import family_recent
from helpers.family_parts import build_tokenizer, text_config

AUDIO = {
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
}
SECONDS = 8  # what a Whisper feature extractor pads to here (30 in checkpoints)


def hearing_template(sound: str, image: str = "") -> str:
    """A ChatML template that writes `sound` where a message holds one, `image` where it holds
    that."""
    return (
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        f"{{%- if part.type == 'audio' -%}}{{{{- {sound!r} -}}}}"
        f"{{%- elif part.type == 'image' -%}}{{{{- {image!r} -}}}}"
        "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )


def _tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens, each also under its name, as checkpoints have them."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = build_tokenizer(
        special, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def _whisper() -> Any:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)


def qwen2_audio() -> tuple[nn.Module, Any]:
    """40 ms a token: frames of 10 ms, halved by a convolution and again by a mean."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
    )

    tokenizer = _tokenizer(
        audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>"
    )
    config = Qwen2AudioConfig(
        audio_config={**AUDIO, "max_source_positions": SECONDS * 50},
        text_config={"model_type": "qwen2", **text_config(tokenizer)},
        audio_token_index=tokenizer.audio_token_id,
    )
    processor = Qwen2AudioProcessor(
        _whisper(), tokenizer,
        chat_template=hearing_template("<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration(config), processor


def _omni(family: str, audio: dict[str, Any], **more: Any) -> tuple[nn.Module, Any]:
    import transformers

    names = {
        "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    }  # fmt: skip
    tokenizer = _tokenizer(**names)
    ids = {"image_token_id": tokenizer.image_token_id, "audio_token_id": tokenizer.audio_token_id,
           "video_token_id": tokenizer.video_token_id, "vision_start_token_id": tokenizer.vision_bos_token_id,
           "vision_end_token_id": tokenizer.vision_eos_token_id, "audio_start_token_id": tokenizer.audio_bos_token_id,
           "audio_end_token_id": tokenizer.audio_eos_token_id}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = text_config(tokenizer, head_dim=8, rope_parameters=rope, **more)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
              "embed_dim": 32}  # fmt: skip
    config = getattr(transformers, f"{family}ThinkerConfig")(
        audio_config=AUDIO | audio, vision_config=vision, text_config=text, **ids
    )
    processor = getattr(transformers, f"{family}Processor")(
        transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28},
            patch_size=config.vision_config.patch_size,
        ),
        transformers.Qwen2VLVideoProcessor(), _whisper(), tokenizer,
        chat_template=hearing_template("<|audio_bos|><|AUDIO|><|audio_eos|>", "<|vision_bos|><|IMAGE|><|vision_eos|>"),
    )  # fmt: skip
    hf = getattr(transformers, f"{family}ThinkerForConditionalGeneration")(config)
    return hf, processor


def qwen2_5_omni() -> tuple[nn.Module, Any]:
    """40 ms a token; attention in windows, no batch axis; pictures too."""
    return _omni("Qwen2_5Omni", {"n_window": 25, "output_dim": 32})


def qwen3_omni_moe() -> tuple[nn.Module, Any]:
    """Pieces of 100 frames, each of 13 tokens: 80 ms a token, 40 ms the last one."""
    audio = {"n_window": 50, "output_dim": 32, "downsample_hidden_size": 16, "n_window_infer": 100}
    return _omni(
        "Qwen3OmniMoe", audio, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    )


def gemma4() -> tuple[nn.Module, Any]:
    """40 ms a token; a conformer that attends in chunks; pictures too."""
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "output_proj_dims": 32,
    }
    tower |= {"subsampling_conv_channels": [128, 4]}  # (the first is fixed by 128 mel bins)
    return family_recent.gemma4(tower, hearing_template("<|audio|>", "<|image|>"))


def gemma3n() -> tuple[nn.Module, Any]:
    """160 ms a token; every sound has as many tokens, those behind its end hear padding."""
    import transformers

    tokenizer = _tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
        audio_token="<audio_soft_token>", boa_token="<start_of_audio>", eoa_token="<end_of_audio>",
    )  # fmt: skip
    config = tiny_config("gemma3n")
    config.image_token_id, config.audio_token_id = (
        tokenizer.image_token_id,
        tokenizer.audio_token_id,
    )
    config.audio_soft_tokens_per_image = 2 * SECONDS
    size = {"height": 128, "width": 128}
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), transformers.SiglipImageProcessor(size=size), tokenizer,
        audio_seq_length=2 * SECONDS, image_seq_length=config.vision_soft_tokens_per_image,
        chat_template=hearing_template("<audio_soft_token>", "<image_soft_token>"),
    )  # fmt: skip
    return transformers.Gemma3nForConditionalGeneration(config), processor


def phi4_multimodal() -> tuple[nn.Module, Any]:
    """80 ms a token; attention over the whole sound; pictures too."""
    import transformers

    tokenizer = _tokenizer(image_token="<|image|>", audio_token="<|audio|>")
    config = tiny_config("phi4_multimodal")
    config.vision_config.image_token_id = tokenizer.image_token_id
    config.audio_config.audio_token_id = tokenizer.audio_token_id
    processor = transformers.Phi4MultimodalProcessor(
        transformers.Phi4MultimodalImageProcessor(dynamic_hd=1),
        transformers.Phi4MultimodalFeatureExtractor(), tokenizer,
        chat_template=hearing_template("<|audio|>", "<|image|>"),
    )  # fmt: skip
    return transformers.Phi4MultimodalForCausalLM(config), processor


BUILDERS = {
    f.__name__: f
    for f in (qwen2_audio, qwen2_5_omni, qwen3_omni_moe, gemma4, gemma3n, phi4_multimodal)
}
