"""Tiny models without a layout of their own, what they are asked, and plain PyTorch runs of them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor, nn

import corelens as cl
from helpers import family_recent
from helpers.family_parts import randomise

FAMILIES = list(family_recent.BUILDERS)
HEADS = cl.HeadSet([(1, 3), (3, 0)])  # of layers that attend in every family


@cache
def recent(family: str) -> cl.HookedMLLM:
    """The wrapped model, shared by all tests of a file."""
    hf, processor = family_recent.BUILDERS[family]()
    return cl.HookedMLLM(randomise(hf).eval(), processor)


def picture(seed: int) -> Image.Image:
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 120, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def sample(seed: int = 0, **more: Any) -> cl.Sample:
    """A question about that noise."""
    region = cl.Box(8, 8, 70, 60)
    return cl.Sample([picture(seed)], "What is it?", answer="7", regions=[region], **more)


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers."""
    return list(model.layout.decoder(model.hf).layers)


def o_proj(layer: Any) -> nn.Module:
    """The output projection of a layer that attends."""
    return getattr(layer.self_attn, "o_proj", None) or layer.self_attn.out_proj


@contextmanager
def pytorch(handles: Iterable[Any]) -> Iterator[None]:
    """Take PyTorch's own hooks off again."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def plain(model: Any, inputs: Any, **options: Any) -> Any:
    """transformers' own forward."""
    return model.hf(**inputs.tensors, use_cache=False, **options)


@contextmanager
def seen_by_heads(
    model: Any, seen: Callable[[int, int, int], Bool[Tensor, "head row key"]]
) -> Iterator[None]:
    """transformers' own model, whose decoder's heads see only what `seen(layer, rows, keys)` says,
    of what they see anyway: a mask a head, laid over the model's own before SDPA."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    inner: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    numbers = {
        module: number
        for number, layer in enumerate(layers_of(model))
        for module in layer.modules()
    }

    def masked(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **more: Any,
    ) -> Any:
        mask = attention_mask
        if module in numbers:
            rows, keys = query.shape[-2], key.shape[-2]
            causal = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            own = causal if mask is None else mask if mask.dtype == torch.bool else mask >= 0
            mask = own & seen(numbers[module], rows, keys)
        return inner(module, query, key, value, mask, **more)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = masked
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # (shows the registered one again)
