"""Gemma 3 and PaliGemma: the picture squashed to a square, a fixed number of tokens a view."""

import math
from collections.abc import Sequence
from typing import Any

from corelens.errors import CorelensError
from corelens.layouts.base import Layout, edge, grid, image_option, patches, shrunk_to
from corelens.tokens.cells import THUMBNAIL, Cells


class Gemma3(Layout):
    """Norms stand after attention and MLP too; what the residual stream gets is what these norms
    give."""

    model_types = ("gemma3",)
    first_position = 0
    ln2 = "pre_feedforward_layernorm"
    attn_out, mlp_out = "post_attention_layernorm", "post_feedforward_layernorm"
    norm_weight_offset = 1.0

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """The whole picture, then the crops of pan-and-scan if it is on, each squashed to the same
        square."""
        width, height = size
        side = math.isqrt(config.mm_tokens_per_image)
        views = [(0, 0, width, height), *_pan_and_scan(processor, features, width, height)]
        seen = edge(image_option(processor, features, "size"), "width")
        shrunk = shrunk_to(size, (seen, seen)) if len(views) == 1 else None
        numbers = [THUMBNAIL, *range(len(views) - 1)]
        return patches(*(grid(side, side, *view) for view in views), shrunk=shrunk, views=numbers)


class PaliGemma(Layout):
    """The prompt attends both ways (type 0), the answer causally (type 1); BOS stands after the
    picture."""

    model_types = ("paligemma",)
    first_position = 1
    norm_weight_offset = 1.0
    answer_type_id = 1

    @classmethod
    def for_config(cls, config: Any) -> Layout:
        """PaliGemma 2 has a decoder with norms after attention and MLP."""
        text = getattr(config, "text_config", None)
        return PaliGemma2() if getattr(text, "model_type", None) == "gemma2" else cls()

    def check_batch(self, pictures: Sequence[Sequence[Any]]) -> None:
        """Its processor puts BOS into the middle of a prompt that has no picture."""
        if not all(pictures):
            raise CorelensError(
                "a sample without pictures for PaliGemma",
                "a picture in every sample",
                "leave samples without pictures to a model that takes them",
            )

    def processed_prompt(self, processor: Any, prompt: str) -> str:
        """The processor puts BOS behind the last placeholder and a newline at the end."""
        end = prompt.rfind(processor.image_token) + len(processor.image_token)
        if processor.image_token not in prompt:
            return prompt
        return prompt[:end] + processor.tokenizer.bos_token + prompt[end:] + "\n"

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """One square view, row by row."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        seen = config.vision_config.image_size
        return patches(grid(side, side, 0, 0, *size), shrunk=shrunk_to(size, (seen, seen)))


class PaliGemma2(PaliGemma):
    """PaliGemma with Gemma 2 as its decoder."""

    ln2 = "pre_feedforward_layernorm"
    attn_out, mlp_out = "post_attention_layernorm", "post_feedforward_layernorm"


def _pan_and_scan(
    processor: Any, features: dict[str, Any], width: int, height: int
) -> list[tuple[int, int, int, int]]:
    """The crops of an elongated picture, along its longer side: x0, y0, x1, y1 in pixels."""
    if not image_option(processor, features, "do_pan_and_scan"):
        return []
    least = image_option(processor, features, "pan_and_scan_min_crop_size")
    most = image_option(processor, features, "pan_and_scan_max_num_crops")
    long, short = max(width, height), min(width, height)
    if long / short < image_option(processor, features, "pan_and_scan_min_ratio_to_activate"):
        return []
    count = min(most, max(2, min(long // least, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < least:
        return []
    spans = [(start, min(start + step, long)) for start in range(0, count * step, step)]
    return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans]
