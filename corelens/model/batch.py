"""What a run is given, as one batch: prepared inputs, samples, or the Hugging Face model's own
tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from corelens.errors import CorelensError
from corelens.hf import HookedRootModule
from corelens.inputs.prepare import Inputs, Sample
from corelens.inputs.tensors import check_has_media
from corelens.model.arguments import check_keywords, model_arguments


def arguments_of(model: Any) -> set[str]:
    """Every keyword that a forward of the model that a HookedMLLM wraps reads."""
    return model_arguments(model.hf, model.layout.decoder(model.hf), model.processor)


def batch_of(model: Any, inputs: Any, tensors: Mapping[str, Any]) -> Inputs:
    """One batch of what a call of a HookedMLLM was given.

    Args:
        inputs: what `prepare` made, a sample or a list of them, tensors by name, or None.
        tensors: keywords of the call; they replace the inputs' own of the same name.

    Errors: a keyword that nothing reads; tokens without names; image tokens without their image.
    """
    by_hand = {} if isinstance(inputs, Inputs) or not isinstance(inputs, Mapping) else inputs
    if names := [*by_hand, *tensors]:
        calls = (type(model).forward, HookedRootModule.run_with_hooks, type(model).run_with_cache)
        check_keywords(names, arguments_of(model), calls)
    several = isinstance(inputs, list) and inputs and isinstance(inputs[0], Sample)
    if isinstance(inputs, Sample) or several:
        inputs = model.prepare(inputs)
    if inputs is not None and not isinstance(inputs, (Inputs, Mapping)):
        raise CorelensError(
            f"a {type(inputs).__name__} to run on",
            "inputs, or the Hugging Face model's tensors by name: tokens alone have no picture",
            "run on model.prepare(sample); for functions that pass tokens, use cl.bind(model, "
            "inputs)",
        )
    if isinstance(inputs, Inputs):
        batch = replace(inputs, tensors={**inputs.tensors, **tensors}) if tensors else inputs
    else:
        batch = Inputs({**(inputs or {}), **tensors}, [], [])
    check_has_media(batch.tensors, model.layout, model.hf.config)
    return batch
