"""Choosing a sparse setting: the fastest share of full heads and window whose accuracy stays near
the dense one's.

Every setting is answered on one part of the samples (calibration); the one chosen is then compared
with dense on the other part, which had no say: the best of many settings looks better than it is
where it was chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tqdm.auto import tqdm

from corelens.errors import CorelensError
from corelens.evaluation.answers import Evaluation, paired
from corelens.evaluation.decoding import ask
from corelens.evaluation.evaluate import batches, evaluate
from corelens.evaluation.sparse_account import left_pairs
from corelens.evaluation.sparse_run import answered_under, check_scores, machine
from corelens.evaluation.speed_report import Spread
from corelens.evaluation.timing import evenly_spaced, time_in_turns
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import Difference, Interval
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Sample
from corelens.model.hooked import HookedMLLM
from corelens.runs.provenance import about
from corelens.sparse.inference import SparseInference
from corelens.sparse.patterns import Streaming

TIMED = 2  # samples on which each setting is timed


@dataclass
class TriedPlan:
    """One setting, on the calibration samples.

    Args:
        share: of full heads. window: of the others.
        sparse: the setting itself.
        accuracy: with its 95% interval. difference: to dense, paired.
        pairs: the share of (query, key) pairs that is left.
        speedup: of the decoder's prefill; None if nothing was timed.
    """

    share: float
    window: int
    sparse: SparseInference
    accuracy: Interval
    difference: Difference
    pairs: float
    speedup: Spread | None

    @property
    def pace(self) -> float:
        """What settings are ranked by: the measured speed-up, or the operations saved if nothing
        was timed."""
        return self.speedup.median if self.speedup is not None else 1 / self.pairs

    @property
    def words(self) -> str:
        """ "5% of heads (5) full, window 16"."""
        return (
            f"{self.share:.0%} of heads ({len(HeadSet(self.sparse.heads or ()))}) full, window "
            f"{self.window}"
        )


@dataclass
class TunedSparse:
    """What `tune_sparse` found.

    Args:
        chosen: the fastest setting within the tolerance; None if there is none.
        curve: every setting tried.
        dense: the dense answers on the calibration samples.
        checked: the chosen setting on other samples, with its SpeedReport; None if none was chosen.
        target: the accuracy that was allowed to be lost.
    """

    chosen: TriedPlan | None
    curve: list[TriedPlan]
    dense: Evaluation
    checked: Evaluation | None
    target: float
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> SparseInference | None:
        """The chosen setting, ready to be used; None if none stays within the tolerance."""
        return None if self.chosen is None else self.chosen.sparse

    @property
    def verdict(self) -> str:
        """What was chosen, and whether it held on other samples."""
        if self.chosen is None or self.checked is None or self.checked.speed is None:
            closest = max(self.curve, key=lambda setting: setting.difference.difference)
            return (
                f"No setting stays within {self.target:g} of dense accuracy {self.dense.interval}. "
                f"The closest: {closest.words}, {closest.difference}."
            )
        held = (
            "held" if self.checked.speed.difference.difference >= -self.target else "did not hold"
        )
        return (
            f"{self.chosen.words}: {self.chosen.difference} on {len(self.dense.per_sample)} "
            f"calibration samples, {self.checked.speed.difference} on "
            f"{len(self.checked.per_sample)} others (the tolerance of {self.target:g} {held}). "
            f"{self.checked.speed.verdict}"
        )

    def plot(self) -> Any:
        """Accuracy over speed, a line a share of full heads; the chosen setting is ringed."""
        from corelens.viz.speed import trade_off

        timed = self.curve[0].speedup is not None
        by_share: dict[str, list[Any]] = {}
        for setting in self.curve:
            line = by_share.setdefault(f"{setting.share:.0%} full", [])
            line.append((setting.pace, *setting.accuracy, setting.window))
        return trade_off(
            by_share,
            self.dense.accuracy,
            self.target,
            "decoder prefill, dense time / sparse time"
            if timed
            else "attention operations, dense / sparse",
            None if self.chosen is None else (self.chosen.pace, self.chosen.accuracy.value),
        )

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(columns, rows) of every setting."""
        rows = []
        for setting in self.curve:
            speed = (
                "–"
                if setting.speedup is None
                else f"{setting.speedup.median:.2f}x [{setting.speedup[1]:.2f}, "
                f"{setting.speedup[2]:.2f}]"
            )
            rows.append(
                [
                    setting.words,
                    str(setting.accuracy),
                    str(setting.difference),
                    f"{setting.pairs:.0%}",
                    speed,
                ]
            )
        return ["setting", "accuracy", "minus dense", "pairs left", "prefill speed-up"], rows

    def _repr_html_(self) -> str:
        from corelens.viz.page import table, text
        from corelens.viz.view import image_html

        hot = [i for i, setting in enumerate(self.curve) if setting is self.chosen]
        parts = [text(self.verdict), table(*self.table(), "On the calibration samples.", hot=hot)]
        caption = text("Accuracy (95% CI) over speed; numbers are windows, the ring is the choice.")
        return "".join(map(str, [*parts, image_html(self.plot(), repr(self)), caption]))

    def __repr__(self) -> str:
        return f"TunedSparse({self.verdict})"

    def to_json(self) -> dict[str, Any]:
        """Every setting, the choice, and how it did on other samples."""

        def as_json(setting: TriedPlan) -> dict[str, Any]:
            return {
                "share": setting.share,
                "window": setting.window,
                "heads": HeadSet(setting.sparse.heads or ()).to_json(),
                "accuracy": setting.accuracy._asdict(),
                "difference": {
                    "value": setting.difference.difference,
                    **setting.difference.ci._asdict(),
                },
                "pairs": setting.pairs,
                "speedup": None if setting.speedup is None else setting.speedup._asdict(),
            }

        checked = (
            self.checked.speed.to_json()
            if self.checked is not None and self.checked.speed is not None
            else None
        )
        return {
            "format": "corelens-tuned/1",
            "target": self.target,
            "verdict": self.verdict,
            "dense": self.dense.interval._asdict(),
            "chosen": None if self.chosen is None else as_json(self.chosen),
            "curve": [as_json(setting) for setting in self.curve],
            "checked": checked,
            **self.meta,
        }


def tune_sparse(
    model: HookedMLLM,
    samples: Sequence[Sample],
    scores: HeadScores,
    target: float = 0.01,
    fractions: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.4),
    windows: Sequence[int] | None = None,
    sink: int | None = None,
    last: int = 0,
    decode: Literal["full", "streaming"] = "full",
    engine: str = "auto",
    calibration: float = 0.5,
    rounds: int = 3,
    batch_size: int = 32,
    progress: bool = False,
) -> TunedSparse:
    """The fastest setting whose accuracy is at most `target` below dense, chosen on one part of the
    samples.

    Args:
        model: a HookedMLLM.
        samples: questions with answers; not those that the scores were taken from.
        scores: which heads are kept full first.
        target: the accuracy that may be lost, 0 to 1: 0.01 is one answer in a hundred.
        fractions: shares of heads to try as the full ones.
        windows: by default five or fewer powers of two, from 1/32 to 1/2 of the longest prompt.
        sink: by default 1/64 of the longest prompt, at most 128.
        last: rows of the prompt that see everything; where they cover the question, the heads
            hardly matter.
        calibration: the share of the samples that the setting is chosen on.
        rounds: how often each setting's time is taken beside dense; 0: settings are ranked by
            operations, not by time.

    Raises:
        CorelensError: scores of another model, fewer than 4 samples, a target outside [0, 1).
    """
    check_scores(scores, model.cfg)
    if not 0 <= target < 1:
        raise CorelensError(
            f"target={target!r}",
            "the accuracy that may be lost, from 0 to 1",
            "0.01 is one in a hundred",
        )
    if not len(fractions) or (windows is not None and not len(windows)):
        raise CorelensError(
            "no settings to choose from",
            "fractions and windows to try",
            "leave them out for the usual",
        )
    cut = round(len(samples) * calibration)
    if len(samples) < 4 or not 2 <= cut <= len(samples) - 2:
        raise CorelensError(
            f"{len(samples)} samples, {cut} of them for calibration",
            "two or more to choose on, and two or more others",
            "give more samples, or another share",
        )
    to_tune, to_check = samples[:cut], samples[cut:]
    prepared = batches(model, to_tune, batch_size)
    asked = ask(model, prepared)
    lengths = [len(token_map.all) for batch in asked for token_map in batch.inputs.token_maps]
    longest = max(lengths)
    windows = list(windows) if windows is not None else _windows(longest)
    sink = min(128, max(1, longest // 64)) if sink is None else sink
    dense, curve = answered_under(model, asked), []
    timed = evenly_spaced(to_tune, TIMED)
    with tqdm(total=len(fractions) * len(windows), disable=not progress, desc="settings") as bar:
        for share in fractions:
            for window in windows:
                pattern = Streaming(sink=sink, window=window, last=last)
                sparse = SparseInference(scores.top(share), pattern, decode=decode, engine=engine)
                run, speedup = answered_under(model, asked, sparse), None
                if rounds:
                    ours, theirs, _ = time_in_turns(
                        model, timed, sparse, rounds=rounds, new_tokens=2
                    )
                    ratios = zip(ours.seconds["prefill"], theirs.seconds["prefill"], strict=True)
                    speedup = Spread.of(
                        [dense_time / sparse_time for dense_time, sparse_time in ratios]
                    )
                pairs = left_pairs(sparse, model.cfg, lengths)
                assert pairs is not None  # of Streaming it is always known
                curve.append(
                    TriedPlan(
                        share, window, sparse, run.interval, paired(run, dense), pairs, speedup
                    )
                )
                bar.update()
    within = [setting for setting in curve if setting.difference.difference >= -target]
    best = max(within, key=lambda setting: (setting.pace, setting.accuracy.value), default=None)
    checked = None
    if best is not None:
        checked = evaluate(
            model, to_check, batch_size=batch_size, sparse=best.sparse, rounds=max(1, rounds)
        )
    settings: dict[str, Any] = {
        "sink": sink,
        "last": last,
        "decode": decode,
        "calibration": len(to_tune),
        "held_out": len(to_check),
    }
    settings |= {"metric": scores.label, "machine": machine(model)}
    return TunedSparse(best, curve, dense, checked, target, about(model) | settings)


def _windows(longest: int) -> list[int]:
    powers = [2**n for n in range(2, 24)]
    return [power for power in powers if longest / 32 <= power <= longest / 2] or [4]
