"""A finding: what was claimed, the criterion it is judged by, what was measured, the verdict, and the best explanation.

The criterion is a sentence beside the code that applies it, in the file of the finding; it does not look at results.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

Brief = dict[str, dict[str, Any]]  # {reading of the score: {what: an interval, a number or a word}}
REPRODUCED, NOT_REPRODUCED, NOT_JUDGED = "reproduced", "not reproduced", "not judged"


@dataclass(frozen=True)
class Claim:
    """What a paper says, and when this study calls it reproduced.

    Args:
        id: "F1" to "F8".
        title: in a few words.
        claim: in a sentence.
        source: paper, and where in it as far as it is known to us.
        criterion: when it counts as reproduced.
        needs: "regions" (samples that say where the evidence is), "accuracy" (a model that answers well enough to lose
            something), "text" (regions that say what is written in them).
    """

    id: str
    title: str
    claim: str
    source: str
    criterion: str
    needs: tuple[str, ...] = ("regions",)


@dataclass
class Finding:
    """What a study found on one claim.

    Args:
        claim: which.
        verdict: "reproduced", "not reproduced" or "not judged".
        scope: where the verdict holds and where not, in a few words; "" if it holds throughout.
        measured: the numbers that it rests on, in sentences.
        explanation: what the measurements say about why.
        numbers: of the judgement, JSON; what was measured on each model and world stands in Study.worlds.
        parts: tables and figures for the page.
        figures: {name: matplotlib figure}, for papers.
        skipped: {model and world: why nothing was measured there}.
    """

    claim: Claim
    verdict: str
    measured: list[str]
    explanation: str = ""
    scope: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    parts: list[Markup] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """ "F1" to "F8"."""
        return self.claim.id

    def to_json(self) -> dict[str, Any]:
        """All but the pictures."""
        told = {name: getattr(self.claim, name) for name in ("id", "title", "claim", "source", "criterion")}
        mine = ("verdict", "scope", "measured", "explanation", "numbers", "skipped")
        return told | {name: getattr(self, name) for name in mine}

    def add(self, *parts: Markup) -> None:
        """More for the page."""
        self.parts += parts

    def draw(self, name: str, figure: Any, caption: str) -> Markup:
        """Keep a figure under its name; returns it as a part of the page (not added yet)."""
        from corelens.viz import page

        key = re.sub(r"[^\w.]+", "-", f"{self.id}-{name}").strip("-")
        self.figures[key] = figure
        return page.figure(figure, caption)


def judge(outcomes: Mapping[str, Mapping[str, bool]]) -> tuple[str, str]:
    """(verdict, scope) from {model and world: {reading of the score: whether it meets the criterion}}.

    Reproduced: in every model and world that was judged, at least one of the readings meets the criterion; the scope
    names those that do everywhere, those that do in some, and those that do nowhere.
    """
    if not outcomes:
        return NOT_JUDGED, ""
    yes = [where for where, readings in outcomes.items() if any(readings.values())]
    verdict = REPRODUCED if len(yes) == len(outcomes) else NOT_REPRODUCED
    if yes and len(yes) < len(outcomes):
        return verdict, f"met in {', '.join(yes)}; not in {', '.join(w for w in outcomes if w not in yes)}"
    met = {reading: [where for where, r in outcomes.items() if r.get(reading)] for reading in _readings(outcomes)}
    if not yes or len(met) < 2 or all(len(places) == len(outcomes) for places in met.values()):
        return verdict, ""
    everywhere = [reading for reading, places in met.items() if len(places) == len(outcomes)]
    nowhere = [reading for reading, places in met.items() if not places]
    said = [f"by {' and '.join(everywhere)}"] if everywhere else []
    said += [f"by {name} only in {', '.join(met[name])}" for name in met if name not in everywhere + nowhere]
    said += [f"not by {' or '.join(nowhere)}"] if nowhere else []
    return verdict, "; ".join(said)


def _readings(outcomes: Mapping[str, Mapping[str, bool]]) -> list[str]:
    return list(dict.fromkeys(reading for readings in outcomes.values() for reading in readings))


def percent(x: float) -> str:
    """0.123 → "12%"."""
    return f"{100 * x:.0f}%"


def points(interval: Iterable[float]) -> str:
    """(0.88, 0.86, 0.90) → "88 [86, 90] points"."""
    value, low, high = (round(100 * x) + 0.0 for x in interval)  # (no −0)
    return f"{value:.0f} [{low:.0f}, {high:.0f}] points"


def cell(interval: Any, digits: int = 2) -> str:
    """An interval as a table's cell: "0.42 [0.38, 0.47]"; takes (value, low, high) or a dictionary of these."""
    value, low, high = interval.values() if isinstance(interval, Mapping) else interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
