"""Studies of several models side by side, from their report.json alone: the models need not be there any more."""

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from corelens.errors import CorelensError
from corelens.findings.cards import trained
from corelens.findings.f2_stability import chance
from corelens.findings.files import write_whole
from corelens.findings.options import CONTROLLED, LEAST_ACCURACY, RANKINGS
from corelens.findings.result import FORMAT as STUDY
from corelens.findings.run import FINDINGS
from corelens.heads.scores import HeadScores

FORMAT = "corelens-zoo/1"
CONTINUED, SEED, APART, UNKNOWN = "continued training", "another seed", "trained apart", "not known"


@dataclass
class Comparison:
    """Reports of studies, each of one model.

    Args:
        reports: {name of the model: what its report.json holds}.
    """

    reports: dict[str, dict[str, Any]]

    def about(self, model: str) -> dict[str, Any]:
        """Its family, shape, weights and training."""
        return {"training": trained(model)} | next(iter(self.reports[model]["models"].values()))

    def finding(self, model: str, id: str) -> dict[str, Any] | None:
        """The verdict on a finding, with what it rests on; None if it was not studied."""
        return next((one for one in self.reports[model]["findings"] if one["id"] == id), None)

    def rows(self, id: str) -> list[dict[str, Any]]:
        """The headline numbers of a finding: one dictionary for each model, world and reading of the score."""
        if not hasattr(FINDINGS[id], "brief"):
            return []
        found = []
        for model, report in self.reports.items():
            skipped = (self.finding(model, id) or {"skipped": report["worlds"]})["skipped"]
            for world, numbers in report["worlds"].items():
                if world not in skipped:
                    brief = FINDINGS[id].brief(numbers | {"fraction": report["fraction"]})
                    told = {"model": model, "world": world, "answered": answered(numbers)}
                    found += [told | {"reading": reading, **one} for reading, one in brief.items()]
        return found

    def between_worlds(self) -> list[dict[str, Any]]:
        """Agreement of the heads' scores between the worlds of one model."""
        found = []
        for model in self.reports:
            pairs = (self.finding(model, "F2") or {"numbers": {"pairs": []}})["numbers"]["pairs"]
            found += [one | {"model": model} for one in pairs]
        return found

    def between_models(self) -> list[dict[str, Any]]:
        """Agreement of the heads' scores between models of one architecture, in the worlds both answer.

        Heads of two trainings have no common numbering: which head of a layer comes to retrieve is arbitrary, so that
        only their layers can agree ("layers": correlation of the layers' mean scores). Continued training keeps it.
        """
        found = []
        for a, b in combinations(self.reports, 2):
            if self._shape(a) != self._shape(b):
                continue
            for world, numbers in self.reports[a]["worlds"].items():
                other = self.reports[b]["worlds"].get(world)
                if not other or not (numbers["scores"] and other["scores"] and answered(numbers) and answered(other)):
                    continue
                for name in CONTROLLED:
                    mine, theirs = (
                        HeadScores(np.array(one["scores"][RANKINGS[name]], np.float32)) for one in (numbers, other)
                    )
                    agreed = mine.agreement(theirs, self.reports[a]["fraction"])
                    layers = float(np.corrcoef(mine.by_layer(), theirs.by_layer())[0, 1])
                    ceiling = min(one["repeats"][name]["spearman"] for one in (numbers, other))
                    found.append({
                        "models": [a, b], "relation": self.relation(a, b), "world": world, "reading": name,
                        "spearman": agreed.spearman, "jaccard": agreed.jaccard, "layers": layers,
                        "chance": chance(mine.values.size, agreed.k)[1], "ceiling": ceiling,
                    })  # fmt: skip
        return found

    def relation(self, a: str, b: str) -> str:
        """How the training of two models of one architecture is related, as their cards say."""
        first, second = self.about(a)["training"], self.about(b)["training"]
        if not first or not second:
            return UNKNOWN
        if first["name"] == second["name"]:
            return SEED
        return CONTINUED if a in second["starts"] or b in first["starts"] else APART

    def _shape(self, model: str) -> tuple[Any, ...]:
        about = self.about(model)
        return about["family"], about["n_layers"], about["n_heads"]

    def beside(self) -> list[list[str]]:
        """The papers' figures beside all of these: [what, published, here, comparable?]."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for model, report in self.reports.items():
            for what, published, here, comparable in report["beside_the_papers"]:
                found.setdefault((what, published, comparable), []).append(f"{model}, {here}")
        return [[what, published, "\n".join(here), words] for (what, published, words), here in found.items()]

    def to_json(self) -> dict[str, Any]:
        """Every number of the page."""
        return {
            "format": FORMAT,
            "models": {model: self.about(model) for model in self.reports},
            "verdicts": {
                id: {model: {key: one[key] for key in ("verdict", "scope")} for model in self.reports
                     if (one := self.finding(model, id))}
                for id in FINDINGS
            },
            "numbers": {id: self.rows(id) for id in FINDINGS if hasattr(FINDINGS[id], "brief")},
            "between_worlds": self.between_worlds(),
            "between_models": self.between_models(),
            "beside_the_papers": self.beside(),
        }  # fmt: skip

    def write(self, out: Path) -> Path:
        """index.html and zoo.json."""
        from corelens.findings.compare_page import compare_page

        write_whole(out / "zoo.json", json.dumps(self.to_json(), ensure_ascii=False))
        write_whole(out / "index.html", compare_page(self))
        return out / "index.html"


def answered(numbers: dict[str, Any]) -> bool:
    """Whether a model answers a world well enough for its attention to be called retrieval."""
    return bool(numbers["clean"]) and numbers["clean"]["value"] >= LEAST_ACCURACY


def compare(folder: Path) -> Comparison:
    """The studies in the sub-folders of this one.

    Raises:
        CorelensError: there are none, or one was written in another format or of several models.
    """
    reports = {}
    for path in sorted(folder.glob("*/report.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if report.get("format") != STUDY or len(report["models"]) != 1:
            raise CorelensError(
                f"{path}: format {report.get('format')!r}, {len(report.get('models', []))} models",
                f"{STUDY!r}, one model",
                "run `corelens study --zoo` again",
            )
        reports[path.parent.name] = report
    if not reports:
        raise CorelensError(f"no studies in {folder}", "sub-folders with a report.json", "run `corelens study --zoo`")
    return Comparison(reports)
