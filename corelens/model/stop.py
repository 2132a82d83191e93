"""A forward that ends at a layer: what enters the layer is the result, and nothing after it is
computed."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from corelens.errors import CorelensError


class _Stopped(Exception):
    """Carries the residual stream out of the model's own code."""

    def __init__(self, residual: Tensor):
        super().__init__("stop_at_layer")
        self.residual = residual


def residual_before(
    hf: Any, decoder: nn.Module, norm: nn.Module, layer: int, arguments: dict[str, Any]
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters a layer; neither that layer nor what follows is run.

    Args:
        decoder: the text decoder, with its `layers`.
        norm: the norm behind them.
        layer: as TransformerLens's `stop_at_layer`: 0 stops before the first layer, n_layers before
            the final norm, −1 before the last layer.
        arguments: what the model is called with.
    """
    layers = list(decoder.layers)  # type: ignore[arg-type]
    if not -len(layers) <= layer <= len(layers):
        raise CorelensError(
            f"stop_at_layer={layer}",
            f"{-len(layers)} to {len(layers)}",
            "take a layer that the model has",
        )
    modules = [*layers, norm]
    module_to_stop_at: Any = modules[layer if layer >= 0 else len(layers) + layer]

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Stopped(args[0] if args else kwargs["hidden_states"])

    handle = module_to_stop_at.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        hf(**arguments)
    except _Stopped as stopped:
        return stopped.residual
    finally:
        handle.remove()
    raise CorelensError(
        f"stop_at_layer={layer}: the model's forward never reached it", "a decoder that runs its "
            "layers in order",
        "read blocks.{l}.hook_resid_pre with run_with_cache instead",
    )  # fmt: skip
