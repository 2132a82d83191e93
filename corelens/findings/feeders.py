"""The heads that tell other heads where to look: path patching from earlier heads into their
queries."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.findings.world import World
from corelens.heads.head_set import HeadSet
from corelens.inputs.prepare import Sample
from corelens.interventions.counterfactuals import counterfactual
from corelens.interventions.path import path_patch
from corelens.model.hooked import HookedMLLM

PAIRS = 16  # questions exchanged, of the scoring samples
# of what the exchanged question costs in all: what a feeder must carry at the least
LEAST_SHARE = 0.1


def feeders(world: World, top: HeadSet) -> HeadSet:
    """Heads below the top heads whose output, exchanged for that under another question, misleads
    their queries.

    The question is exchanged for another sample's of as many tokens. A head is a feeder if the
    direct paths from it into the top heads' queries carry LEAST_SHARE or more of what the exchange
    costs in log-odds of the right answer, its 95% interval below zero. At most as many as there are
    top heads; none where no two questions are of one length.
    """
    world.advance("who feeds these heads")
    clean, twins = exchanged(world.model, world.to_score)
    last = max(head.layer for head in top)
    if not clean or last == 0:
        return HeadSet([])
    senders = [head for head in world.every() if head.layer < last]
    queries = [f"blocks.{head.layer}.attn.head.{head.head}.hook_q" for head in top]
    metric = log_odds(_first_tokens(world.model, [str(sample.answer) for sample in clean]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be reached.*")
        try:
            result = path_patch(
                world.model, clean, twins, HeadSet(senders), queries, metric, per="sender"
            )
        except CorelensError:  # twins of other token grids
            return HeadSet([])
    effect = np.asarray(result.effect, dtype=float)
    whole = float((np.asarray(result.other) - np.asarray(result.base)).mean())
    error = 1.96 * effect.std(0, ddof=1) / np.sqrt(len(effect))
    carried = effect.mean(0)
    feeding = (carried + error < 0) & (carried <= LEAST_SHARE * whole)
    order = [i for i in np.argsort(carried) if feeding[i]]
    return HeadSet([senders[i] for i in order[: len(top)]])


def log_odds(
    tokens: Sequence[int],
) -> Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]:
    """A metric: log p − log(1 − p) of each sample's token after the prompt; unlike log p it does
    not level off at 1."""

    def metric(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        row = logits[:, -1].float()
        right = torch.tensor(tokens, device=row.device)[:, None]
        rest = row.scatter(1, right, -torch.inf).logsumexp(-1)
        return row.gather(1, right)[:, 0] - rest

    return metric


def exchanged(model: HookedMLLM, samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples, and the same with the question of another one of as many tokens and another
    answer."""
    by_length: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.question is not None and sample.messages is None:
            length = len(model.tokenizer.encode(sample.question, add_special_tokens=False))
            by_length.setdefault(length, []).append(sample)
    clean, twins = [], []
    for group in by_length.values():
        for sample, other in zip(group, group[1:] + group[:1], strict=True):
            if sample.question != other.question and sample.answer != other.answer:
                clean.append(sample)
                twins.append(counterfactual(sample, "text", other=other.question))
    return clean[:PAIRS], twins[:PAIRS]


def _first_tokens(model: HookedMLLM, answers: Sequence[str]) -> list[int]:
    return [int(model.tokenizer.encode(answer, add_special_tokens=False)[0]) for answer in answers]
