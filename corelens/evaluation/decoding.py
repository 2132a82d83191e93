"""Answers under sparse inference, decoded step by step as generation does.

A forward with the gold answer appended would be wrong there: its answer rows would be prefill rows,
sparse where the plan decodes with every key, and they would never read from a cache that a budget
has emptied. So the prompt is prefilled under the plan and each answer token is a decode step of its
own. The gold tokens are forced (their logits are read before): greedy decoding writes the gold
answer if and only if each of its tokens is the argmax after the forced ones before it, and the end
of the sequence after the last.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.evaluation.answers import Answer, greedy_answer
from corelens.hf import ENCODED
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs
from corelens.model.hooked import HookedMLLM


@dataclass
class Asked:
    """One batch of prompts without answers, pictures encoded, and the tokens of each gold
    answer."""

    inputs: Inputs
    gold: list[Int[Tensor, " _"]]


def ask(model: HookedMLLM, answered: Sequence[Inputs]) -> list[Asked]:
    """The prompts alone of batches with answers; what was encoded is not encoded again."""
    made = []
    for inputs in answered:
        if not inputs.samples:
            raise CorelensError(
                "inputs made of tensors", "samples with answers, or what `batches` made of them",
                "evaluate sparse inference on samples",
            )  # fmt: skip
        ids = inputs.tensors["input_ids"].cpu()
        gold = [ids[i, token_map.answer] for i, token_map in enumerate(inputs.token_maps)]
        prompts = model.prepare(inputs.samples)
        encoded = inputs.tensors.get(ENCODED)
        if encoded is not None:
            rest = {
                name: x
                for name, x in prompts.tensors.items()
                if not name.startswith("pixel_values")
            }
            prompts = replace(prompts, tensors=rest | {ENCODED: encoded})
        made.append(Asked(prompts, gold))
    return made


@torch.no_grad()
def answer_logits(
    model: HookedMLLM, asked: Asked, hooks: Sequence[Hook] = (), sparse: Any = None
) -> list[Float[Tensor, "_ d_vocab"]]:
    """For each sample the logits that predict its gold tokens, and last those of what follows the
    answer."""
    steps: list[Tensor] = []
    longest = max(map(len, asked.gold))
    filler = torch.zeros(1, dtype=torch.long)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.cat([gold, filler]) for gold in asked.gold], batch_first=True
    )

    def force(logits: Tensor, hook: Any) -> Tensor:
        steps.append(logits[:, -1].float().cpu())
        wanted = tokens[:, len(steps) - 1, None, None].to(logits.device)
        return torch.full_like(logits, -torch.inf).scatter(
            -1, wanted.expand(-1, logits.shape[1], -1), 0.0
        )

    plan = model.sparse(sparse) if sparse is not None else nullcontext()
    with plan, model.hooks(fwd_hooks=[*hooks, ("hook_logits", force)]):
        model.generate(asked.inputs, max_new_tokens=longest + 1, do_sample=False)
    rows = torch.stack(steps, dim=1)
    return [rows[i, : len(gold) + 1] for i, gold in enumerate(asked.gold)]


def decoded(
    model: HookedMLLM, asked: Sequence[Asked], hooks: Sequence[Hook] = (), sparse: Any = None
) -> Iterator[tuple[Answer, Float[Tensor, "answer d_vocab"]]]:
    """Each sample's answer, and the log-probabilities of the rows that predict its gold tokens."""
    for batch in asked:
        rows = answer_logits(model, batch, hooks, sparse)
        for sample, gold, of_sample in zip(batch.inputs.samples, batch.gold, rows, strict=True):
            yield greedy_answer(model, sample, gold, of_sample), of_sample[:-1].log_softmax(-1)
