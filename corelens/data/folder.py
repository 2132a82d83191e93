"""CoreLens's own simple format: a folder with `samples.jsonl` and the pictures and sounds it names.

One line a sample, a JSON object:

    {"id": "17", "images": ["street.jpg"], "question": "What number is on the bus?", "answer": "42",
     "regions": [{"box": [312, 140, 376, 204], "image": 0, "text": "42"}]}

`images` or `video` (its frames), `audio` (WAV files): paths relative to the folder, and inside it;
one of them at least. `question`: text. All else may be left out: `id` (the line number), `answer`,
`choices` (texts), `meta` (anything), `regions`: each with one of `box` [x0, y0, x1, y1] in pixels
of the original picture, `mask` (path of a picture, non-black where the region is), `tube`
{frame: box} or `span` [start, end] in seconds; and `image` (which picture or, for a span, which
sound, from 0) and `text` (what stands or is said there).
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image

from corelens.disk.write import make_folder, write_whole
from corelens.errors import CorelensError
from corelens.inputs.pictures import read_mask, read_picture
from corelens.inputs.sample import Sample
from corelens.inputs.sounds import read_sound, write_wav
from corelens.tokens.regions import Box, Mask, Region, Span, Tube

FILE = "samples.jsonl"
FIELDS = ("id", "images", "video", "audio", "question", "answer", "choices", "regions", "meta")
REGION_FIELDS = ("box", "mask", "tube", "span", "image", "text")


def load_samples(path: str | Path, outside: bool = False) -> list[Sample]:
    """Read a folder in CoreLens's format (or its samples.jsonl). Pictures are opened when a model
    reads the sample.

    Args:
        path: the folder, or the file.
        outside: allow paths that leave the folder (absolute ones, "../other/a.png"): for files that
            you trust, since whoever wrote them chooses what is read. (A link inside the folder is
            part of it.)

    Raises:
        CorelensError: a line that is wrong, with file, line and field; nothing is skipped.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise CorelensError(
            f"{path}", f"a folder with {FILE}, or that file", "see help(corelens.data.folder)"
        )
    samples = []
    try:
        with file.open("rb") as file_lines:
            for number, line in enumerate(file_lines, 1):
                if line.strip():
                    samples.append(_sample(line, _Line(file, number, outside)))
    except OSError as error:
        raise CorelensError(
            f"{file}, which cannot be read ({error.strerror or error})",
            "a file that may be read",
            "check its permissions",
        ) from error
    if not samples:
        raise CorelensError(
            f"{file}, which is empty", "one sample a line", "see help(corelens.data.folder)"
        )
    twice = _first_twice(sample.id for sample in samples)
    if twice is not None:
        raise CorelensError(
            f"{file}: two samples with the id {twice!r}",
            "ids that differ",
            "results are kept by id",
        )
    return samples


def save_samples(samples: Sequence[Sample], folder: str | Path) -> Path:
    """Write samples with their pictures (as PNG) and sounds (as WAV of 16 bits) in the same format;
    returns the path of samples.jsonl.

    Raises:
        CorelensError: what the format does not hold (chats, samples without a picture or sound, two
            of one id, meta that is no JSON); no room on the disk.
    """
    folder = Path(folder)
    for sample in samples:
        if not isinstance(sample, Sample):
            raise CorelensError(
                f"a {type(sample).__name__} among the samples",
                "Samples",
                "give a list of cl.Sample",
            )
    twice = _first_twice(sample.id or str(i + 1) for i, sample in enumerate(samples))
    if twice is not None:
        raise CorelensError(
            f"two samples with the id {twice!r}", "ids that differ", "results are kept by id"
        )
    make_folder(folder / "pictures")
    records = []
    for number, sample in enumerate(samples):
        if sample.messages is not None:
            raise CorelensError(
                f"{sample.label}, a chat",
                "samples of images and a question",
                "leave chats out",
            )
        shown = sample.images if sample.video is None else sample.video
        if not len(shown) and not len(sample.audio):
            raise CorelensError(
                f"{sample.label}, without a picture or sound", "one of them", "leave it out"
            )
        record: dict[str, Any] = {"id": sample.id or str(number + 1)}
        kind, pictures = (
            ("video", sample.video) if sample.video is not None else ("images", sample.images)
        )
        record[kind] = [
            _keep(picture, folder, f"{number:06d}-{i}") for i, picture in enumerate(pictures)
        ]
        record["audio"] = [
            _keep_sound(sound, folder, f"{number:06d}-{i}") for i, sound in enumerate(sample.audio)
        ]
        record["regions"] = [
            _region_json(region, folder, f"{number:06d}-mask-{i}")
            for i, region in enumerate(sample.regions)
        ]
        record |= {
            name: getattr(sample, name) for name in ("question", "answer", "choices", "meta")
        }
        record = {name: x for name, x in record.items() if x not in (None, [], {})}
        try:
            records.append(json.dumps(record, ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise CorelensError(
                f"{sample.label}, whose meta is no JSON ({error})",
                "texts, numbers, lists and objects",
                "leave the rest out of meta",
            ) from error
    file = folder / FILE
    write_whole(file, "\n".join(records) + "\n")
    return file


def _keep(picture: Any, folder: Path, name: str) -> str:
    """Write a picture as PNG; its path relative to the folder."""
    content = io.BytesIO()
    read_picture(picture, name).save(content, "PNG")
    write_whole(folder / "pictures" / f"{name}.png", content.getvalue())
    return f"pictures/{name}.png"


def _keep_sound(sound: Any, folder: Path, name: str) -> str:
    """Write a sound as WAV; its path relative to the folder."""
    (folder / "sounds").mkdir(exist_ok=True)
    write_wav(read_sound(sound, name), folder / "sounds" / f"{name}.wav")
    return f"sounds/{name}.wav"


class _Line:
    """Where we are, for messages."""

    def __init__(self, file: Path, number: int, outside: bool):
        self.file, self.number, self.outside = file, number, outside

    def wrong(self, field: str, value: Any, expected: str) -> CorelensError:
        shown = repr(value)
        shown = shown if len(shown) < 80 else f"{shown[:77]}…"
        return CorelensError(
            f"{self.file}, line {self.number}, field {field!r}: {shown}",
            expected,
            "correct the line; the format is in help(corelens.data.folder)",
        )


def _record(text: bytes, line: _Line) -> dict[str, Any]:
    """The line's JSON object; no number in it is too large for a computer's."""
    try:
        record = json.loads(text.decode("utf-8"), parse_int=_whole)
        endless = next(_endless(record, ""), None)
    except UnicodeDecodeError as error:
        raise line.wrong(
            "(all)", text[max(error.start - 20, 0) :][:40], f"text in UTF-8 ({error.reason})"
        ) from error
    except RecursionError as error:
        raise line.wrong(
            "(all)", text[:40], "a JSON object that is not nested without end"
        ) from error
    except ValueError as error:
        raise line.wrong(
            "(all)", text[:80].decode(errors="replace").strip(), f"a JSON object ({error})"
        ) from error
    if not isinstance(record, dict):
        raise line.wrong("(all)", record, "a JSON object")
    if endless is not None:
        raise line.wrong(endless, "a number that is not finite, or too large", "a finite number")
    return record


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= 18 else float(digits)


def _endless(value: Any, field: str) -> Iterator[str]:
    """The fields that hold a number that is not finite."""
    if isinstance(value, float) and not isfinite(value):
        yield field
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _endless(inner, f"{field}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _endless(inner, f"{field}[{index}]")


def _paths(record: dict[str, Any], field: str, line: _Line) -> list[str]:
    """The files that a field lists."""
    names = _texts(record.get(field, []), field, line)
    return [_path(name, f"{field}[{i}]", line) for i, name in enumerate(names)]


def _sample(text: bytes, line: _Line) -> Sample:
    record = _record(text, line)
    for field in record:
        if field not in FIELDS:
            raise line.wrong(field, record[field], f"one of the fields {', '.join(FIELDS)}")
    shown = {"images", "video", "audio"} & set(record)
    if not shown or {"images", "video"} <= shown:
        raise line.wrong("images", record.get("images"), "either images or video, or audio")
    kind = "video" if "video" in record else "images"
    pictures, sounds = _paths(record, kind, line), _paths(record, "audio", line)
    for field, paths in ((kind, pictures), ("audio", sounds)):
        if field in record and not paths:
            raise line.wrong(field, record[field], "one path or more")
    if not isinstance(record.get("question"), str) or not record["question"].strip():
        raise line.wrong("question", record.get("question"), "a text")
    for field, type_, expected in (
        ("answer", str, "a text"),
        ("meta", dict, "an object"),
        ("regions", list, "a list"),
    ):
        if record.get(field) is not None and not isinstance(record[field], type_):
            raise line.wrong(field, record[field], expected)
    regions = [
        _region(region, f"regions[{i}]", line)
        for i, region in enumerate(record.get("regions") or [])
    ]
    for i, region in enumerate(regions):
        if isinstance(region, Span):
            if not 0 <= region.audio < len(sounds):
                raise line.wrong(f"regions[{i}].image", region.audio, f"below {len(sounds)} sounds")
            continue
        if isinstance(region, Tube) != (kind == "video"):
            raise line.wrong(
                f"regions[{i}]",
                record["regions"][i],
                "a tube for a video, a box or mask for images",
            )
        if kind == "images" and not 0 <= region.image < len(pictures):
            raise line.wrong(f"regions[{i}].image", region.image, f"0 to {len(pictures) - 1}")
    choices, name = record.get("choices"), record.get("id", line.number)
    if isinstance(name, bool) or not isinstance(name, str | int) or not str(name).strip():
        raise line.wrong("id", name, "a text or a whole number")
    return Sample(
        question=record["question"],
        answer=record.get("answer"),
        regions=regions,
        choices=None if choices is None else _texts(choices, "choices", line),
        id=str(name),
        meta=record.get("meta") or {},
        images=pictures if kind == "images" else [],
        video=pictures if kind == "video" else None,
        audio=sounds,
    )


def _region(entry: Any, field: str, line: _Line) -> Region:
    if not isinstance(entry, dict) or len({"box", "mask", "tube", "span"} & set(entry)) != 1:
        raise line.wrong(field, entry, "an object with one of box, mask, tube and span")
    for name in entry:
        if name not in REGION_FIELDS:
            raise line.wrong(f"{field}.{name}", entry[name], f"one of {', '.join(REGION_FIELDS)}")
    image, text = entry.get("image", 0), entry.get("text")
    if not isinstance(image, int) or isinstance(image, bool):
        raise line.wrong(f"{field}.image", image, "a whole number, counted from 0")
    if text is not None and not isinstance(text, str):
        raise line.wrong(f"{field}.text", text, "a text")
    try:
        if "box" in entry:
            x0, y0, x1, y1 = _numbers(entry["box"], f"{field}.box", line)
            return Box(x0, y0, x1, y1, image=image, text=text)
        if "mask" in entry:
            path = _path(entry["mask"], f"{field}.mask", line)
            return Mask(
                read_mask(path, f"{line.file}, line {line.number}, field '{field}.mask'"),
                image=image,
                text=text,
            )
        if "span" in entry:
            start, end = _numbers(entry["span"], f"{field}.span", line, "start, end")
            return Span(start, end, audio=image, text=text)
        boxes = entry["tube"]
        if not isinstance(boxes, dict) or not all(
            re.fullmatch("[0-9]{1,9}", frame) for frame in boxes
        ):
            raise line.wrong(f"{field}.tube", boxes, "an object {frame: [x0, y0, x1, y1]}")
        corners = {int(frame): _numbers(box, f"{field}.tube", line) for frame, box in boxes.items()}
        return Tube(
            {frame: Box(x0, y0, x1, y1) for frame, (x0, y0, x1, y1) in corners.items()}, text=text
        )
    except CorelensError as error:
        if str(line.file) in error.given:
            raise
        raise line.wrong(field, entry, error.expected) from error


def _numbers(
    value: Any, field: str, line: _Line, names: str = "x0, y0, x1, y1"
) -> tuple[float, ...]:
    numbers = isinstance(value, list) and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    )
    if not numbers or len(value) != names.count(",") + 1:
        count = {2: "two", 4: "four"}[names.count(",") + 1]
        raise line.wrong(field, value, f"{count} numbers [{names}]")
    return tuple(value)


def _texts(value: Any, field: str, line: _Line) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise line.wrong(field, value, "a list of texts")
    return value


def _path(name: Any, field: str, line: _Line) -> str:
    path = line.file.parent / name if isinstance(name, str) else None
    if path is not None and not line.outside and not _inside(path, line.file.parent):
        raise CorelensError(
            f"{line.file}, line {line.number}, field {field!r}: {name!r}, which leaves the folder",
            f"a path inside {line.file.parent}",
            "move the file into the folder; for a file that you trust: cl.data.load_samples(path, "
            "outside=True), or PATH:outside=true where a command takes data",
        )
    if path is None or not _is_file(path):
        raise line.wrong(field, name, f"the path of a file, relative to {line.file.parent}")
    return str(path)


def _inside(path: Path, folder: Path) -> bool:
    """Whether the path, as it is written, stays in the folder (links are not followed)."""
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # (a name that is too long)
        return False


def _region_json(region: Region, folder: Path, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {} if region.text is None else {"text": region.text}
    if isinstance(region, Tube):
        return {
            "tube": {str(f): [b.x0, b.y0, b.x1, b.y1] for f, b in region.boxes.items()},
            **about,
        }
    about |= {"image": region.image} if region.image else {}
    if isinstance(region, Span):
        return {"span": [region.start, region.end], **about}
    if isinstance(region, Box):
        return {"box": [region.x0, region.y0, region.x1, region.y1], **about}
    return {"mask": _keep(Image.fromarray(region.mask), folder, name), **about}


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
