"""Causal scores of heads: what each head alone is worth for the answer. The ceiling of scores made
of attention."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.progress import Progress

from corelens.errors import CorelensError
from corelens.evaluation.evaluate import batches
from corelens.evaluation.late_runs import LateRuns
from corelens.evaluation.lists import listed
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Sample
from corelens.interventions.attribution import attribution_patch
from corelens.interventions.counterfactuals import counterfactual
from corelens.interventions.knockouts import QUESTION_ON
from corelens.interventions.metrics import answer_logprob
from corelens.model.hooked import HookedMLLM
from corelens.runs.provenance import about

KINDS = ("knockout", "attribution")


def causal_scores(
    model: HookedMLLM,
    samples: Sequence[Sample],
    kind: str = "knockout",
    rows: str = QUESTION_ON,
    columns: str = "region",
    twin: str = "mask",
    steps: int = 0,
    batch_size: int = 32,
    progress: bool = False,
) -> HeadScores:
    """Rank heads by what the gold answer's log-probability loses without each of them alone (nats,
    summed over tokens).

    Args:
        model: a HookedMLLM.
        samples: questions with regions and answers; not those that are tested later.
        kind: "knockout": the edges from `rows` to `columns` are cut in one head, exactly, one run a
            head (begun at its layer). "attribution": what putting in the head's z from a twin
            without the evidence would cost, for all heads at once and to first order (two forwards
            and one backward a batch; see `cl.attribution_patch`).
        rows, columns: of the knockout.
        twin: how the evidence is taken out for "attribution", a kind of `cl.counterfactual` that
            needs no other sample: "mask", "blur" or "noise".
        steps: of integrated gradients for "attribution"; 0: the gradient at the clean run.
        batch_size: samples a forward.
        progress: show a bar.
    Returns:
        HeadScores, clean minus ablated, per sample; positive where the head helps. A model whose
        heads back each other up loses little without any one of them: the ranking then says so, by
        small numbers.
    Raises:
        CorelensError: a sample without a region or an answer; an unknown kind.
    """
    samples = listed(samples, "causal_scores", "every head is one more run of all")
    lacking = [sample.id for sample in samples if not sample.regions or sample.answer is None]
    if kind not in KINDS or lacking or not samples:
        raise CorelensError(
            f"kind={kind!r}"
            if kind not in KINDS
            else f"samples without a region or an answer: {lacking[:5]}",
            f"one of {', '.join(KINDS)}, and questions with regions and answers",
            "give Sample(…, answer=…, regions=[…])",
        )
    if kind == "knockout":
        per_sample = _knockouts(model, samples, rows, columns, batch_size, progress)
        options: dict[str, Any] = {"rows": rows, "columns": columns}
    else:
        per_sample = _attribution(model, samples, twin, steps, batch_size)
        options = {"twin": twin, "steps": steps}
    key = f"causal_{kind}"
    meta = {
        "metric": key,
        "key": key,
        "unit": "nats",
        **options,
        "samples": [sample.id for sample in samples],
    }
    return HeadScores(per_sample=per_sample, meta=about(model) | meta)


def _knockouts(
    model: HookedMLLM,
    samples: list[Sample],
    rows: str,
    columns: str,
    batch_size: int,
    progress: bool,
) -> Float[np.ndarray, "sample layer head"]:
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    runs = LateRuns(model, batches(model, samples, batch_size))
    clean = runs.clean.logprobs
    lost = np.full((len(samples), n_layers, n_heads), np.nan, dtype=np.float32)
    every = [(layer, head) for layer, count in enumerate(model.cfg.heads) for head in range(count)]
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("knocking out", total=len(every))
        for layer, head in every:
            lost[:, layer, head] = (
                clean - runs.evaluate(HeadSet([(layer, head)]), rows, columns).logprobs
            )
            bar.advance(task)
    return lost


def _attribution(
    model: HookedMLLM, samples: list[Sample], twin: str, steps: int, batch_size: int
) -> Float[np.ndarray, "sample layer head"]:
    lost = []
    for start in range(0, len(samples), batch_size):
        clean = samples[start : start + batch_size]
        # (the twin keeps the gold answer, so that both runs have the same tokens)
        twins = [replace(_without_evidence(sample, twin), answer=sample.answer) for sample in clean]
        clean_inputs, twin_inputs = (model.prepare(batch, answer=True) for batch in (clean, twins))
        result = attribution_patch(
            model,
            clean_inputs,
            twin_inputs,
            "z",
            answer_logprob(),
            direction="noising",
            steps=steps,
        )
        lost.append(-result.effect)
    return np.concatenate(lost)


def _without_evidence(sample: Sample, kind: str) -> Sample:
    for number in range(len(sample.regions)):
        sample = counterfactual(sample, kind, region=number)
    return sample
