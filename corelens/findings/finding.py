"""A finding: what a paper claims, what is measured on a model and a world, and how the numbers are
judged.

`measure` runs the model and returns JSON. `judge` and `conclude` read that JSON and nothing else,
so that an old report can be judged and drawn again. None of them knows the page.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from corelens.findings.verdict import (
    CANNOT,
    LEFT_OUT,
    NOT_JUDGED,
    NOT_REPRODUCED,
    REPRODUCED,
    Verdict,
    combine,
)

if TYPE_CHECKING:
    from corelens.findings.world import World

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Finding(ABC):
    """One claim of the papers and its test. Each of F1 to F8 is a subclass in a file of its own."""

    id: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    source: ClassVar[str]
    criterion: ClassVar[str]
    if_reproduced: ClassVar[str]  # what a reader should conclude about the paper
    if_not: ClassVar[str]
    # what samples must have: "regions", "answers", "text"
    needs: ClassVar[tuple[str, ...]] = ("regions", "answers")
    # only heads read at rows that the answer hangs on can be judged
    needs_rows: ClassVar[bool] = True

    @abstractmethod
    def measure(self, world: "World", worlds: Sequence["World"], reading: str) -> Numbers:
        """The numbers of this world.

        Args:
            world: the model on these samples.
            worlds: all worlds of the study that count, this one among them.
            reading: the key of the score whose heads are judged.
        """

    @abstractmethod
    def judge(self, numbers: Numbers, world: Mapping[str, Any]) -> Verdict:
        """The verdict of one world, from what `measure` returned and the world's own JSON."""

    def conclude(self, model: Mapping[str, Any]) -> Verdict:
        """The verdict on a model, from its part of report.json."""
        if self.needs_rows and not model["reading"]["key"]:
            return Verdict(CANNOT, reason=model["reading"]["reason"])
        verdicts = {}
        for name, world in model["worlds"].items():
            if self.id in world["serves"]:
                verdicts[name] = self._in_world(world)
        return (
            combine(verdicts)
            if verdicts
            else Verdict(CANNOT, reason="no world of this study serves it")
        )

    def _in_world(self, world: Mapping[str, Any]) -> Verdict:
        reason = world["skipped"].get(self.id) or world["why_not"]
        if reason and reason.startswith(LEFT_OUT):
            return Verdict(NOT_JUDGED, reason=reason)
        if reason:
            return Verdict(CANNOT, reason=reason)
        if self.id not in world["numbers"]:  # (a joint report of studies of different findings)
            return Verdict(NOT_JUDGED, reason=f"{LEFT_OUT}: this model's study did not ask for it")
        return self.judge(world["numbers"][self.id], world)

    def lesson(self, verdict: Verdict) -> str:
        """One sentence: what a reader should conclude about the paper."""
        if verdict.word == REPRODUCED:
            return self.if_reproduced
        if verdict.word == NOT_REPRODUCED:
            return self.if_not
        return "This report says nothing about the claim."


def percent(x: float, digits: int = 0) -> str:
    """0.123 → "12%"."""
    return f"{100 * x:.{digits}f}%"
