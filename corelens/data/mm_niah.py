"""MM-NIAH from your own copy: needles, in text or in pictures, in documents of 1,000 to 72,000
tokens (arXiv 2406.07230).

    mm_niah_val/annotations/retrieval-text.jsonl …   one file a task
    mm_niah_val/images/…                             or mm_niah_test

as https://huggingface.co/datasets/OpenGVLab/MM-NIAH publishes it; fields and prompts as
https://github.com/OpenGVLab/MM-NIAH has them (README, utils/tools.py). A record has id,
images_list, context and question (`<image>` where a picture stands), answer, and meta:
placed_depth, context_length, num_images, needles, choices, choices_image_path.

A region is a whole picture of the document, where `meta.needles` names it (image needles); text
needles have none. Scores: the letter of a choice (`multiple_choice`); the gold answer as a word of
the text (`mm_niah_word`); the share of list places that agree (`mm_niah_list`). Not verified: the
records themselves, and whether an image needle's path is always one of images_list.
"""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image

from corelens.data.files import (
    IMAGE,
    fields,
    has,
    keep_readable,
    read_lines,
    take,
    text_and_images,
    there,
)
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

TASKS = tuple(
    f"{kind}-{needle}"
    for kind in ("retrieval", "counting", "reasoning")
    for needle in ("text", "image")
)
LETTER = "\nAnswer with the option's letter from the given choices directly."
PHRASE = "\nAnswer the question using a single word or phrase."


def mm_niah(
    root: str | Path,
    task: str = "retrieval-image",
    split: str = "val",
    longest: int | None = None,
    n: int | None = None,
    seed: int | None = None,
) -> list[Sample]:
    """One sample for each question of a task.

    Args:
        root: the folder that holds `mm_niah_val` (or `mm_niah_test`).
        task: one of `TASKS`.
        split: "val" or "test" (the test answers are not published).
        longest: leave out documents of more tokens than this, by the set's own count.
        n: how many; all by default.
        seed: draw the n at random instead of taking the first.

    Raises:
        CorelensError: a file is missing (said which and where) or of another format; 1% of the
            pictures are broken.
    """
    return keep_readable(take(stream(root, task, split, longest), n, seed), f"MM-NIAH {task}")


def stream(
    root: str | Path, task: str = "retrieval-image", split: str = "val", longest: int | None = None
) -> Iterator[Sample]:
    """The samples of one task, one after the other; only the sizes of needle pictures are read."""
    if task not in TASKS:
        raise CorelensError(f"task {task!r}", f"one of {', '.join(TASKS)}", "choose one of these")
    file = there(root, _file(task, split), what=f"MM-NIAH's {task} of its {split} set")
    folder = there(root, f"mm_niah_{split}/images", what="MM-NIAH's pictures")
    for record in read_lines(file):
        number, meta = fields(record, "id", "meta", where=file)
        (length,) = fields(meta, "context_length", where=f"{file}, meta")
        if longest is None or length <= longest:
            yield _sample(f"mm_niah-{task}-{number}", record, folder, file, task)


def _sample(name: str, record: dict[str, Any], folder: Path, file: Path, task: str) -> Sample:
    context, asked, answer, images, meta = fields(
        record, "context", "question", "answer", "images_list", "meta", where=file
    )
    choices, pictured = meta.get("choices"), meta.get("choices_image_path")
    options, images = choices or [IMAGE] * len(pictured or []), [*images, *(pictured or [])]
    question = asked + "".join(
        f"\n{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)
    )
    pieces = [
        *text_and_images(context),
        *text_and_images("\n" + question + (LETTER if options else PHRASE)),
    ]
    if pieces.count(IMAGE) != len(images):
        raise CorelensError(
            f"{name}: {pieces.count(IMAGE)} places for pictures and {len(images)} pictures",
            "as many",
            "get the file again",
        )
    needles, regions = set(meta.get("needles") or []), []
    for number, image in enumerate(record["images_list"]):
        if image in needles:
            try:
                with Image.open(folder / image) as picture:
                    regions.append(Box(0, 0, *picture.size, image=number))
            except OSError:
                continue  # counted as broken, and its sample left out, by keep_readable
    scoring = "multiple_choice" if options else "mm_niah_word"
    if isinstance(answer, list):
        scoring, answer = "mm_niah_list", str(answer)
    return Sample(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece}
                    for piece in pieces
                ],
            }
        ],
        images=[str(folder / image) for image in images],
        # (of a question with pictures among its options, the words before the first)
        question=next(piece for piece in text_and_images(asked) if piece != IMAGE).strip(),
        answer=ascii_uppercase[answer] if isinstance(answer, int) else answer,
        regions=list(regions),
        id=name,
        meta={
            "set": "mm_niah", "task": task, "scoring": scoring,
            "length": meta["context_length"], "depth": meta.get("placed_depth"),
        },
    )  # fmt: skip


def _file(task: str, split: str) -> str:
    return f"mm_niah_{split}/annotations/{task}.jsonl"


def recognised(root: Path) -> bool:
    """Whether the folder is a copy of MM-NIAH, or the beginning of one."""
    return has(root, "mm_niah_val", "mm_niah_test")


def parts(root: Path) -> dict[str, dict[str, Any]]:
    """The tasks whose questions are there, by name: the options of `stream`."""
    return {
        f"{task} {split}": {"task": task, "split": split}
        for split in ("val", "test")
        for task in TASKS
        if has(root, _file(task, split))
    }
