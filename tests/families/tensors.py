"""What a tiny model of a type is run on: random ids, and a random picture where it takes one.

A picture's tensors follow from the signature of the model's own `get_image_features`; the table
below holds the types whose pictures have another form. As many image tokens stand in the prompt as
that function gives features.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Any]
WORDS, BEFORE = 12, 5  # tokens of text, and how many of them stand before the picture
NO_PICTURE = {
    "blip", "git", "idefics", "kosmos-2", "kosmos-2.5", "pix2struct", "udop", "vision-encoder-decoder", "pp_formulanet",
}  # fmt: skip


def tensors_for(model_type: str, hf: nn.Module) -> tuple[Tensors, int]:
    """The model's arguments, and how many image tokens are among them (0: it runs on text, or on a
    picture that has no tokens in the prompt)."""
    forward = inspect.signature(type(hf).forward).parameters
    picture = _picture(model_type, hf)
    count = count_of(model_type, hf, picture)
    token = image_token(hf.config)
    words = torch.randint(6, 250, (WORDS,), generator=torch.Generator().manual_seed(3))
    if count and token is not None:
        ids = torch.cat([words[:BEFORE], torch.full((count,), token), words[BEFORE:]])[None]
    else:
        ids, count = words[None], 0
        picture = picture if model_type in NO_PICTURE | {"mllama", "florence2"} else {}
    tensors: Tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
    if token is not None and count:
        tensors |= token_types(model_type, hf, ids)
    if model_type == "mllama":
        tiles = hf.config.vision_config.max_num_tiles
        seen = torch.zeros(1, WORDS, 1, tiles, dtype=torch.long)
        seen[:, BEFORE:, :, 0] = 1
        tensors["cross_attention_mask"] = seen
    if model_type == "kosmos-2":
        tensors["image_embeds_position_mask"] = (
            torch.arange(WORDS)[None] < hf.config.latent_query_num
        )
    if model_type == "udop":
        tensors["bbox"] = torch.rand(1, WORDS, 4, generator=torch.Generator().manual_seed(2))
    if model_type == "kyutai_speech_to_text":
        tensors["input_ids"] = ids[..., None].repeat(1, 1, hf.config.num_codebooks + 1)
    if model_type == "voxtral_realtime":
        tensors["input_features"] = _random(1, hf.config.audio_config.num_mel_bins, 8 * WORDS)
    if model_type.startswith("instructblip"):
        tensors["qformer_input_ids"] = words[None, :4]
        tensors["qformer_attention_mask"] = torch.ones(1, 4, dtype=torch.long)
    if "decoder_input_ids" in forward and not hasattr(hf.config, "num_query_tokens"):
        tensors["decoder_input_ids"] = words[None, 4:]
    return {k: v for k, v in tensors.items() if k in forward or k in picture}, count


def token_types(model_type: str, hf: nn.Module, ids: Tensor) -> Tensors:
    """What a model is told of its tokens' kinds beside their ids."""
    forward, image = inspect.signature(type(hf).forward).parameters, ids == image_token(hf.config)
    types = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
    tensors = {name: image.long() for name in types if name in forward}
    if model_type == "paligemma":
        tensors["token_type_ids"] = torch.zeros_like(ids)
    if model_type == "ernie4_5_vl_moe":
        tensors["moe_mm_token_type_ids"] = image.long()
    return tensors


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _picture(model_type: str, hf: nn.Module) -> Tensors:
    if model_type in PICTURES:
        return PICTURES[model_type](hf, hf.config, getattr(hf.config, "vision_config", None))
    features, vision = _features(hf), getattr(hf.config, "vision_config", None)
    if features is None or vision is None:
        return {}
    names = inspect.signature(inspect.unwrap(type(features).get_image_features)).parameters
    if "image_grid_thw" in names:
        patches: Tensors = {"pixel_values": _random(32, _patch_width(hf))}
        if "image_merge_sizes" in names:
            patches["image_merge_sizes"] = torch.tensor([2])
        return {**patches, "image_grid_thw": torch.tensor([[1, 8, 4]])}
    side = side_of(vision)
    if "image_sizes" in names:
        tiles = (
            (1, 3, 3, side, side)
            if hasattr(hf.config, "image_grid_pinpoints")
            else (1, 3, side, side)
        )
        size = (side, 2 * side) if len(tiles) == 5 else (side, side)
        return {"pixel_values": _random(*tiles), "image_sizes": torch.tensor([size])}
    return {"pixel_values": _random(1, 3, side, side)}


def _features(hf: nn.Module) -> Any:
    return next(
        (m for m in (getattr(hf, "model", None), hf) if hasattr(m, "get_image_features")), None
    )


def _tower(hf: nn.Module) -> nn.Module:
    names = ("visual", "vision_tower", "vision_model", "embed_vision", "vision_encoder")
    held = (getattr(m, n, None) for m in (getattr(hf, "model", hf), hf) for n in names)
    return next((m for m in held if isinstance(m, nn.Module)), hf)


def _patch_width(hf: nn.Module) -> int:
    """How many numbers a patch has, as the tower's first layer takes it."""
    for kind in (nn.Conv3d, nn.Conv2d):
        for module in _tower(hf).modules():
            if isinstance(module, kind):
                size = module.kernel_size[-2] * module.kernel_size[-1]
                return (
                    module.in_channels * size * (module.kernel_size[0] if kind is nn.Conv3d else 1)
                )
    return next(m.in_features for m in _tower(hf).modules() if isinstance(m, nn.Linear))


def side_of(vision: Any) -> int:
    side = getattr(vision, "image_size", None)
    return (side[0] if isinstance(side, (list, tuple)) else side) or 56


def image_token(config: Any) -> int | None:
    names = (
        "image_token_id",
        "image_token_index",
        "img_token_id",
        "image_patch_id",
        "video_token_index",
    )
    held = (
        getattr(holder, n, None)
        for holder in (config, getattr(config, "vision_config", None))
        for n in names
    )
    coded = getattr(config, "vocabulary_map", None) or {}
    return next((i for i in (coded.get("<image>"), *held) if isinstance(i, int) and i >= 0), None)


def count_of(model_type: str, hf: nn.Module, picture: Tensors) -> int:
    """How many image tokens a picture has."""
    features = _features(hf)
    if not picture or model_type in NO_PICTURE | {"mllama"}:
        return 0
    if hasattr(hf.config, "num_query_tokens"):
        return hf.config.num_query_tokens * (4 if model_type == "instructblipvideo" else 1)
    if model_type == "phi4_multimodal":
        half = hf.config.vision_config.crop_size // hf.config.vision_config.patch_size // 2
        return 2 * (half * half + half) + 1
    if features is None:
        return 0
    names = inspect.signature(inspect.unwrap(type(features).get_image_features)).parameters
    with torch.no_grad():
        out = features.get_image_features(
            **{k: v for k, v in picture.items() if k in names}, return_dict=True
        )
    x = getattr(out, "pooler_output", None)
    if x is None and getattr(out, "deepstack_features", None):
        x = out.deepstack_features[0]
        x = x[1] if isinstance(x, tuple) and isinstance(x[0], int) else x
    x = getattr(out, "last_hidden_state", out) if x is None else x
    return (
        sum(y.flatten(0, -2).shape[0] for y in x)
        if isinstance(x, (list, tuple))
        else x.flatten(0, -2).shape[0]
    )


# --- pictures of another form: (model, config, vision config) → tensors


def _grid(n: int) -> Tensor:
    axes = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy")
    return torch.stack(axes, -1).reshape(1, -1, 2)


def _molmo(hf: Any, config: Any, vision: Any) -> Tensors:
    n = side_of(vision) // vision.patch_size
    pooled = torch.arange(n * n).reshape(n // 2, 2, n // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    return {
        "pixel_values": _random(1, n * n, 3 * vision.patch_size**2), "image_token_pooling": pooled,
        "image_grids": torch.tensor([[n // 2, n // 2, 0, 0]]), "image_num_crops": torch.tensor([1]),
    }  # fmt: skip


def _phi4(hf: Any, config: Any, vision: Any) -> Tensors:
    side, n = vision.crop_size, vision.crop_size // vision.patch_size
    return {"image_pixel_values": _random(1, 2, 3, side, side), "image_sizes": torch.tensor([[side, side]]),
            "image_attention_mask": torch.ones(1, 2, n, n)}  # fmt: skip


def _mllama(hf: Any, config: Any, vision: Any) -> Tensors:
    tiles, side = vision.max_num_tiles, side_of(vision)
    return {"pixel_values": _random(1, 1, tiles, 3, side, side), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.tensor([[[1] + [0] * (tiles - 1)]])}  # fmt: skip


def _patched(shape: Callable[..., tuple[int, ...]], **more: Any) -> Callable[..., Tensors]:
    return lambda hf, config, vision: {"pixel_values": _random(*shape(hf, config, vision)), **more}


def _masked(*size: Any) -> Callable[..., Tensors]:
    def make(hf: Any, config: Any, vision: Any) -> Tensors:
        side = side_of(vision)
        mask = (
            torch.ones(1, 1, side, side, dtype=torch.bool)
            if not size
            else torch.ones(1, 1, dtype=torch.bool)
        )
        return {"pixel_values": _random(1, 1, 3, side, side), "pixel_attention_mask": mask}

    return make


def _soft(hf: Any, config: Any, vision: Any) -> Tensors:
    width = _patch_width(hf) if config.model_type == "gemma4_unified" else 3 * vision.patch_size**2
    n = 4 if config.model_type == "gemma4_unified" else 8
    return {"pixel_values": torch.rand(1, n * n, width), "image_position_ids": _grid(n)}


def _flattened(hf: Any, config: Any, vision: Any) -> Tensors:
    width = (
        vision.num_channels * vision.patch_size**2
        if hasattr(vision, "num_channels")
        else _patch_width(hf)
    )
    rows = torch.cat([_grid(4)[0].flip(-1).float() + 1, _random(16, width)], dim=1)
    return {"flattened_patches": rows[None]}


def _two(hf: Any, config: Any, vision: Any) -> Tensors:
    side, high = side_of(vision), side_of(config.high_res_vision_config)
    return {
        "pixel_values": _random(1, 3, side, side),
        "high_res_pixel_values": _random(1, 3, high, high),
    }


MINICPM = _patched(
    lambda hf, config, vision: (1, 3, vision.patch_size, 64 * vision.patch_size),
    target_sizes=torch.tensor([[8, 8]]),
)
PICTURES: dict[str, Callable[..., Tensors]] = {
    "mllama": _mllama,
    "phi4_multimodal": _phi4,
    "molmo2": _molmo,
    "llava": _patched(lambda hf, config, vision: (1, 3, side_of(vision), side_of(vision))),
    **dict.fromkeys(("blip", "kosmos-2"), _patched(lambda hf, config, vision: (1, 3, side_of(vision), side_of(vision)))),
    "inkling_mm_model": _patched(lambda hf, config, vision: (4, vision.temporal_patch_size, 40, 40, 3)),
    **dict.fromkeys(("inkling2", "inkling2_loop"), _patched(
        lambda hf, config, vision: (8, (2 * vision.patch_size) ** 2, vision.num_channels), image_grid_thw=torch.tensor([[1, 4, 2]]))),
    "lfm3_vl": _patched(
        lambda hf, config, vision: (32, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2), image_grid_thw=torch.tensor([[1, 8, 4]])),
    "deepseek_ocr2": _patched(lambda hf, config, vision: (1, 3, 256, 256)),
    "unlimited_ocr": _patched(lambda hf, config, vision: (1, 3, 256, 256)),
    "vision-encoder-decoder": _patched(lambda hf, config, vision: (1, 3, side_of(config.encoder), side_of(config.encoder))),
    **dict.fromkeys(("gemma4", "gemma4_unified"), _soft),
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), MINICPM),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _masked()),
    "granite_docling": _masked("a view"),
    "deepseek_vl_hybrid": _two,
    "fuyu": _patched(lambda hf, config, vision: (1, 8, 3 * config.patch_size**2)),
    "lfm2_vl": _patched(
        lambda hf, config, vision: (1, 16, 3 * vision.patch_size**2), spatial_shapes=torch.tensor([[4, 4]]),
        pixel_attention_mask=torch.ones(1, 16, dtype=torch.long),
    ),
    "kimi_k25": _patched(
        lambda hf, config, vision: (32, 3, vision.patch_size, vision.patch_size), image_grid_thw=torch.tensor([[1, 8, 4]])
    ),
    "paddleocr_vl": _patched(
        lambda hf, config, vision: (32, 3, vision.patch_size, vision.patch_size), image_grid_thw=torch.tensor([[1, 8, 4]])
    ),
    "nemotron_h_omni": _patched(
        lambda hf, config, vision: (16, _patch_width(hf)), image_grid_hw=torch.tensor([[4, 4]])
    ),
    "perception_lm": _patched(lambda hf, config, vision: (1, 1, 3, 56, 56)),
    **dict.fromkeys(("fast_vlm", "gemma3n"), _patched(lambda hf, config, vision: (1, 3, 128, 128))),
    **dict.fromkeys(("emu3", "apertus1p5"), _patched(lambda hf, config, vision: (1, 3, 64, 64), image_sizes=torch.tensor([[64, 64]]))),
    "chameleon": _patched(lambda hf, config, vision: (1, 3, 128, 128)),
    "florence2": _patched(lambda hf, config, vision: (1, 3, 64, 64)),
    "idefics": _patched(
        lambda hf, config, vision: (1, 1, 3, side_of(vision), side_of(vision)),
        image_attention_mask=torch.ones(1, WORDS, 1, dtype=torch.long),
    ),
    "mistral_large4": _patched(
        lambda hf, config, vision: (1, 3, 56, 56), image_sizes=torch.tensor([[56, 56]])),
    "instructblipvideo": _patched(lambda hf, config, vision: (1, 4, 3, side_of(vision), side_of(vision))),
    **dict.fromkeys(("pix2struct", "kosmos-2.5"), _flattened),
    "pp_formulanet": _patched(lambda hf, config, vision: (1, 3, side_of(vision), side_of(vision))),
}  # fmt: skip
