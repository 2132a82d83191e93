"""The demo models before training: architectures and their real processors, from configs alone."""

from typing import Any

from transformers import (
    AutoModelForImageTextToText,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from corelens.errors import CorelensError
from training.families import begin
from training.text import build_tokenizer, chat_template

_SCALE: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGE: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, **_SCALE}
_TILE = 128  # pixels a side of LLaVA's and InternVL's tiles: 8 × 8 patches
_VIEW = {"size": {"height": _TILE, "width": _TILE}, **_SCALE}
_PINPOINTS = [[_TILE * rows, _TILE * columns] for rows in range(1, 4) for columns in range(1, 4)]

_TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_TILED = {"text": _TEXT, "vision": _TOWER, "captions": "shuffled"}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3vl-s": {
        "family": "qwen3_vl",
        "text": {**_TEXT, "mrope_section": [4, 2, 2]},
        "vision": {
            "depth": 3,
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_heads": 4,
            "deepstack_visual_indexes": [1],
        },
    },
    # Without m-RoPE the question stands 136 positions behind a picture: faster rotations would blur
    # what it looks for.
    "llava-ov-s": {
        "family": "llava_onevision",
        **_TILED,
        "text": {**_TEXT, "rope_theta": 1e6},
    },
    "internvl-s": {"family": "internvl", "thumbnail": slice(-16, None), **_TILED},
}
# A larger tower, which reads anywhere on the picture, before a deeper decoder.
PRESETS["qwen3vl-m"] = {
    "family": "qwen3_vl",
    "text": PRESETS["qwen3vl-s"]["text"] | {"num_hidden_layers": 12},
    "vision": {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_heads": 4,
        "deepstack_visual_indexes": [2],
    },
}
# The same tower before a smaller decoder, and before one with more layers, more heads and smaller
# MLPs.
PRESETS["qwen3vl-s-all"] = PRESETS["qwen3vl-m"] | {"text": PRESETS["qwen3vl-s"]["text"]}
PRESETS["qwen3vl-l"] = PRESETS["qwen3vl-m"] | {
    "text": PRESETS["qwen3vl-s"]["text"]
    | {"intermediate_size": 256, "num_hidden_layers": 16, "num_attention_heads": 16}
}
# The same shape, made to read at the question's rows.
PRESETS["qwen3vl-q"] = PRESETS["qwen3vl-l"]
PRESETS["qwen3vl-q-compare"] = PRESETS["qwen3vl-q-hop"] = PRESETS["qwen3vl-q"]
# So are a smaller one behind qwen3vl-s's tower, and one of another family behind internvl-s's.
PRESETS["qwen3vl-qs"] = PRESETS["qwen3vl-s"] | {
    "text": PRESETS["qwen3vl-q"]["text"] | {"intermediate_size": 160}
}
PRESETS["qwen3vl-qs-control"] = PRESETS["qwen3vl-qs"]
PRESETS["internvl-q"] = PRESETS["internvl-s"] | {
    "text": _TEXT | {"intermediate_size": 128, "num_hidden_layers": 16, "num_attention_heads": 16}
}
# Three sizes for questions of two steps.
PRESETS |= {
    name: PRESETS["qwen3vl-q"]
    | {
        "text": PRESETS["qwen3vl-qs"]["text"]
        | {"num_hidden_layers": layers, "num_attention_heads": heads}
    }
    for name, layers, heads in (
        ("qwen3vl-hop-s", 6, 8),
        ("qwen3vl-hop", 8, 8),
        ("qwen3vl-hop-l", 12, 12),
    )
}
PRESETS["qwen3vl-hop-control"] = PRESETS["qwen3vl-hop"]
# The same models, trained on to longer contexts.
PRESETS["qwen3vl-s-long"] = PRESETS["qwen3vl-s"]
PRESETS["qwen3vl-s-video"] = PRESETS["qwen3vl-s-all"]
"""One entry a model: its family, the sizes that differ from the family's small defaults, which
tokens of a picture of several tiles (its thumbnail's) go without dense labels, and in which order
captions list objects."""


def build_processor(name: str) -> ProcessorMixin:
    """The processor of a preset: text and PIL images (or video frames) in, the model's tensors
    out."""
    family = _preset(name)["family"]
    tokenizer, template = build_tokenizer(family), chat_template(family)
    if family == "llava_onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(**_VIEW, image_grid_pinpoints=_PINPOINTS),
            tokenizer,
            LlavaOnevisionVideoProcessor(**_VIEW),
            num_image_tokens=64,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_1",
            chat_template=template,
        )
    if family == "internvl":
        images, videos = GotOcr2ImageProcessor(**_VIEW), InternVLVideoProcessor(**_VIEW)
        return InternVLProcessor(
            images, tokenizer, videos, image_seq_length=16, chat_template=template
        )
    # A video's limits are of all its frames together: `LONG` of the world `video` must pass.
    size = {"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096}
    # transformers' coming default
    video = Qwen3VLVideoProcessor(**_IMAGE, size=size, cap_pixels_per_frame=True)
    return Qwen3VLProcessor(
        # A picture whose sides are multiples of 32 px passes unresized from 64 × 64 to 2048 × 2048.
        image_processor=Qwen2VLImageProcessor(
            **_IMAGE, size={"shortest_edge": 64 * 64, "longest_edge": 2048 * 2048}
        ),
        tokenizer=tokenizer,
        video_processor=video,
        chat_template=template,
    )


def build_config(name: str, processor: ProcessorMixin) -> PreTrainedConfig:
    """The config of a preset, with its processor's token ids."""
    preset, tokenizer = _preset(name), processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    text, vision = dict(preset["text"]), dict(preset["vision"])
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": text.pop("rope_theta", 10000.0)}
    if "mrope_section" in text:
        rope["mrope_section"] = text.pop("mrope_section")
    text |= {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "max_position_embeddings": 32768,
        "rope_parameters": rope,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if preset["family"] == "llava_onevision":
        # A canvas of several tiles is pooled to the tokens of one tile: 8 × 8, and a newline a row.
        return LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config={
                "model_type": "siglip_vision_model",
                "image_size": _TILE,
                "patch_size": 16,
                "vision_use_head": False,
                **vision,
            },
            image_token_index=ids("<image>"),
            video_token_index=ids("<video>"),
            image_grid_pinpoints=_PINPOINTS,
            vision_aspect_ratio="anyres_max_1",
            tie_word_embeddings=True,
        )
    if preset["family"] == "internvl":
        # A layer scale of 0.1 and weights of 0.02 are for deep, wide towers; in a small one they
        # only delay.
        scaled: dict[str, Any] = {"image_size": [_TILE, _TILE], "patch_size": [16, 16]}
        scaled |= {"layer_scale_init_value": 1.0, "initializer_range": 0.06}
        return InternVLConfig(
            text_config={"model_type": "qwen3", **text},
            vision_config={"attention_bias": True, **scaled, **vision},
            image_token_id=ids("<IMG_CONTEXT>"),
            image_seq_length=16,
            tie_word_embeddings=True,
        )
    return Qwen3VLConfig(
        text_config=text,
        vision_config={
            "patch_size": _IMAGE["patch_size"],
            "spatial_merge_size": _IMAGE["merge_size"],
            "temporal_patch_size": _IMAGE["temporal_patch_size"],
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 256,
            **vision,
        },
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def build_model(name: str, processor: ProcessorMixin) -> PreTrainedModel:
    """The model of a preset with fresh random weights in float32; seed torch before."""
    tokenizer, model = (
        processor.tokenizer,
        AutoModelForImageTextToText.from_config(build_config(name, processor)),
    )
    begin(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    return model


def _preset(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise CorelensError(
            f"demo model {name!r}", f"one of {', '.join(PRESETS)}", "name one of these models"
        )
    return PRESETS[name]
