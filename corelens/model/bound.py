"""A model with its inputs bound: TransformerLens's functions that hand it tokens run it with the picture too."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs
from corelens.model.hooked import HookedMLLM


class BoundModel:
    """What `transformer_lens.patching` and its kind can run: see `bind`."""

    def __init__(self, model: HookedMLLM, inputs: Inputs):
        self.model, self.inputs = model, inputs
        self.original_model = model.hf  # TransformerLens looks here whether it is in training mode

    @property
    def cfg(self) -> Any:
        """The model's shape."""
        return self.model.cfg

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The bound token ids: what to hand to TransformerLens's functions."""
        return self.inputs.tensors["input_ids"]

    def to_tokens(self, *args: Any, **kwargs: Any) -> Int[Tensor, "batch pos"]:
        """The bound tokens; text alone cannot be run, since it has no picture."""
        return self.tokens

    def forward(self, tokens: Any = None, **kwargs: Any) -> Any:
        """The model's forward on the bound inputs."""
        return self.model(self._checked(tokens), **kwargs)

    __call__ = forward

    def run_with_hooks(self, tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The model's run_with_hooks on the bound inputs."""
        return self.model.run_with_hooks(self._checked(tokens), *args, **kwargs)

    def run_with_cache(self, tokens: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The model's run_with_cache on the bound inputs."""
        return self.model.run_with_cache(self._checked(tokens), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """All else is the model's."""
        return getattr(self.__dict__["model"], name)

    def _checked(self, tokens: Any) -> Inputs:
        if tokens is None or tokens is self.inputs:
            return self.inputs
        if not isinstance(tokens, Tensor) or not torch.equal(tokens.to(self.tokens.device), self.tokens):
            given = (
                f"tokens of shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
            )
            raise CorelensError(
                f"{given}, which are not the bound ones",
                "the tokens of the bound inputs: their picture goes with them",
                "pass bound.tokens, or bind the model to the inputs that you mean",
            )
        return self.inputs


def bind(model: HookedMLLM, inputs: Inputs) -> BoundModel:
    """The model with `inputs` bound, for functions that hand a model nothing but tokens.

        bound = cl.bind(model, corrupted)
        patching.get_act_patch_resid_pre(bound, bound.tokens, clean_cache, metric)

    Every run has the bound picture; tokens other than the bound ones raise. Pass `model.encode(inputs)` to encode the
    picture once for all runs.
    """
    return BoundModel(model, inputs)
