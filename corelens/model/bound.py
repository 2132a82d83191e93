"""A model with its inputs bound: TransformerLens's functions that hand it tokens run it with the
picture too."""

from collections.abc import Iterator
from contextlib import contextmanager
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

    def to_tokens(
        self, text: Any = None, prepend_bos: bool = False, **options: Any
    ) -> Int[Tensor, "batch pos"]:
        """The bound tokens; of a text that is not the bound prompt, its own tokens.

        A run on other tokens than the bound ones raises: they have no picture.

        Args:
            text: the bound prompt (as `to_string(tokens)` writes it), other texts, or None.
            prepend_bos: put the tokenizer's first token before other texts.
            options: TransformerLens's others, which a bound prompt has no use for.
        """
        texts = [text] if isinstance(text, str) else text
        if texts is None or list(texts) == self.model.to_string(self.tokens):
            return self.tokens
        tokenizer = self.model.tokenizer
        rows = [tokenizer(string, add_special_tokens=False)["input_ids"] for string in texts]
        first = tokenizer.bos_token_id
        if prepend_bos and first is not None:
            rows = [[first, *row] for row in rows]
        if len({len(row) for row in rows}) > 1:
            raise CorelensError(
                f"texts of {[len(row) for row in rows]} tokens",
                "texts of one length",
                "give them one by one",
            )
        return torch.tensor(rows, dtype=torch.long, device=self.tokens.device)

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

    def generate(
        self, tokens: Any = None, max_new_tokens: int = 8, **options: Any
    ) -> Int[Tensor, "batch new"]:
        """The model's generate on the bound inputs: the new tokens."""
        return self.model.generate(self._checked(tokens), max_new_tokens, **options)

    @contextmanager
    def hooks(self, *args: Any, **kwargs: Any) -> Iterator["BoundModel"]:
        """The model's hooks; what the context gives is the bound model."""
        with self.model.hooks(*args, **kwargs):
            yield self

    def __getattr__(self, name: str) -> Any:
        """All else is the model's."""
        return getattr(self.__dict__["model"], name)

    def _checked(self, tokens: Any) -> Inputs:
        if tokens is None or tokens is self.inputs:
            return self.inputs
        bound = isinstance(tokens, Tensor) and torch.equal(
            (tokens[None] if tokens.ndim == 1 else tokens).to(self.tokens.device), self.tokens
        )
        if not bound:
            shape = f"tokens of shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else ""
            raise CorelensError(
                f"{shape or f'a {type(tokens).__name__}'}, which are not the bound ones",
                "the tokens of the bound inputs: their picture goes with them",
                "pass bound.tokens, or bind the model to the inputs that you mean",
            )
        return self.inputs


def bind(model: HookedMLLM, inputs: Inputs) -> BoundModel:
    """The model with `inputs` bound, for functions that hand a model nothing but tokens.

        bound = cl.bind(model, corrupted)
        patching.get_act_patch_resid_pre(bound, bound.tokens, clean_cache, metric)

    Every run has the bound picture; tokens other than the bound ones raise. Pass
    `model.encode(inputs)` to encode the picture once for all runs.
    """
    return BoundModel(model, inputs)
