"""The limit of a model's study, in hours of one core. What is measured is kept, so that a study
with a higher limit goes on from there."""

import json
import time
from pathlib import Path

from corelens.heads.disk import write_whole

HOUR = 3600.0


class OutOfHours(Exception):
    """The processor time of this study is used up: what was to be measured is left out."""


class Limit:
    """Processor time that the study of one model took, over all the sessions that it was run in.

    Args:
        folder: where the time is kept.
        hours: how many core-hours the study may take.
    """

    def __init__(self, folder: Path, hours: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.hours, self._file, self._begun = hours, folder / "seconds.json", time.process_time()
        self._before = 0.0
        if self._file.exists():
            self._before = float(json.loads(self._file.read_text(encoding="utf-8")))

    def seconds(self) -> float:
        """Processor seconds, those of earlier sessions included."""
        return self._before + time.process_time() - self._begun

    def check(self) -> None:
        """Raise OutOfHours if the time is used up."""
        if self.seconds() >= self.hours * HOUR:
            raise OutOfHours

    def keep(self) -> None:
        """Write down what was used."""
        write_whole(self._file, json.dumps(round(self.seconds(), 1)))
