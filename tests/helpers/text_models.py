"""A small decoder of text, and ids for it: all that tests without pictures need."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from corelens.model.hooked import HookedMLLM
from helpers.family_parts import TEXT, randomise


def text_model(**options) -> HookedMLLM:
    """A small decoder of text, which is all that these tests need."""
    return HookedMLLM(
        randomise(LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=64, pad_token_id=0))), **options
    )


def text(batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
