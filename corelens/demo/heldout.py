"""Held-out accuracy of a demo model, as a user would get it: processor, generate, words, exact match."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from corelens.inputs import Sample


def answers(model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 50) -> list[str]:
    """What `model.generate` answers to each sample, greedily, through the ordinary processor path."""
    said: list[str] = []
    for start in range(0, len(samples), batch_size):
        chunk = samples[start : start + batch_size]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}]
            for sample in chunk
        ]
        texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        images = [sample.images for sample in chunk]
        inputs = processor(text=texts, images=images, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return said


def accuracy(model: Any, processor: Any, samples: Sequence[Sample]) -> float:
    """The share of samples answered exactly right."""
    said = answers(model, processor, samples)
    return sum(a == sample.answer for a, sample in zip(said, samples, strict=True)) / len(samples)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a share measured on n samples (Wilson 1927)."""
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
