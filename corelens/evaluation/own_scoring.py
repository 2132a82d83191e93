"""Answers scored by the rule of their set: ANLS, overlap of boxes, MMLongBench-Doc's rules …

Such a rule reads the text that a model writes, so the text is generated, under the same hooks and
the same sparse plan as everything else. What needs a judge model is refused by name before anything
runs.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from corelens.data.scoring import RULES, score
from corelens.evaluation.answers import Answer
from corelens.evaluation.decoding import Asked, ask
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM

# the text may be so much longer than the gold answer; and never longer
MORE_TOKENS, MOST_TOKENS = 16, 512


def has_rule(samples: Sequence[Sample]) -> bool:
    """Whether one of these samples is scored by a rule of its set.

    Raises:
        CorelensError: a rule that is not known, or one that needs a judge.
    """
    named = [sample for sample in samples if sample.meta.get("scoring")]
    for sample in named:
        if sample.meta["scoring"] not in RULES:
            score(sample, "")  # says which rule it is, and what to do
    return bool(named)


def scored_by_rule(
    model: HookedMLLM,
    answered: Sequence[Inputs],
    answers: Sequence[Answer],
    hooks: Sequence[Hook] = (),
) -> list[Answer]:
    """The answers of batches with gold answers, with the set's score and the text that the model
    writes."""
    scored: list[Answer] = []
    for inputs in answered:
        batch = answers[len(scored) : len(scored) + len(inputs.samples)]
        if has_rule(inputs.samples):
            scored += rule_scores(model, ask(model, [inputs])[0], batch, hooks)
        else:
            scored += batch
    return scored


@torch.no_grad()
def rule_scores(
    model: HookedMLLM,
    asked: Asked,
    answers: Sequence[Answer],
    hooks: Sequence[Hook] = (),
    sparse: Any = None,
) -> list[Answer]:
    """The answers of one batch of prompts, with the set's score and the text that the model
    writes."""
    longest = min(MOST_TOKENS, max(map(len, asked.gold)) + MORE_TOKENS)
    with (
        model.sparse(sparse) if sparse is not None else nullcontext(),
        model.hooks(fwd_hooks=list(hooks)),
    ):
        written = model.generate(asked.inputs, max_new_tokens=longest, do_sample=False)
    scored = []
    for sample, ids, answer in zip(asked.inputs.samples, written, answers, strict=True):
        if sample.meta.get("scoring"):
            text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
            answer = replace(answer, given=text, score=score(sample, text))
        scored.append(answer)
    return scored
