"""From a question and its pictures to what a model runs on: samples, prompts, processing,
pictures."""

from typing import TYPE_CHECKING, Any

from corelens.inputs.sample import Sample

if TYPE_CHECKING:
    from corelens.inputs.prepare import Inputs

__all__ = ["Inputs", "Sample"]


def __getattr__(name: str) -> Any:
    if name != "Inputs":
        raise AttributeError(f"module 'corelens.inputs' has no attribute {name!r}")
    from corelens.inputs.prepare import Inputs  # (it needs torch)

    return Inputs
