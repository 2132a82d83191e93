"""The logits of a forward, or of its last rows alone."""

from typing import Any

from torch import Tensor

from corelens.hf import takes_argument


def logits_of(hf: Any, arguments: dict[str, Any], logits_to_keep: int | None) -> Tensor:
    """The logits [batch, pos, d_vocab] of a transformers model's run; with `logits_to_keep` those
    of the last rows.

    Some models do not take that argument, and swallow it without a word: there all logits are
    computed, and cut.
    """
    inner = hf.get_base_model() if hasattr(hf, "get_base_model") else hf  # inside PEFT's wrapper
    if logits_to_keep is None:
        return hf(**arguments).logits
    if takes_argument(inner, "logits_to_keep"):
        return hf(**arguments, logits_to_keep=logits_to_keep).logits
    logits = hf(**arguments).logits
    return logits[:, -logits_to_keep:] if logits_to_keep else logits
