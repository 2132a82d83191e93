"""A processor for a tiny model of any type that takes pictures: the type's own image processor, made
small, and words by the character.

What decides which token sees which part of a picture is the image processor (resizing, padding,
tiles) and the tower: both are the type's own. The prompt is plain: as many image tokens as the
model gives features, then the text. Families whose whole processor is built by hand are in
`helpers`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from families.tensors import NO_PICTURE, count_of, image_token, side_of, token_types
from helpers import families, family_audio, family_recent
from helpers.family_parts import randomise

IMAGE = "<image>"
NAMES: dict[str, str] = {
    "glm4v_moe": "Glm4vImageProcessor",
    "glm_ocr": "Glm46VImageProcessor",
    "fast_vlm": "CLIPImageProcessor",
    "qwen2_5_omni_thinker": "Qwen2VLImageProcessor",
    "qwen3_omni_moe_thinker": "Qwen2VLImageProcessor",
}
WHOLE: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **families.BUILDERS,
    **family_recent.BUILDERS,
    "qwen2_5_omni_thinker": family_audio.qwen2_5_omni,
    "qwen3_omni_moe_thinker": family_audio.qwen3_omni_moe,
}


def with_processor(model_type: str, build: Callable[[str], nn.Module]) -> tuple[nn.Module, Any]:
    """A tiny random model of a type and its processor: the whole one where it is built by hand."""
    if model_type in WHOLE:
        hf, processor = WHOLE[model_type]()
        return randomise(hf), processor
    hf = build(model_type)
    return hf, PlainProcessor(model_type, hf)


def takes_pictures(model_type: str) -> bool:
    """Whether pictures have tokens of their own in a type's prompt, and an image processor is
    known."""
    known = {*WHOLE, *NAMES, *IMAGE_PROCESSOR_MAPPING_NAMES}
    return model_type in known and model_type not in NO_PICTURE | {"mllama", "florence2"}


class PlainProcessor:
    """A type's image processor, called with text and pictures as a whole processor is."""

    image_token, chat_template, video_processor = IMAGE, None, None

    def __init__(self, model_type: str, hf: nn.Module):
        self.model_type, self.hf = model_type, hf
        self.image_processor = image_processor(model_type, hf.config)
        self.tokenizer = letters(image_token(hf.config))
        self.counts: dict[tuple[int, int], int] = {}

    def __call__(
        self, text: Sequence[str], images: Any = None, padding: bool = False, **more: Any
    ) -> dict[str, Any]:
        """Tensors of a batch; each row has at most as many pictures as its text has places."""
        options = more.get("images_kwargs") or {}
        flat = [picture for row in images or () for picture in row]
        tensors = self._pixels(flat, options) if flat else {}
        tensors.pop("num_img_tokens", None)
        pictures, rows, offsets = iter(flat), [], []
        for prompt in text:
            parts = prompt.split(IMAGE)
            whole, changes = parts[0], []
            start = len(whole)
            for part in parts[1:]:
                replacement = IMAGE * self._count(next(pictures), options)
                changes.append({"span": (start, start + len(IMAGE)), "replacement": replacement})
                whole, start = whole + replacement + part, start + len(IMAGE) + len(part)
            rows.append(self.tokenizer(whole)["input_ids"])
            offsets.append(changes)
        length = max(map(len, rows))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (length - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])
        tensors |= {"input_ids": ids, "attention_mask": mask}
        tensors |= token_types(self.model_type, self.hf, ids)
        if "qformer_input_ids" in inspect.signature(type(self.hf).forward).parameters:
            words = {"qformer_input_ids": ids[:, -4:], "qformer_attention_mask": mask[:, -4:]}
            tensors |= words
        return tensors | {"text_replacement_offsets": offsets}

    def _pixels(self, pictures: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
        features = self.image_processor(images=list(pictures), return_tensors="pt", **options)
        if self.model_type == "fuyu":  # (its whole processor makes the patches)
            padded = torch.cat([image[0][None] for image in features["images"]])
            return {"pixel_values": self.image_processor.patchify_image(padded)}
        names = {"num_img_tokens", *inspect.signature(type(self.hf).forward).parameters}
        return {name: x for name, x in features.items() if name in names}

    def _count(self, picture: Any, options: dict[str, Any]) -> int:
        if picture.size not in self.counts:
            pixels = self._pixels([picture], options)
            stated = pixels.pop("num_img_tokens", None)
            counted = (
                count_of(self.model_type, self.hf, pixels) if stated is None else int(stated[0])
            )
            self.counts[picture.size] = counted
        return self.counts[picture.size]


def letters(image: int | None) -> PreTrainedTokenizerFast:
    """One token a character, by its code; the image token has the id that the config says."""
    vocabulary = {chr(code): code for code in range(10, 127)} | {"<pad>": 4, "<eos>": 5}
    vocabulary |= {} if image is None else {IMAGE: image}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = [AddedToken(word, special=True) for word in ("<pad>", "<eos>", IMAGE)]
    tokenizer.add_special_tokens(special if image is not None else special[:2])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def image_processor(model_type: str, config: Any) -> Any:
    """The type's image processor at the tiny tower's sizes."""
    held = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type) or {}
    name = NAMES.get(model_type) or held.get("torchvision") or held["pil"]
    cls = getattr(transformers, name)
    return cls(**_small(cls().to_dict(), config) | OPTIONS.get(model_type, {}))


def _small(defaults: dict[str, Any], config: Any) -> dict[str, Any]:
    """An image processor's options that must fit the tower, or keep pictures small."""
    vision = getattr(config, "vision_config", None)
    side = side_of(vision) if vision is not None else 56
    options: dict[str, Any] = {}
    patch = getattr(vision, "patch_size", None) or getattr(config, "patch_size", None) or 14
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    if "patch_size" in defaults:
        both = {"height": patch, "width": patch}
        options["patch_size"] = both if isinstance(defaults["patch_size"], dict) else patch
    for name, names in {
        "merge_size": ("spatial_merge_size", "merge_size"),
        "temporal_patch_size": ("temporal_patch_size",),
    }.items():
        held = next((getattr(vision, n) for n in names if hasattr(vision, n)), None)
        if name in defaults and isinstance(held, int):
            options[name] = held
    size = defaults.get("size") or {}
    if (size.get("longest_edge") or 0) > 10000:
        unit = patch * options.get("merge_size", defaults.get("merge_size") or 1)
        options["size"] = {"shortest_edge": 4 * unit**2, "longest_edge": 256 * unit**2}
    elif "height" in size:
        options["size"] = {"height": side, "width": side}
    elif set(size) == {"shortest_edge"}:
        options["size"] = {"shortest_edge": side}
    if "crop_size" in defaults:
        options["crop_size"] = {"height": side, "width": side}
    if "image_grid_pinpoints" in defaults and hasattr(config, "image_grid_pinpoints"):
        options["image_grid_pinpoints"] = config.image_grid_pinpoints
    if "max_patches" in defaults and "crop_to_patches" in defaults:
        options |= {"max_patches": 4, "crop_to_patches": True}
    return options


SQUARE = {"size": {"height": 256, "width": 256}}
FORTY = {"size": {"height": 40, "width": 40}}
SLICE = {"scale_resolution": 128, "slice_mode": False}
# what the rules above cannot know of a type's image processor
OPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"size": {"min_pixels": 256, "max_pixels": 64**2}, "spatial_factor": 8},
    "aria": {"max_image_size": 490},
    "chameleon": {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}},
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), SQUARE | {"tile_size": 256, "crop_to_patches": False}),
    "deepseek_vl_hybrid": {"high_res_size": SQUARE["size"]},
    "dots3_note": {"temporal_patch_size": 1},
    "emu3": {"min_pixels": 256, "max_pixels": 64**2},
    "fuyu": {"size": {"height": 180, "width": 240}},
    **dict.fromkeys(("inkling2", "inkling2_loop", "inkling_mm_model"), FORTY),
    "got_ocr2": SQUARE | {"crop_to_patches": False},
    "fast_vlm": {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}},
    "gemma3n": {"size": {"height": 128, "width": 128}},
    "gemma4_unified": {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70},
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), SLICE),
    "molmo2": {"overlap_margins": [1, 1], "max_crops": 4},
    "nemotron_h_omni": {"min_num_patches": 4, "max_num_patches": 256},
    "perception_lm": {"tile_size": 56, "max_num_tiles": 4},
    "phi4_multimodal": {"size": {"height": 448, "width": 448}, "dynamic_hd": 1},
    "step3p7": {"patch_size": 112},
}  # fmt: skip
