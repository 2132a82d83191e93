"""TransformerLens: the classes that ours stand on, and the inner steps of its cache."""

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.hook_points import HookPoint as LensHookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.slice import Slice

__all__ = [
    "FactoredMatrix",
    "HookedRootModule",
    "LensCache",
    "LensHookPoint",
    "Slice",
    "attach_order",
    "newest_handle",
]


class LensCache(ActivationCache):
    """TransformerLens's ActivationCache, one of whose inner steps may be overridden under a name
    without underscore."""

    def neurons_onto(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        directions: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        """What each neuron adds to `directions` after the norm, without building [d_mlp,
        d_model]."""
        # TransformerLens 4.0 neither knows it nor asks for it
        more = {"mlp_input": True} if mlp_input else {}
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, directions, **more
        )

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        return self.neurons_onto(layer, pos_slice, neuron_slice, project_2d, mlp_input)

    def norm_of(self, layer: int, mlp_input: bool, pos_slice: Slice) -> tuple[Tensor, bool]:
        """The scale [batch, pos, 1] of the norm that reads the residual stream at a layer, and
        whether it centres."""
        scale = self._get_cached_ln_scale(layer, mlp_input=mlp_input, pos_slice=pos_slice)
        # TransformerLens 4.2 asks its config alone
        centring = getattr(self, "_uses_ln_centering", None)
        return scale, self.model.cfg.normalization_type in (
            "LN",
            "LNPre",
        ) if centring is None else centring(layer)


def newest_handle(handles: list[Any]) -> Any:
    """The handle of the hook that was attached last. (TransformerLens 4.0's `add_hook` returns
    none.)"""
    return max(handles, key=attach_order)


def attach_order(handle: Any) -> int:
    """The number of a TransformerLens handle; it grows with every hook that is attached, and hooks
    run in this order."""
    return handle.hook.id
