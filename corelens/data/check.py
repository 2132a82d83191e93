"""What a data folder holds: which set, which parts are whole, what is missing where, which pictures
are broken."""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corelens.data.files import BROKEN, pictures, unreadable
from corelens.data.folder import load_samples
from corelens.data.public import SETS, recognise
from corelens.errors import CorelensError
from corelens.inputs.pictures import Later
from corelens.inputs.sample import Sample


@dataclass
class Part:
    """One split, task or level of a set.

    Args:
        name: as the set calls it.
        samples: how many there are.
        regions: how many of them say where the evidence is.
        missing: what keeps it from being read, and where; None if it can be.
        notes: what else its loader says, for instance of samples that it leaves out.
    """

    name: str
    samples: int = 0
    regions: int = 0
    missing: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `check` found.

    Args:
        path: the folder.
        set: which set it is.
        parts: what it has of it.
        pictures: how many pictures its samples show (images, pages, and one frame of each video).
        broken: those that cannot be read, with the reason.
    """

    path: str
    set: str
    parts: list[Part] = field(default_factory=list)
    pictures: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether something can be loaded: a part that is there, and fewer than 1% of the pictures
        broken."""
        return any(part.samples for part in self.parts) and len(self.broken) < max(
            BROKEN * self.pictures, 1e-9
        )

    def to_json(self) -> dict[str, Any]:
        """All of it, and whether it can be used."""
        return asdict(self) | {"usable": self.usable}


def check(path: str | Path) -> Report:
    """Look at every part of a data folder and decode every picture (a page of each PDF, a frame of
    each video).

    Raises:
        CorelensError: the folder holds no set that is known.
    """
    root = Path(path)
    if not root.exists():
        raise CorelensError(f"{root}", "a folder", "check the path")
    kind = recognise(root)
    report = Report(str(root), kind)
    options = {"samples": {}} if kind == "corelens" else SETS[kind].parts(root)
    seen: set[str] = set()
    for name, options_of_part in options.items():
        part = Part(name)
        report.parts.append(part)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", UserWarning)
            try:
                for sample in _stream(kind, root, options_of_part):
                    part.samples += 1
                    part.regions += bool(sample.regions)
                    _look(sample, seen, report)
            except CorelensError as error:
                part.missing = f"{error.given}; expected {error.expected}"
        part.notes = [str(warning.message) for warning in raised if warning.category is UserWarning]
    return report


def _stream(kind: str, root: Path, options: dict[str, Any]) -> Iterator[Sample]:
    return iter(load_samples(root)) if kind == "corelens" else SETS[kind].stream(root, **options)


def _look(sample: Sample, seen: set[str], report: Report) -> None:
    """Decode what was not decoded yet; of a video or document one picture, of a table none (its
    reader has checked)."""
    for picture in pictures(sample):
        inside = isinstance(picture, Later)
        table = inside and picture.file.endswith(".parquet")
        name = picture.file if inside and not table and not picture.broken else str(picture)
        if name in seen:
            continue
        seen.add(name)
        report.pictures += 1
        if why := unreadable(picture, decode=not table):
            report.broken[name] = why
