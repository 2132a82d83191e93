"""The runner `score_heads`: scores all heads of a model by all metrics, in one process or several,
and resumes a run that was stopped.

All metrics of rows are computed from one forward, without the language-model head and in
O(rows × T) memory a layer. Metrics with a null question add one forward, and metrics that watch the
model write share one generation.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from corelens.data.public import load_data
from corelens.disk.write import file_name
from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.inputs.on_error import OnError, check_on_error, left_out, of_usable, unusable
from corelens.inputs.sample import Sample, as_sample
from corelens.metrics.definition import Metric, check_finite, named
from corelens.metrics.looked_at import LookedAt
from corelens.metrics.null_rows import NullRows
from corelens.metrics.over_samples import head_scores
from corelens.metrics.record import AnyMetric, Record, describe, in_all_layers
from corelens.metrics.registry import metric
from corelens.metrics.sinks import visual_sinks
from corelens.metrics.stream import check_stream, score_stream
from corelens.metrics.value_mass import same_norms
from corelens.runs.folder import Part, in_order, run_folder
from corelens.runs.processes import carry_out, check_folder, is_first
from corelens.runs.provenance import (
    about,
    hook_identity,
    images_and_frames,
    metric_identity,
    model_identity,
    pixels,
    refuse_active,
    sample_hash,
)
from corelens.tokens.regions import no_region

# what the meta of a ranking by rows says of them
NOTE = (
    "heads that look at the evidence may not be needed: cl.where_read(model, samples) measures at "
    "which rows the answer hangs on it"
)
NULL_QUESTION = "N/A"  # of QRHead's calibration, arXiv 2506.09944


def score_heads(
    model: Any,
    samples: Sequence[Sample] | Iterable[Sample] | Sample | str,
    metrics: Iterable[AnyMetric] | AnyMetric = ("ram",),
    batch_size: int = 8,
    out: str | Path | None = None,
    hooks: Sequence[Hook] = (),
    max_new_tokens: int = 16,
    progress: bool = False,
    data: str | None = None,
    on_error: OnError = "raise",
) -> dict[str, HeadScores]:
    """Score every head of a model.

    Args:
        model: a HookedMLLM.
        samples: questions with regions; a world's name ("refer") or a folder stands for what
            `cl.data.load_data` gives. A generator, a streaming data set or any other iterable that
            is no sequence is read once, in constant memory: without `out` only the scores are kept,
            with it `per_sample` is mapped from the disk.
        metrics: names ("ram", "lift" …), `cl.metric("ram", rows="last")`, or your own: f(pattern
            [head, row, key], token_map) → [head], or a `Metric`. By default RAM as published:
            question rows, mean.
        batch_size: samples a forward; samples of similar size share one.
        out: a run folder: results are kept after every batch, and a run that was stopped goes on.
            Processes started by `accelerate launch` or `torchrun` share the work through it.
        hooks: other hooks to run under (an ablation, say); what they change is what is scored.
        max_new_tokens: how far metrics that watch the model write let it write.
        progress: show a progress bar, with rate and time left.
        data: what the samples are called, for the result's meta; a synthetic world's name by
            default.
        on_error: "raise" at a sample that cannot be scored (a region that the processor crops away,
            a picture that is broken), or "skip" it: a warning counts those left out,
            `scores[key].meta["skipped"]` is {id: reason}. Only the samples of a batch in which one
            is wrong are prepared twice.

    Returns:
        {key: HeadScores}; the key is the metric's name with options that differ from the default
        behind it. Scores say where heads look; whether the answer needs what they see there is
        measured by `cl.where_read`, as `meta["note"]` says.

    Raises:
        CorelensError: a sample without what a metric needs; a run folder of another run; attention
            that is not finite.
    """
    wanted = [metrics] if isinstance(metrics, str | Metric) or callable(metrics) else list(metrics)
    resolved = [metric(name) for name in wanted]
    counts = Counter(m.key for m in resolved)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise CorelensError(
            f"two metrics called {twice[0]!r}", "metrics whose names differ", "name each once"
        )
    check_on_error(on_error)
    check_folder(out)
    if not isinstance(samples, Sample | Iterable):
        as_sample(samples)  # raises
    stream = None if isinstance(samples, str | Sample | Sequence) else samples
    questions = _questions(samples) if isinstance(samples, str | Sample | Sequence) else []
    if not resolved or (stream is None and not questions):
        raise CorelensError(
            f"{len(questions)} samples and {len(resolved)} metrics",
            "one of each or more",
            "give questions with regions, for instance cl.synthetic('refer', 200)",
        )
    if stream is not None:
        check_stream(resolved, on_error)
    # {number: error} of the samples that are left out
    wrong = _lacking(questions, resolved, on_error)
    description = about(model)
    identity: dict[str, Any] = {}
    if out is not None:
        refuse_active(model)
        identity = model_identity(model, description) | {
            "metrics": [metric_identity(m) for m in resolved],
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
        }
        identity |= {"hooks": hook_identity(hooks)} if hooks else {}
        del description["date"]  # its files are the same bytes whenever they are made
    w_o = cache(lambda layer: same_norms(model.blocks[layer].attn.W_O))

    def make(batch: Sequence[Sample]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return _score_batch(model, list(batch), resolved, hooks, max_new_tokens, w_o)

    def described(m: Metric) -> dict[str, Any]:
        note = {"note": NOTE} if m.region and not m.needs_answering else {}
        return describe(m) | note | description | {"data": data}

    if stream is not None:

        def window(part: list[Sample]) -> dict[str, np.ndarray]:
            check_samples(part, resolved)
            groups = _batches(part, batch_size)
            return in_order(Part(group, make([part[n] for n in group])) for group in groups).results

        return score_stream(out, identity, stream, resolved, window, described, progress)
    description["sample_hash"] = sample_hash(questions)
    identity |= {"sample_hash": description["sample_hash"], "n": len(questions)}
    check = partial(_check_scores, model, resolved)

    def scored(numbers: list[int]) -> Part:
        batch = [questions[number] for number in numbers]
        raw, of_batch = of_usable(batch, make, check, on_error)
        skipped = {numbers[index]: error for index, error in of_batch.items()}
        return Part([number for number in numbers if number not in skipped], raw or {}, skipped)

    groups = []
    for group in _batches(questions, batch_size):
        usable = [number for number in group if number not in wrong]
        if usable:
            groups.append(usable)
    if out is None:
        whole = in_order(_with_progress(groups, scored, progress))
        return _as_scores(whole, wrong, questions, resolved, described, on_error)
    with run_folder(out, identity) as folder:
        folder.check(groups)
        pieces = [folder.batch(group, partial(scored, group)) for group in groups]
        carry_out(folder.claims, pieces, progress)
        scores = _as_scores(folder.merged(groups), wrong, questions, resolved, described, on_error)
        for key, score in scores.items() if is_first() else ():
            score.save(folder.path / "scores" / f"{file_name(key)}.safetensors")
    return scores


def _lacking(
    samples: Sequence[Sample], metrics: Sequence[Metric], on_error: OnError
) -> dict[int, CorelensError]:
    """{number: error} of the samples that lack what a metric needs; raised unless they are to be
    skipped."""
    if on_error == "skip":
        return unusable(samples, partial(_check_sample_for_all, metrics))
    check_samples(samples, metrics)
    return {}


def _with_progress(
    groups: Sequence[list[int]], scored: Callable[[list[int]], Part], progress: bool
) -> Iterator[Part]:
    """One batch scored after the other, with a progress bar."""
    total = sum(map(len, groups))
    with tqdm(total=total, unit="sample", disable=not progress) as bar:
        for group in groups:
            yield scored(group)
            bar.update(len(group))


def _as_scores(
    whole: Part,
    wrong: dict[int, CorelensError],
    samples: Sequence[Sample],
    metrics: Sequence[Metric],
    described: Callable[[Metric], dict[str, Any]],
    on_error: OnError,
) -> dict[str, HeadScores]:
    """{key: HeadScores} of all samples, with what they were and which were left out."""
    skipped = left_out(samples, wrong | whole.skipped, on_error)
    scored = [samples[number] for number in whole.numbers]
    worlds = {sample.meta.get("world") for sample in scored}
    world = str(worlds.pop()) if len(worlds) == 1 and None not in worlds else None
    meta: dict[str, Any] = {"samples": [sample.id for sample in scored]}
    meta |= {"skipped": skipped} if skipped else {}
    scores = {}
    for m in metrics:
        about_metric = described(m)
        about_metric |= {"data": about_metric["data"] or world}
        scores[m.key] = head_scores(m, whole.results[m.key], about_metric | meta)
    return scores


def _score_batch(
    model: Any,
    samples: list[Sample],
    metrics: list[Metric],
    hooks: Sequence[Hook],
    max_new_tokens: int,
    w_o: Callable[[int], Tensor],
) -> dict[str, np.ndarray]:
    """{key: [sample, part, layer, head]} of one batch."""
    raw: dict[str, np.ndarray] = {}
    of_rows = [m for m in metrics if not m.needs_answering]
    of_null = [m for m in of_rows if m.needs_null]
    of_steps = [m for m in metrics if m.needs_answering]
    if of_rows:
        sinks = None
        if any(m.sinks == "left_out" for m in of_rows):
            sinks = visual_sinks(model, samples, batch_size=len(samples), hooks=hooks).tokens
        null = NullRows(of_null, sinks) if of_null else None
        if null is not None:
            answer = any("answer" in m.rows for m in of_null)
            asked = model.prepare(
                [replace(sample, question=NULL_QUESTION) for sample in samples], answer=answer
            )
            model.run_with_hooks(asked, fwd_hooks=[*hooks, *null.hooks], return_type=None)
        recorded = Record(of_rows, w_o, null, sinks)
        inputs = model.prepare(samples, answer=any("answer" in m.rows for m in of_rows))
        model.run_with_hooks(inputs, fwd_hooks=[*hooks, *recorded.hooks], return_type=None)
        raw |= {m.key: recorded.per_sample(m) for m in of_rows}
    if of_steps:
        raw |= _score_steps(model, samples, of_steps, hooks, max_new_tokens)
    return {m.key: raw[m.key] for m in metrics}


def _check_scores(model: Any, metrics: Sequence[Metric], sample: Sample) -> None:
    """Raise for a sample that these metrics cannot score, without running the model."""
    _check_sample_for_all(metrics, sample)
    token_map = model.prepare(sample, answer=any("answer" in m.rows for m in metrics)).token_maps[0]
    for m in metrics:
        if not m.needs_answering:
            m.row_positions(token_map)


def _questions(samples: Any) -> list[Sample]:
    if isinstance(samples, str):
        return load_data(samples)
    return [samples] if isinstance(samples, Sample) else [as_sample(sample) for sample in samples]


def check_samples(samples: Sequence[Sample], metrics: Sequence[Metric]) -> None:
    """Raise for what a metric needs and a sample lacks, before a model is loaded."""
    for sample in samples:
        _check_sample_for_all(metrics, sample)


def _check_sample_for_all(metrics: Sequence[Metric], sample: Sample) -> None:
    for m in metrics:
        _check_sample(sample, m)


def _check_sample(sample: Sample, metric: Metric) -> None:
    """Raise for what a metric needs and a sample lacks, before anything has run."""
    rows = [name.strip() for name in metric.rows.split("+")]
    lacks = None
    if metric.region and not sample.regions:
        with named(metric):
            raise no_region(sample.id)
    if "question" in rows and sample.question is None and sample.messages is None:
        lacks = (
            "without a question",
            "a sample whose question's rows can be read",
            "Sample(question=…), or rows='last'",
        )
    elif "answer" in rows and sample.answer is None:
        lacks = (
            "without an answer",
            "a sample whose answer's rows can be read",
            "Sample(answer=…), or rows='last'",
        )
    elif metric.needs_answering and not all(region.text for region in sample.regions):
        lacks = (
            "with a region without text",
            "the text that stands in each region",
            'Box(…, text="Total 7")',
        )
    elif (metric.needs_null or metric.sinks == "left_out") and sample.messages is not None:
        lacks = (
            "which is a chat",
            "a question that can be replaced by the null question",
            "images= and question=",
        )
    if lacks:
        raise CorelensError(f"{metric.key}: {sample.label} {lacks[0]}", *lacks[1:])


def _score_steps(
    model: Any,
    samples: list[Sample],
    metrics: list[Metric],
    hooks: Sequence[Hook],
    max_new_tokens: int,
) -> dict[str, np.ndarray]:
    """Metrics of what the model looks at while it writes: one greedy generation for all of them."""
    looked = LookedAt()
    inputs = model.prepare(samples)
    with model.hooks(fwd_hooks=[*hooks, *looked.hooks]):
        written = model.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False).cpu()
    keys, special = looked.keys(), set(model.tokenizer.all_special_ids)
    per_metric: dict[str, list[np.ndarray]] = {m.key: [] for m in metrics}
    for i, (sample, token_map) in enumerate(zip(samples, inputs.token_maps, strict=True)):
        steps = [
            "" if token in special else model.tokenizer.decode([token])
            for token in written[i].tolist()
        ]
        texts = [region.text for region in sample.regions]
        for m in metrics:
            check_finite(torch.where(keys[:, i] < 0, torch.nan, 0.0).sum(-1), m, sample.id)
            layers = []
            for of_layer in keys[:, i, :, : len(steps)]:
                score = m(None, token_map, looked=of_layer, steps=steps, texts=texts)
                layers.append(torch.stack(score if isinstance(score, tuple) else (score,)))
            scored = torch.stack(layers, dim=1).float()
            per_metric[m.key].append(in_all_layers(scored, model.cfg.heads, m, sample.id))
    return {key: np.stack(values) for key, values in per_metric.items()}


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Numbers of samples, those of similar size together: padding is work for nothing."""

    def size(i: int) -> tuple[int, int]:
        return sum(map(pixels, images_and_frames(samples[i]))), i

    order = sorted(range(len(samples)), key=size)
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))
