"""VidSTG from your own copy: questions about one object of a video, with its box in every frame (a
tube).

    annotations/val_annotations.json …             VidSTG's sentences: train_, val_, test_
    vidor/training/0000/2401075277.json …          VidOR's boxes; vidor/validation for VidSTG's test
                                                   split
    video/0000/2401075277.mp4 …                    VidOR's videos, by the annotation's video_path

as https://github.com/Guaranteer/VidSTG-Dataset publishes the first (README, annotations/) and
https://xdshang.github.io/docs/vidor.html the others (format as
https://github.com/xdshang/VidVRD-helper and https://github.com/antoyang/TubeDETR read it:
trajectories[frame] is a list of {tid, bbox: {xmin, ymin, xmax, ymax}}). VidSTG's train and val are
cut from VidOR's training videos, its test is VidOR's validation. The names of the two VidOR folders
are those of its archives as these projects unpack them; "annotation" instead of "vidor", and either
folder at the root, are found too.

Frames: `frames` of them, at the middles of equal parts of the annotated segment (`used_segment`,
its end exclusive, as TubeDETR reads it). Where none of them falls into the time of the relation
(`temporal_gt`), the nearest one is moved to its middle. The tube holds the target's boxes in the
frames of that time, `Tube({i: …})` with i counted in the frames.

The question is VidSTG's own ("who is watching the ball?"), or its statement after "Which object
does this sentence describe?"; the answer, which VidSTG does not define (it asks for the tube,
measured by vIoU), is the category of the target ("ball/sports_ball": either name counts), scored by
exact match. What arXiv 2606.05843 asked is not known to us.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from corelens.data.files import LAYOUT, fields, has, keep_readable, read_json, take, there
from corelens.data.video import by_number, middles
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box, Tube

STATEMENT = "Which object does this sentence describe? {sentence}"
VIDOR = {"train": "training", "val": "training", "test": "validation"}
Tracks = dict[int, np.ndarray]  # [frame, x0 y0 x1 y1] by target
FORMS = {"questions": "{sentence}", "captions": STATEMENT}


def vidstg(
    root: str | Path,
    split: str = "val",
    n: int | None = None,
    seed: int | None = None,
    form: Literal["questions", "captions"] = "questions",
    frames: int = 16,
) -> list[Sample]:
    """One sample for each question (or statement) about an object of a video, decoded when a model
    reads it.

    Args:
        root: the folder that holds `annotations`, `vidor` and `video`.
        split: "train", "val" or "test".
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.
        form: interrogative sentences ("questions") or declarative ones ("captions").
        frames: how many frames of the segment.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            videos are missing.
    """
    return keep_readable(take(stream(root, split, form, frames), n, seed), f"VidSTG {split}")


def stream(
    root: str | Path, split: str, form: str = "questions", frames: int = 16
) -> Iterator[Sample]:
    """The samples of one split, one after the other, videos unseen."""
    if split not in VIDOR or form not in FORMS or frames < 1:
        raise CorelensError(
            f"split {split!r}, form {form!r}, {frames} frames",
            f"a split of {', '.join(VIDOR)}, a form of {', '.join(FORMS)} and one frame or more",
            "choose these",
        )
    name = f"{split}_annotations.json"
    file = there(root, f"annotations/{name}", name, what=f"VidSTG's sentences of {split}")
    part = VIDOR[split]
    boxes = there(
        root, f"vidor/{part}", f"annotation/{part}", part, what=f"VidOR's annotations of {part}"
    )
    videos = there(root, "video", "videos", "vidor/video", what="VidOR's videos")
    paths = {path.stem: path for path in boxes.glob("*/*.json")}
    records = read_json(file)
    targets: dict[str, set[int]] = {}
    for record in records:
        vid, sentences, _, _ = fields(
            record, "vid", form, "used_segment", "temporal_gt", where=file
        )
        targets.setdefault(vid, set()).update(sentence["target_id"] for sentence in sentences)
    # a video's sentences are scattered over the file: it is read once
    tracks: dict[str, tuple[str, Tracks]] = {}
    number = 0
    for record in records:
        vid = record["vid"]
        if vid not in paths:
            raise CorelensError(
                f"{boxes}, without VidOR's boxes of video {vid}", f"*/{vid}.json", LAYOUT
            )
        for sentence in record[form]:
            if vid not in tracks:
                tracks[vid] = _tracks(paths[vid], targets[vid])
            path, track = tracks[vid]
            name = f"vidstg-{split}-{form}-{number}"
            yield _sample(
                record, sentence, videos / path, track[sentence["target_id"]], name, form, frames
            )
            number += 1


def _tracks(file: Path, targets: set[int]) -> tuple[str, Tracks]:
    """The video's path, and {target: its box in every frame}, not a number where it has none."""
    path, trajectories = fields(read_json(file), "video_path", "trajectories", where=file)
    tracks = {
        target: np.full((len(trajectories), 4), np.nan, dtype=np.float32) for target in targets
    }
    for number, frame in enumerate(trajectories):
        for box in frame:
            if box["tid"] in tracks:
                tracks[box["tid"]][number] = [
                    box["bbox"][name] for name in ("xmin", "ymin", "xmax", "ymax")
                ]
    return path, tracks


def _sample(
    record: dict[str, Any],
    sentence: dict[str, Any],
    video: Path,
    track: np.ndarray,
    name: str,
    form: str,
    count: int,
) -> Sample:
    segment, truth = record["used_segment"], record["temporal_gt"]
    numbers = _frames(segment, truth, count)
    target, size = sentence["target_id"], (record["width"], record["height"])
    tube = {}
    for i, number in enumerate(numbers):
        if truth["begin_fid"] <= number < min(truth["end_fid"], len(track)):
            box = _box(track[number].tolist(), size)
            if box is not None:
                tube[i] = box
    category = next((x["category"] for x in record["subject/objects"] if x["tid"] == target), "")
    names = [word.replace("_", " ") for word in category.split("/")]
    seconds = (segment["end_fid"] - segment["begin_fid"]) / record["fps"]
    return Sample(
        video=by_number(video, numbers, size),
        question=FORMS[form].format(sentence=sentence["description"]),
        answer=names[0],
        regions=[Tube(tube)] if tube else [],
        id=name,
        meta={
            "set": "vidstg", "scoring": "exact_match", "answers": names, "kind": sentence["type"],
            "fps": len(numbers) / seconds, "frames": numbers,
        },
    )  # fmt: skip


def _frames(segment: dict[str, int], truth: dict[str, int], count: int) -> list[int]:
    """Evenly spread over the segment, at least one of them within the truth."""
    start, stop = segment["begin_fid"], max(segment["end_fid"], segment["begin_fid"] + 1)
    numbers = sorted({int(x) for x in middles(min(count, stop - start), start, stop)})
    if not any(truth["begin_fid"] <= number < truth["end_fid"] for number in numbers):
        middle = (truth["begin_fid"] + truth["end_fid"]) // 2
        nearest = min(range(len(numbers)), key=lambda i: abs(numbers[i] - middle))
        numbers[nearest] = middle
    return numbers


def _box(corners: list[float], size: tuple[int, int]) -> Box | None:
    """A VidOR box inside its frame; None if there is none, or nothing is left of it."""
    x0, y0, x1, y1 = (
        max(corners[0], 0.0),
        max(corners[1], 0.0),
        min(corners[2], size[0]),
        min(corners[3], size[1]),
    )
    return Box(x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of VidSTG, or the beginning of one."""
    return has(
        root,
        *(
            f"{folder}{split}_annotations.json"
            for split in VIDOR
            for folder in ("annotations/", "")
        ),
    )


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The splits whose sentences are there, by name: the options of `stream`."""
    names = {
        split: (f"annotations/{split}_annotations.json", f"{split}_annotations.json")
        for split in VIDOR
    }
    return {split: {"split": split} for split in VIDOR if has(root, *names[split])}
