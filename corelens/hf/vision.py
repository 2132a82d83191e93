"""Visual features: where an encoder's output holds them, and where DeepStack adds them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from corelens.hf.modules import takes_argument

# The argument by which a model takes visual features that were computed before, {"image": output,
# "video": output} (transformers 5.17 has no such argument). A model that does not know it swallows
# it, and runs without its pictures.
ENCODED = "mm_encoder_outputs"


def takes_encoded(features: Any) -> bool:
    """Whether a model takes visual features that were computed before."""
    return takes_argument(features, ENCODED)


def visual_features(output: Any) -> list[Any]:
    """What the decoder gets of an encoder's output: the projector's output (the last hidden state,
    where the projector is the encoder's own end), then what DeepStack adds layer by layer."""
    return [
        getattr(output, _features_in(output)),
        *(getattr(output, "deepstack_features", None) or []),
    ]


def set_visual_features(output: Any, features: list[Any]) -> None:
    """Write into an encoder's output what `visual_features` read from it."""
    before = getattr(output, _features_in(output))
    # (some outputs hold the same tensor under both names, and the model reads either)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is before:
            setattr(output, name, features[0])
    if len(features) > 1:
        output.deepstack_features = features[1:]


def _features_in(output: Any) -> str:
    pooled = getattr(output, "pooler_output", None)
    return "last_hidden_state" if pooled is None else "pooler_output"


def image_defaults(processor: Any) -> list[Mapping[str, Any]]:
    """The options for images that a processor sets by itself, the first dict that has one wins.

    They stand in its class's argument type (`_defaults` of `XxxProcessorKwargs`, until transformers
    5.29), later on the processor: token geometry must be computed with the options that its image
    processor was called with.
    """
    by_type = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", None) or {}
    return [by_type.get("images_kwargs") or {}, getattr(processor, "images_kwargs", None) or {}]


@contextmanager
def deepstack_addition(
    decoder: Any, add: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within this context `add(stream, where, features)` makes the sum of residual stream and
    DeepStack features.

    The decoder adds them between two layers, in a method of its own and in no module: no module
    hook sees them.
    """
    # that of a run inside whose hook function this one is
    before = vars(decoder).get("_deepstack_process")
    # on this instance only: it hides the class's method until it is deleted
    decoder._deepstack_process = add
    try:
        yield
    finally:
        if before is None:
            del decoder._deepstack_process
        else:
            decoder._deepstack_process = before
