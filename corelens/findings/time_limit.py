"""The limit of a model's study, in hours of one core. What is measured is kept, so that a study
with a higher limit goes on from there."""

import json
import time
from pathlib import Path

from corelens.disk.write import write_whole
from corelens.runs.processes import process

HOUR = 3600.0


class OutOfHours(Exception):
    """The processor time of this study is used up: what was to be measured is left out."""


class Limit:
    """Processor time that the study of one model took, over all the sessions and processes that it
    was run in.

    Args:
        folder: where the time is kept, a file a process.
        hours: how many core-hours the study may take.
    """

    def __init__(self, folder: Path, hours: float):
        folder.mkdir(parents=True, exist_ok=True)
        rank = process()[0]
        self.hours, self._folder, self._begun = hours, folder, time.process_time()
        self._file = folder / (f"seconds-{rank}.json" if rank else "seconds.json")
        self._before = _seconds(self._file) if self._file.exists() else 0.0

    def seconds(self) -> float:
        """Processor seconds, those of earlier sessions and of other processes included."""
        others = (f for f in self._folder.glob("seconds*.json") if f != self._file)
        return self._own() + sum(map(_seconds, others))

    def _own(self) -> float:
        return self._before + time.process_time() - self._begun

    def check(self) -> None:
        """Raise OutOfHours if the time is used up."""
        if self.seconds() >= self.hours * HOUR:
            raise OutOfHours

    def keep(self) -> None:
        """Write down what was used."""
        write_whole(self._file, json.dumps(round(self._own(), 1)))


def _seconds(file: Path) -> float:
    return float(json.loads(file.read_text(encoding="utf-8")))
