"""Inputs made of tensors that the user prepared: what can be known of their tokens, and what must
be among them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hf import ENCODED
from corelens.inputs.prepare import Inputs
from corelens.layouts import Layout
from corelens.tokens.token_map import TokenMap

MEDIA = ("pixel_values", "pixel_values_videos", ENCODED, "inputs_embeds")
SOUNDS = ("input_features", "input_values", "audio", "inputs_embeds")  # in names of tensors


def from_tensors(
    tensors: Mapping[str, Any], layout: Layout, config: Any, processor: Any = None
) -> Inputs:
    """Wrap tensors made by hand; token maps know visual positions, text and the last row, but
    nothing of pictures.

    "visual" means what it means in `prepare`: the patches, without newlines and separators.

    Args:
        processor: the model's own processor, whose options say how pictures were cut; without it
            the config says it.

    Errors: neither input_ids nor inputs_embeds; image tokens without images; more or fewer than
    their sizes make.
    """
    ids = tensors.get("input_ids")
    like = ids if ids is not None else tensors.get("inputs_embeds")
    if like is None:
        raise CorelensError(
            f"tensors {sorted(tensors)}",
            "input_ids [batch, pos] among them",
            "give what you would give the model",
        )
    check_has_media(tensors, layout, config)
    mask = tensors.get("attention_mask")
    real = (
        torch.ones(like.shape[:2], dtype=torch.bool)
        if mask is None or mask.ndim != 2
        else mask.bool().cpu()
    )
    unknown = CorelensError(
        "inputs made of "
        "tensors", "inputs made of a Sample, when regions, questions or cells are asked for",
        "use model.prepare(Sample(…)), or name positions explicitly",
    )  # fmt: skip
    missing = dict.fromkeys(("images", "sounds", "region", "question", "answer"), unknown)
    maps = []
    where = _placeholders(ids, tensors, layout, config, processor)
    for row in range(like.shape[0]):
        placeholder = visual = torch.empty(0, dtype=torch.long)
        if where is not None:
            placeholder, visual = (mask[row].nonzero()[:, 0] for mask in where)
        last = real[row].nonzero()[-1]
        audio = _audio(ids, layout, config, row)
        maps.append(
            TokenMap(
                real[row], placeholder, visual, last, missing=missing, id=str(row), audio=audio
            )
        )
    return Inputs(dict(tensors), maps)


def check_has_media(tensors: Mapping[str, Any], layout: Layout, config: Any) -> None:
    """Refuse a run whose image or audio tokens have no image or sound: a model would take the
    placeholders for words and go on."""
    ids = tensors.get("input_ids")
    _check_has_sounds(ids, tensors, layout, config)
    # (some families put a word before: image_pixel_values)
    media = [
        name
        for name, x in tensors.items()
        if x is not None and (name in MEDIA or "pixel_values" in name)
    ]
    if ids is None or media:
        return
    count = int(torch.isin(ids, torch.tensor(layout.placeholders(config), device=ids.device)).sum())
    if count:
        raise CorelensError(
            f"{count} image tokens in input_ids and no image: the tensors are {sorted(tensors)}",
            f"pixel_values (or pixel_values_videos, {ENCODED}, inputs_embeds) beside them",
            "pass inputs whole, as model.prepare or the processor made them",
        )


def _check_has_sounds(
    ids: Tensor | None, tensors: Mapping[str, Any], layout: Layout, config: Any
) -> None:
    present = [name for name, x in tensors.items() if x is not None]
    if ids is None or any(word in name for name in present for word in SOUNDS):
        return
    token = layout.audio_placeholder(config)
    count = int((ids == token).sum()) if token >= 0 else 0
    if count:
        raise CorelensError(
            f"{count} audio tokens in input_ids and no sound: the tensors are {sorted(tensors)}",
            "input_features (or what this model calls them, or inputs_embeds) beside them",
            "pass inputs whole, as model.prepare or the processor made them",
        )


def _audio(ids: Tensor | None, layout: Layout, config: Any, row: int) -> Tensor:
    """The positions of a row's audio tokens."""
    token = layout.audio_placeholder(config)
    if ids is None or token < 0:
        return torch.empty(0, dtype=torch.long)
    return (ids[row].cpu() == token).nonzero()[:, 0]


def widened(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The batch with tensors that a processor made in a narrower type than the model's in the
    model's own."""
    narrow = {
        name: x.to(dtype)
        for name, x in inputs.tensors.items()
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < dtype.itemsize
    }
    return replace(inputs, tensors=inputs.tensors | narrow)


def _placeholders(
    ids: Tensor | None, tensors: Mapping[str, Any], layout: Layout, config: Any, processor: Any
) -> tuple[Tensor, Tensor] | None:
    """Which tokens [batch, pos] stand for picture content, and which of them are patches; None
    without ids."""
    if ids is None:
        return None
    ids = ids.cpu()
    placeholder = torch.isin(ids, torch.tensor(layout.placeholders(config)))
    visual = placeholder.clone()
    if bool(placeholder.any()):
        for token, patches in (layout.patches_among(processor, config, tensors) or {}).items():
            among = ids == token
            if int(among.sum()) != len(patches):
                raise CorelensError(
                    f"{int(among.sum())} tokens of id {token} in input_ids, where the pictures' "
                    f"sizes make {len(patches)}; the tensors are {sorted(tensors)}",
                    "the tensors as the processor made them, image_sizes among them",
                    "pass all that the processor returned",
                )
            visual[among] = patches
    return placeholder, visual
