"""Contact sheets: samples side by side, regions outlined, question and answer below.

`python -m corelens.data.synthetic.sheet docs/images` draws one of every synthetic world.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from corelens.data.synthetic import synthetic, worlds
from corelens.data.synthetic.fonts import font
from corelens.errors import CorelensError
from corelens.inputs.pictures import read_picture, read_video
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box, Mask, Shape, Tube

PAPER, INK, SOFT = (255, 255, 255), (34, 38, 43), (107, 113, 119)
OUTLINE, HALO = (224, 0, 122), (255, 255, 255)
_GAP, _TEXT, _SMALL = 8, 15, 11  # pixels
# on a sheet of few samples: of several pictures each, or photographs
_COLUMNS = {"doc": 2, "video": 1, "emoji": 3}


def contact_sheet(samples: Sequence[Sample], columns: int = 4, height: int = 220) -> Image.Image:
    """One picture of many samples: each one's images or frames in a row, regions outlined, question
    and answer below.

    Args:
        columns: samples a row.
        height: of each picture on the sheet, in pixels; pictures keep their form.

    Raises:
        CorelensError: for no samples, fewer than one column, or pictures that cannot be read.
    """
    if not samples or columns < 1 or height < 32:
        raise CorelensError(
            f"{len(samples)} samples in {columns} columns of pictures {height} px high",
            "a sample or more, a column or more, 32 px or more",
            "give samples to show",
        )
    cells = [_cell(sample, height) for sample in samples]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    by_column = [cells[i::columns] for i in range(min(columns, len(cells)))]
    widths = [max(cell.width for cell in column) for column in by_column]
    heights = [max(cell.height for cell in row) for row in rows]
    gap = 2 * _GAP
    sheet = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)), PAPER
    )
    y = gap
    for row, tall in zip(rows, heights, strict=True):
        x = gap
        for cell, wide in zip(row, widths, strict=False):
            sheet.paste(cell, (x, y))
            x += wide + gap
        y += tall + gap
    return sheet


def save_sheets(folder: str | Path, seed: int = 0) -> list[Path]:
    """Draw twelve samples (six where each is several pictures) of every world into `folder` as PNG
    of 256 colours."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for world in worlds():
        columns = _COLUMNS.get(world, 4)
        samples = synthetic(world, 6 if world in _COLUMNS else 12, seed=seed)
        file = folder / f"{world}.png"
        sheet = contact_sheet(samples, columns, height=150 if world == "video" else 220)
        sheet.quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
        files.append(file)
    return files


def _cell(sample: Sample, height: int) -> Image.Image:
    video = bool(sample.video)
    pictures = (
        read_video(sample.video, "video")
        if video
        else [read_picture(p, "image") for p in sample.images]
    )
    word = "frame" if video else "page" if len(pictures) > 1 else ""
    strip = [
        _outlined(picture, i, sample.regions, video, height) for i, picture in enumerate(pictures)
    ]
    label = _SMALL + 5 if word else 0
    width = sum(picture.width for picture in strip) + _GAP * (len(strip) - 1)
    rows = [*_wrap(sample.question or "", width), f"Answer: {sample.answer}"]
    cell = Image.new("RGB", (width, label + height + _GAP + len(rows) * (_TEXT + 5)), PAPER)
    draw = ImageDraw.Draw(cell)
    x = 0
    for i, picture in enumerate(strip):
        # pages count from 1, as in the questions; frames from 0, as in a Tube
        draw.text(
            (x, 0), f"{word} {i if video else i + 1}" if word else "", fill=SOFT, font=font(_SMALL)
        )
        cell.paste(picture, (x, label))
        x += picture.width + _GAP
    for i, line in enumerate(rows):
        ink = INK if i < len(rows) - 1 else OUTLINE
        draw.text((0, label + height + _GAP + i * (_TEXT + 5)), line, fill=ink, font=font(_TEXT))
    return cell


def _outlined(
    picture: Image.Image, index: int, regions: Sequence[Shape], video: bool, height: int
) -> Image.Image:
    scale = height / picture.height
    shown = picture.resize((max(round(picture.width * scale), 1), height), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(shown)
    for region in regions:
        part: Box | Mask | None
        if isinstance(region, Tube):
            part = region.boxes.get(index) if video else None
        else:
            part = region if region.image == index and not video else None
        if part is not None:
            x0, y0, x1, y1 = (round(edge * scale) for edge in part.bounds)
            draw.rectangle((x0 - 4, y0 - 4, x1 + 3, y1 + 3), outline=HALO, width=1)
            draw.rectangle((x0 - 3, y0 - 3, x1 + 2, y1 + 2), outline=OUTLINE, width=2)
    return shown


def _wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, where its words allow."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if wrapped[-1] and font(_TEXT).getlength(longer) > width:
            wrapped.append(word)
        else:
            wrapped[-1] = longer
    return wrapped


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m corelens.data.synthetic.sheet FOLDER")
    for path in save_sheets(sys.argv[1]):
        print(path)
