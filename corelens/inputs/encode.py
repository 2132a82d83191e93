"""The visual features of a batch, computed once: what many runs on the same pictures share."""

import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import align_module_device

from corelens.hf import ENCODED, takes_encoded
from corelens.inputs.prepare import Inputs

# pixel tensor → (what transformers calls the modality, the method that encodes it)
ENCODERS = {
    "pixel_values": ("image", "get_image_features"),
    "pixel_values_videos": ("video", "get_video_features"),
}


def encode(features: Any, inputs: Inputs) -> Inputs:
    """The same batch with its pictures encoded: the logits are the same, and the vision tower does
    not run again.

    In runs on the result `vision.hook_out` fires (an edit leaves the shared encoding alone), the
    tower's blocks do not.

    Args:
        features: the object with `get_image_features`, see Layout.visual_features.
        inputs: a batch with pixel tensors; one without is returned as it is, and so is every batch
            of a model that does not take encoded pictures (all in transformers 5.17): it encodes
            them in each run.
    """
    if not takes_encoded(features):
        return inputs
    encoders = {name: ENCODERS[name] for name in ENCODERS if inputs.tensors.get(name) is not None}
    outputs = dict(inputs.tensors.get(ENCODED) or {})
    # (parameters of the module itself, a newline's embedding, are loaded if accelerate holds them:
    # no forward does it)
    with torch.no_grad(), align_module_device(features) if encoders else nullcontext():
        for modality, method in encoders.values():
            call = getattr(features, method)
            takes = set(inspect.signature(inspect.unwrap(call)).parameters)
            outputs[modality] = call(
                **{name: x for name, x in inputs.tensors.items() if name in takes}, return_dict=True
            )
    if not encoders:
        return inputs
    rest = {name: x for name, x in inputs.tensors.items() if name not in encoders}
    return replace(inputs, tensors=rest | {ENCODED: outputs})
