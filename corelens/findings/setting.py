"""One model on one set of samples: the scores, the prepared batches and the runs that its findings share.

All that costs time is kept in a folder as soon as it is there (scores batch by batch, answers run by run), so that a
study that was stopped goes on where it stood.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.evaluation.answers import Answer, Evaluation
from corelens.evaluation.evaluate import Point, batches, evaluate, hooks_of
from corelens.findings.late import Knockouts
from corelens.findings.options import LEAST_ACCURACY, LEVEL, RANKINGS, Options, selections
from corelens.findings.spread import spread, tightness
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import Interval, accuracy_difference, accuracy_interval
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions.ablate import mean_z
from corelens.interventions.edges import QUESTION_ON
from corelens.metrics.registry import metric
from corelens.metrics.runs import RunFolder
from corelens.metrics.score import score_heads

Advance = Callable[[str], None]
ALSO_SCORED = ("visual_mass", "precision", "lift", "visual_mass[rows=last]", "precision[rows=last]", "lift[rows=last]")


class Setting:
    """One model on one set of samples.

    Args:
        label: what reports call it: the world, with the model's name in front if there are several.
        model_name, world: the two by themselves.
        model: a HookedMLLM.
        samples: the first part scores heads, the rest tests them. If only some have regions, the others are left out.
        options: how thorough.
        folder: where its work is kept.
        advance: called with a few words at every step.
    """

    def __init__(
        self, label: str, model_name: str, world: str, model: Any, samples: Sequence[Sample], options: Options,
        folder: RunFolder, advance: Advance,
    ):  # fmt: skip
        self.label, self.model_name, self.world = label, model_name, world
        self.model, self.options, self.folder, self.advance = model, options, folder, advance
        marked = [sample for sample in samples if sample.regions]
        self.without_region = len(samples) - len(marked)
        self.samples = marked or list(samples)
        cut = min(max(round(len(self.samples) * options.score_share), 2), len(self.samples) - 2)
        self.to_score, self.to_test = self.samples[:cut], self.samples[cut:]
        self.notes: list[str] = []

    # --- what a finding may need --------------------------------------------------------------------------------------

    def lacks(self, needs: Sequence[str]) -> str | None:
        """Why a finding that needs these cannot be measured here; None if it can."""
        if "regions" in needs and not self.samples[0].regions:
            return "the samples have no regions"
        if "text" in needs and not all(region.text for sample in self.samples for region in sample.regions):
            return "the regions do not say what is written in them (text=)"
        if {"accuracy", "answers"} & set(needs) and any(sample.answer is None for sample in self.samples):
            return "there are samples without answers"
        if "accuracy" in needs and self.clean.accuracy < LEAST_ACCURACY:
            said = f"clean accuracy {self.clean.interval}"
            return f"{said}: what the model cannot do, no ablation can cost ({LEAST_ACCURACY:.0%} is the least)"
        return None

    # --- shared work --------------------------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> dict[str, HeadScores]:
        """RAM in its readings, and what is said beside it, of every head."""
        self.advance("scoring all heads")
        wanted = [metric(key) for key in (*RANKINGS.values(), *ALSO_SCORED)]
        wanted += [metric(one, rows=rows) for one in (spread, tightness) for rows in ("question", "last")]
        return score_heads(
            self.model, self.to_score, wanted, batch_size=self.options.batch_size, out=self.folder.path / "scores"
        )

    @cached_property
    def prepared(self) -> list[Inputs]:
        """The test samples as batches, their pictures encoded once."""
        self.advance("encoding the pictures")
        return batches(self.model, self.to_test, self.options.batch_size)

    @cached_property
    def knockouts(self) -> Knockouts:
        """The test samples, to be run under knockouts."""
        return Knockouts(self.model, self.prepared)

    @cached_property
    def reference(self) -> Any:
        """The mean z, for mean ablation."""
        self.advance("mean of z")
        return mean_z(self.model, self.to_score, batch_size=self.options.batch_size)

    @cached_property
    def clean(self) -> Evaluation:
        """The answers without any intervention."""

        def answers() -> list[dict[str, Any]]:
            self.advance("clean accuracy")
            return [asdict(one) for one in evaluate(self.model, self.prepared).per_sample]

        return Evaluation([Answer(**one) for one in self.kept("clean", answers)])

    def sets(self, fraction: float) -> dict[tuple[str, str], list[HeadSet]]:
        """{(role, ranking): sets} of the rankings' tops and their controls; what must be said of them is noted."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = selections(self.scores, fraction, self.options.draws, self.options.seed)
        said = [str(warning.message) for warning in caught if warning.category is UserWarning]
        self.notes = list(dict.fromkeys([*self.notes, *said]))
        return found

    def release(self) -> None:
        """Let go of what takes memory; it is made again if it is asked for."""
        for name in ("prepared", "reference", "knockouts"):
            self.__dict__.pop(name, None)

    # --- runs under interventions -------------------------------------------------------------------------------------

    def correct(self, key: str, run: Callable[[], Evaluation]) -> Float[np.ndarray, " sample"]:
        """1 where a test sample is answered in this run; one of the same key is not made again."""
        if key not in self._runs:
            self.advance("ablating")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*lost every edge.*")  # the point of a knockout
                found = run().correct
            self._runs[key] = found
            self.folder.add_line("runs", key, "".join("01"[int(x)] for x in found))
        return self._runs[key]

    @cached_property
    def _runs(self) -> dict[str, Float[np.ndarray, " sample"]]:
        kept = self.folder.lines("runs")
        return {key: np.array([float(x) for x in correct]) for key, correct in kept.items()}

    def knocked(self, key: str, heads: HeadSet | None, rows: str = QUESTION_ON, columns: str = "region") -> Any:
        """1 where a sample is answered with the edges from `rows` to `columns` cut in these heads (all if None)."""
        return self.correct(key, lambda: self.knockouts.evaluate(heads, rows, columns))

    def ablated(self, sets: Sequence[HeadSet], kind: str) -> Float[np.ndarray, " sample"]:
        """1 where a sample is answered with these heads ablated; the mean over the sets."""

        def run(heads: HeadSet) -> Float[np.ndarray, " sample"]:
            key = f"{kind} {sorted(heads.to_json())}"
            if kind == "knockout":
                return self.knocked(key, heads)
            reference = self.reference if kind == "mean" else None
            return self.correct(key, lambda: evaluate(self.model, self.prepared, hooks_of(kind, heads, reference)))

        return np.mean([run(heads) for heads in sets], axis=0)

    def point(self, sets: Sequence[HeadSet], kind: str, fraction: float) -> Point:
        """What ablating these heads costs, over samples, each the mean over the sets."""
        found = self.ablated(sets, kind)
        return Point(fraction, len(sets[0]), accuracy_interval(found), self.lost(found), [h.to_json() for h in sets])

    @staticmethod
    def mean(correct: Float[np.ndarray, " sample"]) -> Interval:
        """Accuracy with its 95% interval over samples."""
        return accuracy_interval(correct)

    def lost(self, correct: Float[np.ndarray, " sample"]) -> Interval:
        """Clean accuracy minus this one, paired by sample."""
        return accuracy_difference(self.clean.correct, correct)

    def gap(self, control: Float[np.ndarray, " sample"], claimed: Float[np.ndarray, " sample"]) -> Interval:
        """How much more the claimed heads cost than the control, at the level that verdicts rest on."""
        return accuracy_difference(control, claimed, level=LEVEL)

    # --- what is kept -------------------------------------------------------------------------------------------------

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON), made once: it lies in the folder, whole or not at all."""
        return self.folder.kept(name, make)
