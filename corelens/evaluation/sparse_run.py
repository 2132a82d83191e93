"""One set of samples answered densely and sparsely, and both timed: what `evaluate(sparse=…)`
returns."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.evaluation.answers import Answer, Evaluation, named, paired
from corelens.evaluation.decoding import Asked, ask, decoded
from corelens.evaluation.own_scoring import has_rule, rule_scores
from corelens.evaluation.sparse_account import described, left_pairs, remarks
from corelens.evaluation.speed_report import Side, SpeedReport
from corelens.evaluation.timing import Timed, evenly_spaced, time_in_turns
from corelens.heads.intervals import accuracy_interval, mean_interval
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs
from corelens.model.hooked import HookedMLLM
from corelens.runs.provenance import about, machine
from corelens.sparse.inference import SparseInference
from corelens.sparse.patterns import at_least

TIMED = 4  # samples that are timed, each by itself


def check_sparse(model: HookedMLLM, sparse: Any) -> SparseInference:
    """This plan, or an error if it is none or names heads of another model."""
    if not isinstance(sparse, SparseInference):
        raise CorelensError(
            f"sparse={type(sparse).__name__}",
            "a cl.SparseInference",
            "say in one which heads are full",
        )
    sparse.plan(model.cfg)
    return sparse


def check_scores(scores: HeadScores, cfg: Any) -> HeadScores:
    """These scores, or an error if they are of a model of another shape."""
    if scores.values.shape != (cfg.n_layers, cfg.n_heads):
        raise CorelensError(
            f"scores of {scores.values.shape[0]} layers × {scores.values.shape[1]} heads: of "
            "another model",
            f"scores of this one, {cfg.n_layers} layers × {cfg.n_heads} heads",
            "score the heads of the model that runs",
        )
    return scores


def answered_under(
    model: HookedMLLM,
    asked: Sequence[Asked],
    sparse: SparseInference | None = None,
    hooks: Sequence[Hook] = (),
) -> Evaluation:
    """The answers alone, nothing timed; None answers densely, by the same steps."""
    answers: list[Answer] = []
    for batch in asked:
        read = [answer for answer, _ in decoded(model, [batch], hooks, sparse)]
        answers += (
            rule_scores(model, batch, read, hooks, sparse)
            if has_rule(batch.inputs.samples)
            else read
        )
    return _evaluation(answers, asked)


def compare(
    model: HookedMLLM,
    prepared: Sequence[Inputs],
    sparse: Any,
    hooks: Sequence[Hook] = (),
    rounds: int = 5,
) -> Evaluation:
    """The answers under sparse inference, with a SpeedReport against the dense run under the same
    hooks.

    Args:
        prepared: what `batches` made.
        rounds: how often each of four samples is timed under both; 0 times nothing and makes no
            report.
    """
    sparse = check_sparse(model, sparse)
    at_least("rounds", rounds, 0, "0 times nothing")
    asked = ask(model, prepared)
    sparse.ran.clear()
    if not rounds:
        return answered_under(model, asked, sparse, hooks)
    pairs = list(
        zip(decoded(model, asked, hooks), decoded(model, asked, hooks, sparse), strict=True)
    )
    dense = _evaluation([a for (a, _), _ in pairs], asked)
    under = _evaluation([b for _, (b, _) in pairs], asked)
    if has_rule([sample for batch in asked for sample in batch.inputs.samples]):
        dense = answered_under(model, asked, None, hooks)
        under = answered_under(model, asked, sparse, hooks)
    kl = np.array([float(_kl(p, q).mean()) for (_, p), (_, q) in pairs])
    same = np.array([float(a.given == b.given) for (a, _), (b, _) in pairs])
    under.meta["sparse"] = described(sparse)

    samples = [sample for batch in asked for sample in batch.inputs.samples]
    timed = time_in_turns(model, evenly_spaced(samples, TIMED), sparse, hooks, rounds)
    maps = [prompt.token_maps[0] for prompt in timed[2]]
    tokens = {"prompt": [len(tm.all) for tm in maps], "visual": [len(tm.visual) for tm in maps]}
    notes = remarks(sparse, model.cfg, [batch.inputs for batch in asked])
    if sparse.kv_budget is not None and all(
        len(gold) == 1 for batch in asked for gold in batch.gold
    ):
        notes.append(
            "Every answer is one token, which the prefill predicts before anything is evicted: "
            "accuracy cannot show "
            "what this KV budget costs. Ask for longer answers."
        )
    for note in notes:
        if note.startswith("The last"):
            warnings.warn(note, stacklevel=3)
    under.speed = SpeedReport(
        _side(timed[0], dense),
        _side(timed[1], under),
        paired(under, dense),
        accuracy_interval(same),
        mean_interval(kl),
        left_pairs(sparse, model.cfg, tokens["prompt"]),
        tokens,
        len(samples),
        ", ".join(sorted(sparse.ran)) or "none: the prefill is dense",
        described(sparse),
        notes,
        about(model) | {"machine": machine(model), "rounds": rounds, "hooks": len(hooks)},
    )
    return under


def _kl(p: Float[Tensor, "row d_vocab"], q: Float[Tensor, "row d_vocab"]) -> Float[Tensor, " row"]:
    """KL(p ‖ q) of log-probabilities, in nats; a token that p rules out adds nothing."""
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


def _evaluation(answers: list[Answer], asked: Sequence[Asked]) -> Evaluation:
    return Evaluation(
        named(answers, [sample for batch in asked for sample in batch.inputs.samples])
    )


def _side(timed: Timed, answers: Evaluation) -> Side:
    return Side(
        timed.seconds, timed.peak_bytes, timed.kv_bytes, answers.interval, answers.answer_logprob
    )
