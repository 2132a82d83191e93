"""Held-out accuracy of a demo model, as a user would get it: processor, generate, words, exact
match."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from corelens.inputs.prepare import Sample, prepare
from corelens.layouts import layout_for

_PIXELS = 5_000_000  # in one batch


def answers(model: Any, processor: Any, samples: Sequence[Sample]) -> list[str]:
    """What `model.generate` answers to each sample, greedily, from the tensors that a user would
    get."""
    layout, texts = layout_for(model.config), list[str]()
    while len(texts) < len(samples):
        pictures = samples[len(texts)].video or samples[len(texts)].images
        size = max(1, _PIXELS // sum(picture.width * picture.height for picture in pictures))
        chunk = samples[len(texts) : len(texts) + size]
        inputs = prepare(chunk, processor, layout, model.config).to(model.device).tensors
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return texts


def accuracy(model: Any, processor: Any, samples: Sequence[Sample]) -> float:
    """The share of samples answered exactly right."""
    answered = answers(model, processor, samples)
    return sum(a == sample.answer for a, sample in zip(answered, samples, strict=True)) / len(
        samples
    )


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share measured on n samples (Wilson 1927)."""
    centre, spread = (
        share + z * z / (2 * n),
        z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)),
    )
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
