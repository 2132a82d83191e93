"""The tiny models of all families wrapped, and two samples prepared for them: made once, shared by
the tests of a process."""

from functools import cache

import torch

from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM
from helpers.families import tiny
from helpers.samples import picture

SAMPLES = [
    Sample(images=[picture(0, (96, 64))], question="What digit is on the red circle?", answer="7"),
    Sample(
        images=[picture(1, (70, 110)), picture(2, (64, 64))], question="Which colour?", answer="2"
    ),
]


@cache
def hooked(family: str) -> HookedMLLM:
    return HookedMLLM(*tiny(family))


@cache
def batch_of(family: str, side: str = "left") -> Inputs:
    return hooked(family).prepare(SAMPLES, padding_side=side)


@cache
def alone(family: str, index: int) -> Inputs:
    return hooked(family).prepare(SAMPLES[index])


@cache
def reference(family: str) -> torch.Tensor:
    with torch.no_grad():
        return hooked(family).hf(**batch_of(family).tensors, use_cache=False).logits


def real(inputs: Inputs) -> torch.Tensor:
    return torch.stack([token_map.real for token_map in inputs.token_maps])
