"""One model on one set of samples: the scores, prepared batches and runs that the findings share.

What takes time is stored in a folder as soon as it is computed (scores batch by batch, answers run
by run), so that a study that was stopped can be resumed.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from corelens.disk.write import append_line, write_whole
from corelens.evaluation.answers import Answer, Evaluation
from corelens.evaluation.decoding import Asked, ask
from corelens.evaluation.evaluate import batches, evaluate
from corelens.evaluation.late_runs import LateRuns
from corelens.evaluation.resume import plan_identity
from corelens.evaluation.sparse_run import answered_under
from corelens.evaluation.where_read import where_read
from corelens.findings import paired_cost
from corelens.findings.options import LARGE, LARGE_SAMPLES, LAST, PUBLISHED, READINGS, Options
from corelens.findings.time_limit import Limit
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions.knockouts import QUESTION_ON
from corelens.metrics.score import score_heads
from corelens.runs.folder import read_record, record_of
from corelens.runs.processes import Claims, Piece, carry_out, process
from corelens.runs.provenance import images_and_frames, pixels
from corelens.sparse import SparseInference

Correct = Float[np.ndarray, " sample"]
EVERY = ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8")


class World:
    """One model on one set of samples.

    Args:
        name: what reports call it.
        model: a HookedMLLM.
        samples: the first part scores heads, the rest tests them. If only some have regions, the
            others are left out.
        options: how thorough.
        folder: where its work is kept.
        advance: called with a few words at every step.
        limit: of the processor time; of this world alone if none is handed in.
        run: the digest of the study's identity, which each of its files carries.
    """

    def __init__(
        self, name: str, model: Any, samples: Sequence[Sample], options: Options, folder: Path,
        advance: Callable[[str], None] = lambda words: None, limit: Limit | None = None,
        run: str = "",
    ):  # fmt: skip
        self.name, self.model, self.options = name, model, options
        self.folder, self.advance, self.run = folder, advance, run
        self.limit = limit or Limit(folder, options.hours)
        marked = [sample for sample in samples if sample.regions]
        self.without_region = len(samples) - len(marked)
        self.samples = marked or list(samples)
        cut = min(max(round(len(self.samples) * options.score_share), 2), len(self.samples) - 2)
        self.to_score, self.to_test = self.samples[:cut], self.samples[cut:]
        parameters = sum(parameter.numel() for parameter in model.hf.parameters())
        if parameters > LARGE:
            self.to_test = self.to_test[:LARGE_SAMPLES]
        self.serves = tuple(self.samples[0].meta.get("serves", EVERY))
        folder.mkdir(parents=True, exist_ok=True)
        self.claims = Claims(folder)

    def of_few(self, n: int) -> "World":
        """The same scores, tested on the first n of the tested samples alone."""
        few = World(
            self.name, self.model, self.samples, self.options, self.folder / f"first {n}",
            self.advance, self.limit, self.run,
        )  # fmt: skip
        few.to_score, few.to_test = self.to_score, self.to_test[:n]
        few.__dict__["scores"] = self.scores
        return few

    def lacks(self, needs: Sequence[str]) -> str | None:
        """Why a finding that needs these ("regions", "answers", "text") cannot be measured here;
        None if it can."""
        if "regions" in needs and not self.samples[0].regions:
            return "the samples have no regions"
        if "text" in needs and not all(
            region.text for sample in self.samples for region in sample.regions
        ):
            return "the regions do not say what is written in them (text=)"
        if "answers" in needs and any(sample.answer is None for sample in self.samples):
            return "there are samples without answers"
        return None

    # --- what is scored

    @cached_property
    def scores(self) -> dict[str, HeadScores]:
        """RAM, its excess over an even spread, visual mass and precision at both groups of rows."""
        self.advance("scoring all heads")
        names = ("ram", "ram_excess", "visual_mass", "precision")
        keys = [f"{name}[rows=last]" if key == LAST else name for key in READINGS for name in names]
        return score_heads(
            self.model,
            self.to_score,
            keys,
            batch_size=self.options.batch_size,
            out=self.folder / "scores",
        )

    def score(self, name: str, reading: str) -> HeadScores:
        """The score of this name at the rows of a reading."""
        return self.scores[f"{name}[rows=last]" if reading == LAST else name]

    def top(self, reading: str, share: float) -> HeadSet:
        """The top heads of a reading."""
        return self.scores[reading].top(share)

    def every(self) -> HeadSet:
        """All heads that exist: layers may have fewer heads than others, or none."""
        return self.scores[PUBLISHED].top(1.0)

    def random_sets(self, reading: str, k: int, draws: int) -> list[HeadSet]:
        """Sets of k heads, drawn from all heads outside the reading's top k."""
        scores, seed = self.scores[reading], self.options.seed
        taken = scores.top(k=k)
        if 2 * k > len(self.every()):
            return []
        return [scores.random(k=k, seed=seed + draw, exclude=taken) for draw in range(draws)]

    # --- what is run

    @cached_property
    def by_size(self) -> list[int]:
        """The indices of the tested samples, in the order of their pictures' sizes: batches of like
        sizes have little padding."""

        def size(index: int) -> tuple[int, int]:
            sample = self.to_test[index]
            return sum(map(pixels, images_and_frames(sample))), len(sample.question or "")

        return sorted(range(len(self.to_test)), key=size)

    @cached_property
    def prepared(self) -> list[Inputs]:
        """The tested samples as batches in the order of `by_size`, their pictures encoded once."""
        self.advance("encoding the pictures")
        samples = [self.to_test[index] for index in self.by_size]
        return batches(self.model, samples, self.options.batch_size)

    @cached_property
    def asked(self) -> list[Asked]:
        """The prompts of these batches without answers, to be decoded step by step."""
        return ask(self.model, self.prepared)

    @cached_property
    def late_runs(self) -> LateRuns:
        """The tested samples, to be run under knockouts and ablations."""
        return LateRuns(self.model, self.prepared)

    @cached_property
    def clean(self) -> Evaluation:
        """The tested answers without any intervention."""

        def answers() -> list[dict[str, Any]]:
            self.advance("clean accuracy")
            answered = evaluate(self.model, self.prepared).per_sample
            by_index = dict(zip(self.by_size, answered, strict=True))
            return [asdict(by_index[index]) for index in range(len(answered))]

        return Evaluation([Answer(**answer) for answer in self.stored("clean", answers)])

    @cached_property
    def row_costs(self) -> dict[str, Any]:
        """What cutting the evidence off from each group of rows in all heads costs, on the scoring
        samples."""

        def measured() -> dict[str, Any]:
            self.advance("which rows the answer hangs on")
            costs = where_read(
                self.model, self.to_score, tokens=False, batch_size=self.options.batch_size
            ).costs
            return {
                rows: {"value": x.difference, "low": x.ci.low, "high": x.ci.high}
                for rows, x in costs.items()
            }

        return self.stored("row_costs", measured)

    def correct(self, key: str, run: Callable[[], Evaluation]) -> Correct:
        """1 where a tested sample is answered in this run, or its set's score; no run of the same
        key is repeated."""
        if key not in self._runs:
            self.limit.check()
            self.advance("intervening")
            with warnings.catch_warnings():
                # the point of a knockout
                warnings.filterwarnings("ignore", message=".*lost every edge.*")
                values = np.empty(len(self.to_test))
                values[self.by_size] = run().correct
            self._runs[key] = values
            rank = process()[0]  # (no process writes into the file of another)
            file = self.folder / (f"runs-{rank}.jsonl" if rank else "runs.jsonl")
            rounded = [round(float(value), 6) for value in values]
            append_line(file, record_of(self.run, key, rounded))
            self.limit.keep()
        return self._runs[key]

    @cached_property
    def _runs(self) -> dict[str, Correct]:
        files, runs = sorted(self.folder.glob("runs*.jsonl")), {}
        for file in files:
            for line in file.read_text("utf-8").splitlines():
                try:
                    key = json.loads(line)["name"]
                except (ValueError, KeyError, TypeError):  # torn by a kill: it is made again
                    continue
                runs[key] = np.array(read_record(file, self.run, key, line), dtype=float)
        return runs

    def knocked_out(
        self, heads: HeadSet | None, rows: str = QUESTION_ON, columns: str = "region"
    ) -> Correct:
        """The answers with the edges from `rows` to `columns` cut in these heads (all if None)."""
        key = f"knockout {rows} {columns} {'all' if heads is None else sorted(heads.to_json())}"
        return self.correct(key, lambda: self.late_runs.evaluate(heads, rows, columns))

    def only_seeing(self, heads: HeadSet) -> Correct:
        """The answers with the picture cut from every text token in all heads but these."""
        return self.knocked_out(self.every() - heads, "text", "visual")

    def ablated(self, heads: HeadSet, kind: str) -> Correct:
        """The answers with these heads ablated; kind: "zero", "uniform" or "knockout"."""
        if kind == "knockout":
            return self.knocked_out(heads)
        key = f"{kind} {sorted(heads.to_json())}"
        return self.correct(key, lambda: self.late_runs.ablated(heads, kind))

    def under(self, sparse: SparseInference | None) -> Correct:
        """The answers under sparse inference, decoded step by step; None: dense, by the same
        steps."""
        return self.correct(
            f"sparse {plan_identity(sparse)}",
            lambda: answered_under(self.model, self.asked, sparse),
        )

    def costs(self, changed: Correct) -> dict[str, float]:
        """Accuracy under an intervention and what it costs, with exact intervals; `relative` to
        clean accuracy."""
        cost = paired_cost.cost(self.clean.correct, changed)
        clean = self.clean.accuracy
        return {
            "accuracy": float(changed.mean()),
            **cost._asdict(),
            "relative": cost.value / clean if clean else 0.0,
        }

    @cached_property
    def tokens(self) -> int:
        """The median length of a prompt, in tokens."""
        inputs = self.model.prepare(self.to_test[:8])
        return int(np.median([len(token_map.all) for token_map in inputs.token_maps]))

    def release(self) -> None:
        """Free what takes memory; it is made again when it is needed."""
        for name in ("prepared", "asked", "late_runs"):
            self.__dict__.pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- what is kept

    def stored(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON), made once: it lies in the folder, whole or not at all.

        Raises:
            OutOfHours: the study's processor time is used up.
        """
        piece = self.piece(name, make)
        carry_out(self.claims, [piece])
        return self.read(name)

    def read(self, name: str) -> Any:
        """What is kept under this name."""
        file = self.folder / f"{name}.json"
        return read_record(file, self.run, name, file.read_bytes())

    def piece(self, name: str, make: Callable[[], Any]) -> Piece:
        """The work of keeping what `make` returns under this name, for processes to share."""
        file = self.folder / f"{name}.json"

        def write() -> None:
            self.limit.check()
            write_whole(file, record_of(self.run, name, make()))
            self.limit.keep()

        return Piece(file, 1, write)


def resampled(
    scores: HeadScores, seed: int, draws: int = 400
) -> Float[np.ndarray, "draw layer head"]:
    """The heads' mean scores in bootstrap samples."""
    assert scores.per_sample is not None
    n = len(scores.per_sample)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) / n
    means = np.einsum("dn,nlh->dlh", counts, np.nan_to_num(scores.per_sample))
    return np.where(np.isnan(scores.values), np.nan, means)


def interval(value: float, bootstraps: Sequence[float] | np.ndarray) -> dict[str, float]:
    """A value with the central 95% of its values in bootstrap samples."""
    low, high = np.quantile(np.asarray(bootstraps, dtype=float), [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def number_rows(values: Float[np.ndarray, "layer head"]) -> list[list[float | None]]:
    """The values of every layer as JSON, rounded; None for a head that does not exist."""
    return [
        [None if np.isnan(value) else round(float(value), 6) for value in row] for row in values
    ]
