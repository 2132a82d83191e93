"""What all loaders of public sets share: finding their files, choosing samples, leaving out
pictures that are broken.

A loader streams its samples from the annotations; no picture is decoded before a model reads it.
"""

import json
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.pictures import Later, read_picture
from corelens.inputs.sample import Sample

IMAGE = "<image>"  # where a picture stands in the text of some sets
T = TypeVar("T")
LAYOUT = "lay your copy out as docs/data.md says; `corelens data check` tells what is there"
BROKEN = 0.01  # the share of pictures that may be unreadable


def there(root: str | Path, *names: str, what: str) -> Path:
    """The first of these files or folders below `root` that exists.

    Raises:
        CorelensError: none does; the message says what is missing where.
    """
    for name in names:
        if (path := Path(root, name)).exists():
            return path
    expected = " or ".join(str(Path(root, name)) for name in names)
    raise CorelensError(f"{root}, without {what}", expected, LAYOUT)


def has(root: Path, *names: str) -> bool:
    """Whether any of these files or folders is there."""
    return any(Path(root, name).exists() for name in names)


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorelensError(
            f"{file}, which cannot be read ({error})", "a whole JSON file", "get it again"
        ) from error


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one at a time."""
    with file.open("rb") as file_lines:
        for number, line in enumerate(file_lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise CorelensError(
                        f"{file}, line {number}, which is no JSON ({error})",
                        "one JSON object a line",
                        "get it again",
                    ) from error


def fields(record: dict[str, Any], *names: str, where: Any) -> list[Any]:
    """These fields of a record, in order; raise for one that is missing: the file is of another
    format."""
    missing = [name for name in names if name not in record]
    if missing:
        raise CorelensError(
            f"{where}: a record without {', '.join(missing)}; it has {', '.join(record)}",
            f"the published format, with {', '.join(names)}",
            "get the set from its publisher; see docs/data.md",
        )
    return [record[name] for name in names]


def take(items: Iterable[T], n: int | None, seed: int | None) -> list[T]:
    """The first `n` items (all if None); with a seed, `n` drawn at random, in the published
    order."""
    if n is None or seed is None:
        return list(islice(items, n))
    rng, reservoir = random.Random(seed), {}
    for number, item in enumerate(items):  # reservoir sampling: only n are ever held
        slot = number if number < n else rng.randrange(number + 1)
        if slot < n:
            reservoir[slot] = (number, item)
    return [item for _, item in sorted(reservoir.values(), key=lambda pair: pair[0])]


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts "K8" before "K16"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def choose_pages(count: int, evidence: Iterable[int], most: int | None) -> list[int]:
    """Which of `count` pages to show: the evidence and the pages nearest to it, at most `most`, in
    reading order.

    Evidence of more than `most` pages is shown whole; without evidence these are the first pages.
    """
    wanted = sorted(set(evidence)) or [0]
    if most is None:
        return list(range(count))
    near = sorted(range(count), key=lambda page: (min(abs(page - other) for other in wanted), page))
    return sorted(near[: max(most, len(set(wanted)))])


def text_and_images(text: str) -> list[str]:
    """The pieces of a text and `IMAGE` between them, in order, without empty pieces."""
    pieces: list[str] = []
    for number, piece in enumerate(text.split(IMAGE)):
        pieces += [IMAGE] if number else []
        pieces += [piece] if piece.strip() else []
    return pieces


def pictures(sample: Sample) -> list[Any]:
    """The images and frames of a sample, as they were given."""
    return [*sample.images, *(sample.video if sample.video is not None else [])]


def unreadable(picture: Any, decode: bool = False) -> str | None:
    """Why a picture cannot be read; None if it can.

    A file is opened and its size read; only one without the mark that ends its format (a download
    that was cut off) is decoded. Of a picture inside a file only the file is looked for. With
    `decode`, every picture is decoded.
    """
    try:
        if isinstance(picture, Later):
            if picture.broken or not Path(picture.file).is_file():
                return picture.broken or "no such file"
            if decode:
                picture.read()
        elif isinstance(picture, str | Path):
            with Image.open(picture) as image:
                whole = _ends(Path(picture), image.format)
            if decode or not whole:
                read_picture(picture, str(picture))
    except FileNotFoundError:
        return "no such file"
    except CorelensError as error:
        return error.given.split("cannot be read: ")[-1]
    # PIL raises OSError, SyntaxError, ValueError and struct.error for broken files
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _ends(file: Path, kind: str | None) -> bool:
    """Whether the mark that ends a JPEG or PNG stands in its last kilobyte."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind or "")
    if mark is None:
        return False
    with file.open("rb") as data:
        data.seek(max(file.stat().st_size - 1024, 0))
        return mark in data.read()


def keep_readable(samples: Sequence[Sample], what: str) -> list[Sample]:
    """Leave out the samples with a picture that cannot be read; warn, with the count and the names.

    Raises:
        CorelensError: 1% of the pictures or more cannot be read.
    """
    shown = {str(picture): picture for sample in samples for picture in pictures(sample)}
    broken = {name: why for name, picture in shown.items() if (why := unreadable(picture))}
    if not broken:
        return list(samples)
    problem = (
        f"{what}: {len(broken)} of {len(shown)} pictures cannot be read: {listed(broken, shown)}"
    )
    if len(broken) >= BROKEN * len(shown):
        raise CorelensError(problem, f"fewer than {BROKEN:.0%}", "get these files again")

    def is_readable(sample: Sample) -> bool:
        return broken.keys().isdisjoint(map(str, pictures(sample)))

    readable_samples = list(filter(is_readable, samples))
    warnings.warn(
        f"{problem}; {len(samples) - len(readable_samples)} samples are left out", stacklevel=3
    )
    return readable_samples


def listed(broken: dict[str, str], pictures_by_name: dict[str, Any], most: int = 10) -> str:
    """The first of these names, with reasons; a file whose frames or pages are all missing stands
    there once."""
    reasons = {}
    for name, why in broken.items():
        picture = pictures_by_name[name]
        reasons[picture.file if isinstance(picture, Later) and not picture.broken else name] = why
    first = [f"{name} ({why})" for name, why in islice(reasons.items(), most)]
    return "; ".join(first) + (f"; and {len(reasons) - most} more" if len(reasons) > most else "")


def package(name: str, purpose: str, load: Callable[[], T]) -> T:
    """An optional library; raise with the command that installs it."""
    try:
        return load()
    except ImportError as error:
        raise CorelensError(
            f"{purpose}, and the package {name!r} is not installed",
            name,
            "pip install 'corelens[data]'",
        ) from error
