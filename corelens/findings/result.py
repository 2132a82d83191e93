"""What a study found, and the files it writes."""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corelens.errors import CorelensError
from corelens.findings.files import write_whole
from corelens.findings.finding import Finding
from corelens.findings.options import Options
from corelens.findings.papers import beside_the_papers
from corelens.findings.setting import Setting

FORMAT = "corelens-study/2"


@dataclass
class Study:
    """What a study found.

    Args:
        settings: the models and worlds, with their scores.
        measured: {model and world: what was measured there, JSON}.
        findings: the verdicts.
        options: how thorough it was.
        meta: models, versions, command.
        unreadable: {world: what is wrong with the samples that were left out}.
        report: the page it wrote, if it wrote one.
    """

    settings: list[Setting]
    measured: dict[str, dict[str, Any]]
    findings: list[Finding]
    options: Options
    meta: dict[str, Any]
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    report: Path | None = None

    @property
    def beside(self) -> list[list[str]]:
        """The papers' figures beside these: what, published, here, whether it can be compared."""
        return beside_the_papers(self.settings, self.measured)

    def finding(self, id: str) -> Finding:
        """The finding "F1" to "F8"."""
        return next(one for one in self.findings if one.id == id)

    def to_json(self) -> dict[str, Any]:
        """Every number of the report."""
        told = {"format": FORMAT, "fraction": self.options.fraction, **self.meta, "options": self.options.to_json()}
        worlds = {}
        for setting in self.settings:
            numbers = {name: x for name, x in self.measured[setting.label].items() if name != "scenes"}
            worlds[setting.label] = _about(setting) | numbers
        return told | {
            "unreadable": self.unreadable,
            "beside_the_papers": self.beside,
            "findings": [finding.to_json() for finding in self.findings],
            "worlds": worlds,
        }

    def write(self, out: Path) -> None:
        """report.html, report.json and figures/; each file appears whole or not at all."""
        from corelens.viz.study_page import study_page

        (out / "figures").mkdir(parents=True, exist_ok=True)
        for finding in self.findings:
            for name, figure in finding.figures.items():
                for kind in ("svg", "png"):
                    buffer = io.BytesIO()
                    figure.savefig(
                        buffer, format=kind, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None
                    )
                    write_whole(out / "figures" / f"{name}.{kind}", buffer.getvalue())
        write_whole(out / "report.json", json.dumps(self.to_json(), ensure_ascii=False))
        write_whole(out / "report.html", study_page(self))
        self.report = out / "report.html"

    def plot(self, finding: str | None = None) -> Any:
        """The first figure of a finding ("F5"), or of the first finding that has one; all are in its `figures`."""
        chosen = self.findings if finding is None else [one for one in self.findings if one.id == finding]
        for one in chosen:
            for figure in one.figures.values():
                return figure
        drawn = ", ".join(one.id for one in self.findings if one.figures) or "nothing"
        raise CorelensError(
            f"a figure of {finding or 'this study'}", f"a finding that drew one: {drawn}", "study more of it"
        )

    def _repr_html_(self) -> str:
        from corelens.viz.study_page import summary

        return str(summary(self))


def _about(setting: Setting) -> dict[str, Any]:
    """How much was scored and tested, the clean accuracy, and the scores."""
    clean = None if setting.lacks(("answers",)) else setting.clean
    return {
        "model": setting.model_name,
        "world": setting.world,
        "scored": len(setting.to_score),
        "evaluated": len(setting.to_test),
        "without_region": setting.without_region,
        "clean": clean and clean.interval._asdict(),
        "answer_logprob": clean and clean.answer_logprob,
        "scores": {
            key: [[round(float(x), 6) for x in row] for row in scores.values] for key, scores in setting.scores.items()
        }
        if setting.lacks(("regions",)) is None
        else {},
    }
