"""Prefill engines: attention in which some heads see all and the others what their pattern leaves.

reference   dense attention under the mask, in float32: the definition; the others are tested
            against it
split       full heads through SDPA, sparse heads over the keys that they see; runs everywhere, made
            for the CPU
flex        one compiled FlexAttention call for all heads; CUDA
"""

import torch

from corelens.errors import CorelensError
from corelens.sparse.flex import flex
from corelens.sparse.reference import reference
from corelens.sparse.split import split

ENGINES = {"reference": reference, "split": split, "flex": flex}


def engine_for(name: str, device: torch.device) -> str:
    """The engine that runs on this device: the one named, or for "auto" the fastest there."""
    if name == "auto":
        return "flex" if device.type == "cuda" else "split"
    if name == "flex" and device.type != "cuda":
        raise CorelensError(
            f"the engine 'flex' on {device.type}",
            "a CUDA device: its kernels are compiled for that",
            "take engine='auto', which is 'split' here",
        )
    return name
