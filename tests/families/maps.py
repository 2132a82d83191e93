"""How a type's token map is had: by a closed form, by probing, or not at all.

Probing needs tokens that see their own part of the picture. Whether a type has them is measured
here on its picture's tensors, attention in the tower off: a corner of the picture is changed, and
the image tokens that move at the decoder's first layer are counted. (The cells themselves are
measured through real processors, in tests/test_probing.py, for the types that have one there.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from corelens.hf import attention_off
from corelens.layouts.base import Layout
from corelens.model.probing import tower_modules

PIXELS = ("pixel_values", "image_pixel_values")


class _Reached(Exception):
    """The decoder's first layer has been reached: nothing behind it needs to run."""


def token_map(model: Any, tensors: dict[str, Any], count: int) -> str:
    """How the token map of a wrapped model is had, and why there is none; `count` image tokens are
    among its tensors."""
    name = next((name for name in PIXELS if name in tensors), None)
    if name is None or not count:
        return "none: no picture with tokens of its own in the prompt"
    if type(model.layout) is not Layout:
        return "closed form, of its layout"
    if "image_grid_thw" in tensors:
        return "closed form, from image_grid_thw"
    moved = _moved_by_a_corner(model, tensors, name)
    image = torch.isin(
        tensors["input_ids"][0], torch.tensor(model.layout.placeholders(model.hf.config))
    )
    moved = moved[image] if bool(image.any()) else moved
    total, seen = len(moved), int(moved.sum())
    if not seen:
        return "none: no token moves when a corner of the picture changes"
    if total == 1:
        return "probed (it has one token)"
    if seen == total:
        return "none: every token sees the whole picture"
    return f"probed ({seen} of {total} tokens see a corner)"


def _moved_by_a_corner(model: Any, tensors: dict[str, Any], name: str) -> Tensor:
    """Which positions [pos] move when a corner of the picture does."""
    pixels = tensors[name].clone()
    if pixels.ndim >= 4 and pixels.shape[-1] <= 4:  # [..., y, x, channel]
        height, width = pixels.shape[-3] // 4, pixels.shape[-2] // 4
        pixels[..., :height, :width, :] += 1.0
    elif pixels.ndim >= 4:  # [..., channel, y, x]
        height, width = pixels.shape[-2] // 4, pixels.shape[-1] // 4
        pixels[..., :height, :width] += 1.0
    else:  # [..., patch, number]
        pixels[..., : max(1, pixels.shape[-2] // 16), :] += 1.0
    decoder = model.layout.decoder(model.hf)
    with attention_off(tower_modules(model.hf, decoder)), torch.no_grad():
        before, after = (
            _embedded(model.hf, decoder, tensors | {name: x}) for x in (tensors[name], pixels)
        )
    length = tensors["input_ids"].shape[1]  # (of several streams the first)
    return (after - before).reshape(-1, length, before.shape[-1])[0].abs().amax(-1) > 1e-6


def _embedded(hf: nn.Module, decoder: Any, tensors: dict[str, Any]) -> Tensor:
    """What enters the decoder's first layer, [batch, pos, d_model]."""
    entered: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        hf(**tensors, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return entered[0]
