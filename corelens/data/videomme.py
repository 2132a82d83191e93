"""Video-MME from your own copy: 2,700 multiple-choice questions about 900 videos, scored by the
letter (arXiv 2405.21075).

    videomme/test-00000-of-00001.parquet    or test-00000-of-00001.parquet beside `data`
    data/<videoID>.mp4                      or .MP4, .mkv: the videos_chunked_*.zip, unpacked

as https://huggingface.co/datasets/lmms-lab/Video-MME publishes it. Columns: video_id, duration
("short", "medium", "long"), domain, sub_category, url, videoID, question_id, task_type, question,
options (["A. …", …]), answer ("C"). Frames are taken at the middles of equal parts of the video,
whose length is read from the file; without subtitles. Nothing says where in a video the answer
stands: no sample has a region. Not verified: the parquet file itself.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corelens.data.files import has, keep_readable, package, take, there
from corelens.data.video import by_time, length, middles
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample

FILES = ("videomme/test-00000-of-00001.parquet", "test-00000-of-00001.parquet")
COLUMNS = (
    *("video_id", "duration", "domain", "sub_category", "videoID"),
    *("question_id", "task_type", "question", "options", "answer"),
)
DURATIONS = ("short", "medium", "long")
ENDINGS = ("mp4", "MP4", "mkv")


def videomme(
    root: str | Path,
    duration: str | None = None,
    n: int | None = None,
    seed: int | None = None,
    frames: int = 16,
) -> list[Sample]:
    """One sample for each question, its frames decoded when a model reads it.

    Args:
        root: the folder that holds the parquet file and `data`.
        duration: "short" (up to 2 minutes), "medium" (4 to 15) or "long" (30 to 60); all by
            default.
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        frames: how many frames, at the middles of equal parts of the video.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            videos are missing.
    """
    return keep_readable(take(stream(root, duration, frames), n, seed), "Video-MME")


def stream(root: str | Path, duration: str | None = None, frames: int = 16) -> Iterator[Sample]:
    """The samples, one after the other; of a video only its length is read."""
    if (duration is not None and duration not in DURATIONS) or frames < 1:
        raise CorelensError(
            f"duration {duration!r}, {frames} frames",
            f"one of {', '.join(DURATIONS)}, or none for all",
            "choose one of these",
        )
    file = there(root, *FILES, what="Video-MME's questions")
    folder = there(root, "data", what="Video-MME's videos")
    for record in _records(file):
        if duration is None or record["duration"] == duration:
            yield _sample(record, folder, frames)


def _sample(record: dict[str, Any], folder: Path, frames: int) -> Sample:
    names = [folder / f"{record['videoID']}.{ending}" for ending in ENDINGS]
    video = next((name for name in names if name.exists()), names[0])
    seconds = length(video) if video.exists() else float(frames)
    return Sample(
        video=by_time(video, middles(frames, 0, seconds)),
        question=record["question"],
        answer=record["answer"],
        # (CoreLens writes the letters itself)
        choices=[re.sub(r"^[A-Z][.)]\s*", "", option) for option in record["options"]],
        id=f"videomme-{record['question_id']}",
        meta={
            "set": "videomme", "scoring": "multiple_choice", "fps": frames / seconds,
            "duration": record["duration"], "domain": record["domain"], "task": record["task_type"],
        },
    )  # fmt: skip


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of the parquet file."""
    parquet = package(
        "pyarrow", f"{file}, a parquet file", lambda: __import__("pyarrow.parquet").parquet
    )
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others
        raise CorelensError(
            f"{file}, which cannot be opened ({error})", "a whole parquet file", "get it again"
        ) from error
    with table:
        missing = [name for name in COLUMNS if name not in table.schema_arrow.names]
        if missing:
            raise CorelensError(
                f"{file}, without the columns {', '.join(missing)}; it has "
                f"{', '.join(table.schema_arrow.names)}",
                "the published columns",
                "get the set from its publisher; see docs/data.md",
            )
        for batch in table.iter_batches(batch_size=64, columns=list(COLUMNS)):
            yield from batch.to_pylist()


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of Video-MME, or the beginning of one."""
    return has(root, *FILES)


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The three durations: the options of `stream`."""
    return {name: {"duration": name} for name in DURATIONS} if recognised(root) else {}
