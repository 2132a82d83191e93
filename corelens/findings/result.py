"""The result of a study: report.json in memory, its verdicts, and the files that it writes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.findings.criteria import THRESHOLDS
from corelens.findings.f1_sparsity import Sparsity
from corelens.findings.f2_stability import Stability
from corelens.findings.f3_layers import Layers
from corelens.findings.f4_localise import Localisation
from corelens.findings.f5_necessity import Necessity
from corelens.findings.f6_sufficiency import Sufficiency
from corelens.findings.f7_acceleration import Acceleration
from corelens.findings.f8_sparsemm import SparseMM
from corelens.findings.finding import Finding
from corelens.findings.verdict import Verdict, combine

FORMAT = "corelens-study/4"
FINDINGS: dict[str, Finding] = {
    finding.id: finding
    for finding in (
        Sparsity(), Stability(), Layers(), Localisation(), Necessity(), Sufficiency(),
        Acceleration(), SparseMM()
    )
}  # fmt: skip


@dataclass(frozen=True)
class Concluded:
    """One finding with its verdict on each model.

    Args:
        finding: what was tested.
        verdicts: {model: verdict}.
    """

    finding: Finding
    verdicts: dict[str, Verdict]

    @property
    def id(self) -> str:
        """ "F1" to "F8"."""
        return self.finding.id

    @property
    def overall(self) -> Verdict:
        """The verdict itself where there is one model; else reproduced only if it is on every model
        judged."""
        if len(self.verdicts) == 1:
            return next(iter(self.verdicts.values()))
        return combine(self.verdicts, of="models")

    @property
    def verdict(self) -> str:
        """The overall verdict's word."""
        return self.overall.word

    def to_json(self) -> dict[str, Any]:
        """As report.json carries it."""
        finding = {
            name: getattr(self.finding, name)
            for name in ("id", "title", "claim", "source", "criterion")
        }
        verdicts = {model: verdict.to_json() for model, verdict in self.verdicts.items()}
        overall = self.overall
        return finding | {
            "verdict": overall.word, "number": overall.number, "reason": overall.reason,
            "lesson": self.finding.lesson(overall), "models": verdicts,
        }  # fmt: skip


@dataclass
class Study:
    """What a study measured and concluded. All of it is `data`, which report.json holds.

    Args:
        data: the numbers and how they were made, see docs/findings.md.
        report: the page, if one was written.
    """

    data: dict[str, Any]
    report: Path | None = None

    @property
    def findings(self) -> list[Concluded]:
        """The verdicts, concluded from the numbers."""
        concluded, models = [], self._models()
        for id in self.data["studied"]:
            finding = FINDINGS[id]
            verdicts = {name: finding.conclude(model) for name, model in models.items()}
            concluded.append(Concluded(finding, verdicts))
        return concluded

    def _models(self) -> dict[str, dict[str, Any]]:
        """Each model's numbers, with "sizes": of each world [number of parameters, depth, and the
        ends of its interval] of all models of its family that were judged there by the same
        reading."""
        sizes: dict[tuple[str, str, str], list[list[float]]] = {}
        own: dict[str, dict[str, list[list[float]]]] = {name: {} for name in self.data["models"]}
        for name, model in self.data["models"].items():
            for key, world in model["worlds"].items():
                if "F3" in world["numbers"] and world["why_not"] is None:
                    layers = world["numbers"]["F3"]
                    alike = (model["about"]["family"], key, layers["judged"])
                    own[name][key] = sizes.setdefault(alike, [])
                    depth = layers[layers["judged"]]["depth"]
                    ends = [depth[end] for end in ("value", "low", "high")]
                    own[name][key].append([model["about"]["parameters"], *ends])
        return {name: model | {"sizes": own[name]} for name, model in self.data["models"].items()}

    def finding(self, id: str) -> Concluded:
        """The finding "F1" to "F8"."""
        for concluded in self.findings:
            if concluded.id == id:
                return concluded
        raise CorelensError(
            f"the finding {id!r}", f"one of {', '.join(self.data['studied'])}", "study it"
        )

    def to_json(self) -> dict[str, Any]:
        """What report.json holds: the verdicts first, then every number."""
        findings = [concluded.to_json() for concluded in self.findings]
        criteria = [asdict(threshold) for threshold in THRESHOLDS]
        return {"format": FORMAT, "findings": findings, "criteria": criteria} | self.data

    def write(self, out: str | Path, explorer: Any = None) -> None:
        """report.html and report.json; each file appears whole or not at all.

        Args:
            out: the folder.
            explorer: markup of an explorer (`Explorer.part()`) for the page.
        """
        from corelens.viz.study_page import study_page

        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        report = self.to_json()
        write_whole(out / "report.json", json.dumps(report, ensure_ascii=False))
        write_whole(out / "report.html", study_page(report, explorer))
        self.report = out / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """A study from its report.json: judged again from the numbers, and ready to be written and
        drawn again."""
        file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
        return cls(_without_verdicts(read_report(file)))

    @classmethod
    def join(cls, studies: Sequence["Study"]) -> "Study":
        """Several studies as one report, each model with its own worlds.

        Raises:
            CorelensError: none, or two that have a model of the same name.
        """
        models: dict[str, Any] = {}
        for study in studies:
            twice = sorted(set(models) & set(study.data["models"]))
            if twice:
                raise CorelensError(
                    f"the model {twice[0]!r} twice",
                    "each model once",
                    "name the models differently",
                )
            models |= study.data["models"]
        if not models:
            raise CorelensError("no studies", "one or more", "give folders that hold a report.json")
        in_any = set(chain.from_iterable(study.data["studied"] for study in studies))
        studied = [id for id in FINDINGS if id in in_any]
        return cls(studies[0].data | {"models": models, "studied": studied, "command": None})

    def plot(self, finding: str = "F5") -> Any:
        """The figure of a finding on the first model that has one."""
        from corelens.viz.finding_figures import drawn_thresholds, finding_figure

        thresholds = drawn_thresholds([asdict(threshold) for threshold in THRESHOLDS])
        for model in self.data["models"].values():
            figure = finding_figure(finding, model, thresholds)
            if figure is not None:
                return figure
        raise CorelensError(f"a figure of {finding!r}", "a finding that was measured", "study it")

    def __repr__(self) -> str:
        words = ", ".join(f"{concluded.id} {concluded.overall}" for concluded in self.findings)
        return f"Study({', '.join(self.data['models'])}: {words})"

    def _repr_html_(self) -> str:
        from corelens.viz.study_page import summary

        return str(summary(self.to_json()))


def read_report(file: Path) -> dict[str, Any]:
    """A report.json of this version.

    Raises:
        CorelensError: it is not there, no JSON, or of another version, which is named and left as
            it is.
    """
    try:
        report: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorelensError(
            f"{file}, which is not there", "a study's report.json", "give the study's folder"
        ) from error
    except ValueError as error:
        raise CorelensError(
            f"{file}, which is no JSON", "a study's report.json", "study it again"
        ) from error
    if report.get("format") != FORMAT:
        raise CorelensError(
            f"{file}, of the version {report.get('format')!r}", repr(FORMAT),
            "keep it: its verdicts follow other rules. Study the model again, in another folder",
        )  # fmt: skip
    return dict(report)


def _without_verdicts(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in report.items() if key not in ("format", "findings", "criteria")
    }
