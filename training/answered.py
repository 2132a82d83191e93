"""A sheet of a bundled model's answers, wrong ones first, to be looked at.

`python -m training.answered qwen3vl-s docs/images` draws one of every world on its card: of its
test scenes, at the last (hardest) options there.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from corelens.data.synthetic import synthetic
from corelens.data.synthetic.sheet import contact_sheet
from corelens.demo import checkpoint, read_card
from corelens.inputs.prepare import Sample
from training.heldout import answers
from training.recipes import tuples


def answer_sheet(
    samples: Sequence[Sample], answered: Sequence[str], shown: int = 12, **sheet: int
) -> Image.Image:
    """One picture of up to half as many wrong answers as `shown`, and right ones after them.

    Args:
        answered: what the model answered to each sample.
        shown: samples on the sheet.
        sheet: as in `contact_sheet`.
    """
    pairs = list(zip(samples, answered, strict=True))
    wrong = [replace(s, answer=f"{s.answer}, said: {a}") for s, a in pairs if a != s.answer][
        : shown // 2
    ]
    right = [replace(s, answer=f"{s.answer}, right") for s, a in pairs if a == s.answer]
    return contact_sheet((wrong + right)[:shown], **sheet)


def save_answers(name: str, folder: str | Path, n: int = 200) -> list[Path]:
    """Draw the sheet of `n` test scenes of every world of a bundled model into `folder`, as PNG of
    256 colours."""
    place, files = checkpoint(name), []
    model: Any = AutoModelForImageTextToText.from_pretrained(
        place, dtype="float32", local_files_only=True
    ).eval()
    processor = AutoProcessor.from_pretrained(place, local_files_only=True)
    rows = [row for row in read_card(name)["held_out"] if row["split"] == "test"]
    for world, row in {row["world"]: row for row in rows}.items():
        samples = synthetic(world, n, seed=row["seed"], **tuples(row.get("options", {})))
        answered = answers(model, processor, samples)
        size = {"columns": 4, "height": 220}
        if world == "doc":
            size = {"columns": 2, "height": 220, "shown": 8}
        elif world == "video":
            size = {"columns": 1, "height": 150, "shown": 6}
        elif samples[0].images[0].width > 512:
            size = {"columns": 3, "height": 360, "shown": 6}
        file = Path(folder) / f"answers-{name}-{world}.png"
        answer_sheet(samples, answered, **size).quantize(256, dither=Image.Dither.NONE).save(
            file, optimize=True
        )
        files.append(file)
    return files


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m training.answered NAME FOLDER")
    for path in save_answers(sys.argv[1], sys.argv[2]):
        print(path)
