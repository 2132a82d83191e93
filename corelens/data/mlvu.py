"""MLVU (the dev set) from your own copy: multiple-choice questions about long videos, scored by the
letter.

    json/1_plotQA.json …                           one file a task: video, duration, question,
                                                   candidates, answer
    video/1_plotQA/movie101_66.mp4 …               or video/plotQA/…

as https://github.com/JUNJIE99/MLVU publishes it (data/*.json;
evaluation/multiple_choice_evaluation/choice_bench.py) and the videos of
https://huggingface.co/datasets/MLVU/MVLU are laid out (folders named after the JSON files; the
benchmark's script leaves the number out). Nothing says where in a video the answer stands: no
sample has a region.

The two generation tasks (8_sub_scene, 9_summary) are judged by GPT-4, so they have no score here.
Where the gold answer is not among the candidates (two questions of 2_needle, which the benchmark
counts as wrong whatever is chosen), the sample is left out. The options are written as CoreLens
writes them ("A. …"), not as the benchmark's prompt does ("(A) …"); the gold answer is the letter.
The test set (six options, question_id) is not read: its published layout could not be verified.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from corelens.data.files import fields, has, keep_readable, read_json, take, there
from corelens.data.video import by_time, middles
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample

CHOICE = (
    *("1_plotQA", "2_needle", "3_ego", "4_count"),
    *("5_order", "6_anomaly_reco", "7_topic_reasoning"),
)
TASKS = (*CHOICE, "8_sub_scene", "9_summary")
FOLDERS = ("json", "data", "upload_json", ".")


def mlvu(
    root: str | Path,
    task: str | None = None,
    n: int | None = None,
    seed: int | None = None,
    frames: int = 16,
) -> list[Sample]:
    """One sample for each question, its frames decoded when a model reads it.

    Args:
        root: the folder that holds `json` and `video`.
        task: one of `TASKS`, for instance "1_plotQA"; by default all multiple-choice tasks whose
            file is there.
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        frames: how many frames, at the middles of equal parts of the video.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            videos are missing.
    """
    tasks = (
        [task]
        if task
        else [name for name in CHOICE if has(Path(root), *_files(name))] or list(CHOICE)
    )
    samples = (sample for name in tasks for sample in stream(root, name, frames))
    return keep_readable(take(samples, n, seed), f"MLVU {task or 'multiple choice'}")


def stream(root: str | Path, task: str, frames: int = 16) -> Iterator[Sample]:
    """The samples of one task, one after the other, videos unseen."""
    if task not in TASKS or frames < 1:
        raise CorelensError(
            f"task {task!r}, {frames} frames", f"one of {', '.join(TASKS)}", "choose one of these"
        )
    file = there(root, *_files(task), what=f"MLVU's questions of {task}")
    folder = there(
        root, f"video/{task}", f"video/{task.split('_', 1)[1]}", what=f"MLVU's videos of {task}"
    )
    left_out = 0
    for number, record in enumerate(read_json(file)):
        name, question, answer, duration = fields(
            record, "video", "question", "answer", "duration", where=file
        )
        choices = record.get("candidates")
        if choices is not None and answer not in choices:
            left_out += 1
            continue
        meta = {"set": "mlvu", "task": task, "fps": frames / duration}
        meta["scoring"] = "gpt-4" if choices is None else "multiple_choice"
        yield Sample(
            video=by_time(folder / name, middles(frames, 0, duration)),
            question=question,
            answer=answer if choices is None else ascii_uppercase[choices.index(answer)],
            choices=choices,
            id=f"mlvu-{task}-{number}",
            meta=meta,
        )
    if left_out:
        reason = "left out: the gold answer is not among the candidates"
        warnings.warn(f"MLVU {task}: {left_out} questions {reason}", stacklevel=2)


def _files(task: str) -> list[str]:
    return [f"{folder}/{task}.json" for folder in FOLDERS]


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of MLVU, or the beginning of one."""
    return has(root, *(name for task in TASKS for name in _files(task)))


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The tasks whose questions are there, by name: the options of `stream`."""
    return {task: {"task": task} for task in TASKS if has(root, *_files(task))}
