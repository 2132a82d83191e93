"""Hand-built multimodal models whose heads and circuits are known exactly, and pictures for them.

They run through the ordinary HookedMLLM path: a real processor, vision tower, projector and
decoder, with weights that were set instead of trained. Use them to see what a method finds when the
truth is known.
"""

from corelens.testbed.model import (
    BLIND,
    CIRCUIT,
    CORE,
    KINDS,
    LOOKING,
    SPREAD,
    Kind,
    blind_model,
    build,
    circuit_model,
    core_model,
    looking_model,
    spread_model,
)
from corelens.testbed.pictures import board, box, samples

__all__ = [
    "BLIND",
    "CIRCUIT",
    "CORE",
    "KINDS",
    "LOOKING",
    "SPREAD",
    "Kind",
    "blind_model",
    "board",
    "box",
    "build",
    "circuit_model",
    "core_model",
    "looking_model",
    "samples",
    "spread_model",
]
