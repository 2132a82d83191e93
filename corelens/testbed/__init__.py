"""Hand-built multimodal models whose heads and circuits are known exactly, and pictures for them.

They run through the ordinary HookedMLLM path: a real processor, vision tower, projector and decoder, with weights that
were set instead of trained. Use them to see what a method finds when the truth is known.
"""

from corelens.testbed.model import CIRCUIT, KINDS, LOOKING, Kind, build, circuit_model, looking_model
from corelens.testbed.pictures import board, box, samples

__all__ = ["CIRCUIT", "KINDS", "LOOKING", "Kind", "board", "box", "build", "circuit_model", "looking_model", "samples"]
