"""lmms-eval's tasks under hooks, ablations and sparse plans: a CoreLens model as one of its models.

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) reads its data sets, asks, scores and sums
up; only the answers come from here. It is not installed with CoreLens: `pip install lmms-eval`.
Written against lmms-eval 0.7.3: its models are subclasses of `lmms_eval.api.model.lmms`, and its
requests to a "simple" model are (context, generation kwargs, doc_to_visual, doc id, task, split).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from corelens.data.video import by_time, length, middles
from corelens.errors import CorelensError
from corelens.evaluation.decoding import answer_logits, ask
from corelens.evaluation.evaluate import batches
from corelens.evaluation.sparse_run import check_sparse
from corelens.hooks.points import Hook, hook_list
from corelens.inputs.prepare import Sample
from corelens.model.hooked import HookedMLLM

MOST_TOKENS = 1024  # that are written where a task sets no limit
GREEDY = {"num_beams": 1, "do_sample": False, "temperature": 0, "top_p": 1.0}


def lmms_model(
    model: HookedMLLM,
    hooks: Sequence[Hook] | Hook = (),
    sparse: Any = None,
    batch_size: int = 1,
    frames: int = 16,
) -> Any:
    """A model for lmms-eval's own runner: `lmms_eval.evaluator.simple_evaluate(model=…, tasks=…)`.

    Args:
        model: a HookedMLLM.
        hooks: to run under. A task's documents have no regions: cut off "visual" columns.
        sparse: a SparseInference to run under.
        batch_size: questions a batch.
        frames: how many frames of a video are shown, at the middles of equal parts.

    Raises (when it is asked): CorelensError for a document without a picture, with sound, or a task
    that samples or searches with beams: answers are greedy.
    """
    base = _theirs("lmms_eval.api.model", "lmms")
    edits, plan = hook_list(hooks), None if sparse is None else check_sparse(model, sparse)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    class CoreLens(base):  # type: ignore[misc, valid-type]
        """Answers of a hooked model. (It holds no module itself: `clean` deletes those.)"""

        is_simple = True

        def __init__(self) -> None:
            super().__init__()
            self._rank, self._world_size = rank, world
            self.batch_size, self.batch_size_per_gpu = batch_size, batch_size
            self.device = model.device
            if world > 1:
                from accelerate import Accelerator

                self.accelerator = Accelerator()

        @property
        def tokenizer(self) -> Any:
            return model.tokenizer

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            texts: list[str] = []
            for group in _alike([request.args for request in requests], batch_size):
                samples = [
                    _sample(self.task_dict, context, to_visual, number, task, split, frames)
                    for context, _, to_visual, number, task, split, *_ in group
                ]
                written = _written(model, samples, group[0][1], edits, plan)
                for arguments, text in zip(group, written, strict=True):
                    self.cache_hook.add_partial("generate_until", arguments[:2], text)
                texts += written
            return texts

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            results = []
            for request in requests:
                context, target, to_visual, number, task, split = request.args[:6]
                sample = _sample(self.task_dict, context, to_visual, number, task, split, frames)
                if callable(target):
                    target = target(self.task_dict[task][split][number])
                sample.answer = str(target)
                results.append(_likelihood(model, sample, edits, plan))
            return results

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise CorelensError(
                "a task of several rounds",
                "a task of one question and one answer (generate_until, loglikelihood)",
                "take another task",
            )

    return CoreLens()


def run_tasks(
    model: HookedMLLM,
    tasks: Sequence[str | dict[str, Any] | Any],
    hooks: Sequence[Hook] | Hook = (),
    sparse: Any = None,
    batch_size: int = 1,
    frames: int = 16,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What lmms-eval's own runner returns for these tasks: `["results"][task]` holds its scores.

    Args:
        model, hooks, sparse, batch_size, frames: as in `lmms_model`.
        tasks: names of lmms-eval's tasks, or their configs.
        limit: documents a task; all by default.
        options: handed on to `lmms_eval.evaluator.simple_evaluate` (a task_manager with tasks of
            your own, say).
    """
    run = _theirs("lmms_eval.evaluator", "simple_evaluate")
    held = lmms_model(model, hooks, sparse, batch_size, frames)
    return run(model=held, tasks=list(tasks), batch_size=batch_size, limit=limit, **options)


def check_installed() -> None:
    """Raise a CorelensError that says what to install if lmms-eval is not there."""
    _theirs("lmms_eval.evaluator", "simple_evaluate")


def _theirs(module: str, name: str) -> Any:
    """A part of lmms-eval."""
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise CorelensError(
            f"lmms-eval's tasks, and {error.name or 'lmms_eval'!r} is not installed",
            "lmms-eval beside CoreLens",
            "pip install lmms-eval",
        ) from error


def _alike(requests: Sequence[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    """The requests in their order, as batches of the same generation options."""
    batch: list[tuple[Any, ...]] = []
    for arguments in requests:
        if batch and (len(batch) == size or arguments[1] != batch[0][1]):
            yield batch
            batch = []
        batch.append(arguments)
    if batch:
        yield batch


def _sample(
    documents: Any, context: str, to_visual: Any, number: Any, task: str, split: str, frames: int
) -> Sample:
    """One document as a Sample: its pictures or video first, then the whole text as its
    question."""
    name = f"{task}, {split} {number}"
    shown = to_visual(documents[task][split][number]) if callable(to_visual) else None
    shown = [] if shown is None else list(shown) if isinstance(shown, list | tuple) else [shown]
    if not shown:
        raise CorelensError(
            f"{name}: a document without a picture",
            "a picture or a video: hooks on what a model sees have nothing to work on",
            "take a task with pictures, or run this one with lmms-eval's own model",
        )
    images = [picture.convert("RGB") for picture in shown if isinstance(picture, Image.Image)]
    videos = [Path(path) for path in shown if isinstance(path, str | os.PathLike)]
    if len(images) + len(videos) < len(shown) or len(videos) > 1 or (images and videos):
        kinds = sorted({type(part).__name__ for part in shown})
        raise CorelensError(
            f"{name}: {len(shown)} parts to show, of the types {', '.join(kinds)}",
            "pictures (PIL), or the path of one video",
            "take another task: sound, and several videos, are not read",
        )
    # (a document may be asked several times, in several tasks)
    asked: dict[str, Any] = {"question": context.strip(), "id": name}
    if not videos:
        return Sample(images=images, **asked)
    seconds = length(videos[0])
    shown_frames = by_time(videos[0], middles(frames, 0, seconds))
    return Sample(video=shown_frames, meta={"fps": frames / seconds}, **asked)


@torch.no_grad()
def _written(
    model: HookedMLLM,
    samples: list[Sample],
    options: dict[str, Any],
    hooks: Sequence[Hook],
    sparse: Any,
) -> list[str]:
    """What the model writes, greedily, up to a task's own ends."""
    options = dict(options)
    ends = options.pop("until", None) or []
    most = int(options.pop("max_new_tokens", MOST_TOKENS))
    other = {
        name: options[name]
        for name, value in GREEDY.items()
        if options.get(name) not in (None, value)
    }
    if set(other) - {"top_p"}:  # (which decides nothing without sampling)
        raise CorelensError(
            f"{samples[0].id}: a task that generates with {other}",
            "greedy decoding: answers under hooks are compared one to one",
            'set it: gen_kwargs="do_sample=False,temperature=0,num_beams=1"',
        )
    with (
        model.sparse(sparse) if sparse is not None else nullcontext(),
        model.hooks(fwd_hooks=list(hooks)),
    ):
        written = model.generate(model.prepare(samples), max_new_tokens=most, do_sample=False)
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    for end in [ends] if isinstance(ends, str) else ends:
        texts = [text.split(end)[0] if end.strip() else text for text in texts]
    return [text.strip() for text in texts]


@torch.no_grad()
def _likelihood(
    model: HookedMLLM, sample: Sample, hooks: Sequence[Hook], sparse: Any
) -> tuple[float, bool]:
    """(log-probability of the answer's tokens, whether each is the most likely one)."""
    (asked,) = ask(model, batches(model, [sample], 1))
    rows = answer_logits(model, asked, hooks, sparse)[0][:-1].log_softmax(-1)
    gold = asked.gold[0]
    logprob = float(rows.gather(1, gold[:, None]).sum())
    return logprob, bool(np.array_equal(rows.argmax(-1), gold))
