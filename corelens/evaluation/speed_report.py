"""What a sparse run gained and what it cost, against the dense run: numbers only, and what must be
said of them.

The limit. Of the pairs (query, key) that causal attention computes over a prompt of T tokens, T (T
+ 1) / 2 a head, a sparse plan leaves the share p. If attention takes the share a of a phase's time
in the dense run, the operation count allows the phase to be 1 / (1 − a + a p) times as fast (Amdahl
1967), and attention itself 1 / p times. `reached` is the measured speed-up divided by that limit.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.heads.intervals import CI, Difference, Interval

FORMAT = "corelens-speed/1"
PHASES = {  # what is timed → what it is called
    "vision": "vision tower",
    "prefill": "decoder prefill",
    "attention": "attention alone",
    "decode": "decode a token",
    "end_to_end": "end to end",
}


class Spread(NamedTuple):
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> "Spread":
        """Of these numbers."""
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))


@dataclass
class Side:
    """The dense or the sparse runs.

    Args:
        seconds: phase → one number a run; run i of one side was timed next to run i of the other.
        peak_bytes: the peak of memory during a generation over what was held before; None where it
            cannot be read.
        kv_bytes: keys and values held after the last step; None for a cache that does not say.
        accuracy: over the samples, with its 95% interval.
        answer_logprob: mean log-probability of the gold answer (nats).
    """

    seconds: dict[str, list[float]]
    peak_bytes: int | None
    kv_bytes: int | None
    accuracy: Interval
    answer_logprob: float


@dataclass
class SpeedReport:
    """Sparse against dense: the same samples, timed in turns.

    Args:
        dense, sparse: the two sides.
        difference: accuracy of sparse minus dense, paired by sample, with its 95% interval.
        agreement: share of samples in which greedy decoding writes the same under both, as far as
            it was followed (up to the first token that is not the gold answer's).
        kl: KL(dense ‖ sparse) where the gold answer's tokens are predicted (nats), mean over
            tokens, then samples.
        pairs: the share p of (query, key) pairs that the plan leaves, over the samples timed; None
            if unknown.
        tokens: prompt and visual tokens of the samples timed, and how many tokens were generated in
            each run.
        samples: how many samples were answered.
        engine: what computed the sparse prefill, by name; several if layers differ.
        plan: what was left out.
        notes: what must be said of this comparison.
        meta: model, versions, machine.
    """

    dense: Side
    sparse: Side
    difference: Difference
    agreement: Interval
    kl: Interval
    pairs: float | None
    tokens: dict[str, list[int]]
    samples: int
    engine: str
    plan: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, seconds in self.dense.seconds.items():
            if not seconds or len(seconds) != len(self.sparse.seconds.get(name, ())):
                raise CorelensError(
                    f"{len(seconds)} dense and {len(self.sparse.seconds.get(name, ()))} sparse "
                    f"runs of {name!r}",
                    "as many of both, one or more", "time them in turns",
                )  # fmt: skip

    @property
    def phases(self) -> list[str]:
        """What was timed, in the order of PHASES."""
        return [name for name in PHASES if name in self.dense.seconds]

    def speedup(self, phase: str) -> Spread:
        """Dense time / sparse time of runs made next to each other; above 1 sparse is faster."""
        return Spread.of(np.divide(self.dense.seconds[phase], self.sparse.seconds[phase]))

    def limit(self, phase: str) -> float | None:
        """The speed-up that the operation count allows; None where it is not known, and for what
        decoding changes."""
        decodes = ["decode"]
        if self.plan.get("kv_budget") or self.plan.get("decode") == "streaming":
            # pairs are the prefill's: what is saved at decoding is not among them
            decodes.append("end_to_end")
        if self.pairs is None or phase not in self.phases or phase in ("vision", *decodes):
            return None
        if phase == "attention":
            return 1 / self.pairs if self.pairs else None
        if "attention" not in self.phases:
            return None
        share = float(
            np.median(np.divide(self.dense.seconds["attention"], self.dense.seconds[phase]))
        )
        return 1 / (1 - share + share * self.pairs)

    def reached(self, phase: str) -> float | None:
        """The share of the limit that was reached: measured speed-up / limit."""
        limit = self.limit(phase)
        return None if limit is None else self.speedup(phase).median / limit

    @property
    def verdict(self) -> str:
        """Faster or slower: of the whole, then of its parts. A difference within the quartiles is
        none."""
        words = {-1: "slower than", 0: "neither faster nor slower than", 1: "faster than"}
        speedups = []
        for phase in ("end_to_end", "prefill", "decode"):
            ratio = self.speedup(phase)
            speedups.append(
                f"{PHASES[phase]} {ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
            )
        whole = self.speedup("end_to_end")
        start = words[int(whole.low > 1) - int(whole.high < 1)]
        return (
            f"Sparse is {start} dense: {', '.join(speedups)} (dense time / sparse time, median "
            "and quartiles)."
        )

    @property
    def answers(self) -> str:
        """Accuracy of both sides and how far the answers agree, in one sentence."""
        return (
            f"Accuracy on {self.samples} samples: dense {self.dense.accuracy}, sparse "
            f"{self.sparse.accuracy}, difference {self.difference}; {self.agreement.value:.1%} of "
            f"the answers agree, KL(dense ‖ sparse) {self.kl.value:.2g} nats."
        )

    @property
    def caption(self) -> str:
        """What was timed, in one line."""
        prompt, visual = (_range(self.tokens[name]) for name in ("prompt", "visual"))
        return (
            f"{prompt} prompt tokens, {visual} of them visual; engine {self.engine}; "
            f"{len(self.dense.seconds['prefill'])} runs a side, in turns; "
            f"{self.meta.get('machine', '')}"
        )

    @property
    def planned(self) -> str:
        """What was left out, in one line: which heads see all, what the others see, and the share
        of (query, key) pairs that is left."""
        full = [f"L{layer}H{head}" for layer, head in self.plan.get("heads") or ()]
        parts = []
        if full:
            parts.append(f"full heads: {', '.join(full[:12])}{' …' if len(full) > 12 else ''}")
        if self.plan.get("pattern"):
            parts.append(f"{'the others' if full else 'all heads'}: {self.plan['pattern']}")
        if self.plan.get("kv_budget"):
            parts.append(str(self.plan["kv_budget"]))
        if self.pairs is not None:
            parts.append(f"{self.pairs:.0%} of the (query, key) pairs left")
        return "; ".join(parts)

    def table(self, quartiles: bool = True) -> tuple[list[str], list[list[str]]]:
        """(columns, rows): by phase dense, sparse, ratio, what operations allow, the share of it
        reached."""
        made = []
        for phase in self.phases:
            sides = [
                _time(Spread.of(side.seconds[phase]), quartiles)
                for side in (self.dense, self.sparse)
            ]
            ratio, limit, reached = self.speedup(phase), self.limit(phase), self.reached(phase)
            made.append(
                [PHASES[phase], *sides, f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"]
            )
            made[-1] += [
                "–" if limit is None else f"{limit:.2f}x",
                "–" if reached is None else f"{reached:.0%}",
            ]
        for words, name in (("peak memory", "peak_bytes"), ("KV cache", "kv_bytes")):
            dense, sparse = getattr(self.dense, name), getattr(self.sparse, name)
            if dense and sparse:
                made.append([words, size(dense), size(sparse), f"{dense / sparse:.2f}x", "–", "–"])
        return ["", "dense", "sparse", "dense / sparse", "limit", "reached"], made

    # --- looking

    def show(self) -> Any:
        """Print the table and what must be said of it; returns the figure."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        console, (columns, rows) = Console(), self.table(quartiles=False)
        table = Table(
            box=SIMPLE_HEAD, padding=(0, 1), title=escape(self.caption), title_justify="left",
            caption="limit: what the operation count allows; reached: the speed-up as a share of "
            "it",
        )  # fmt: skip
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for words in (
            self.planned,
            self.verdict,
            self.answers,
            *(f"Note: {note}" for note in self.notes),
        ):
            console.print(escape(words), highlight=False)
        return self.plot()

    def plot(self, **options: Any) -> Any:
        """Times of both sides and the speed-ups beside their limits, as a matplotlib figure."""
        from corelens.viz.speed import speed_bars

        return speed_bars(self, **options)

    def _repr_html_(self) -> str:
        from corelens.viz.view import image_html

        return f"{self._words()}{image_html(self.plot(), repr(self))}"

    def _words(self) -> Any:
        from corelens.viz.page import html, note, table, text

        return html("").join(
            [
                table(*self.table(), self.caption),
                text(self.verdict, self.answers),
                *([note(*self.notes)] if self.notes else []),
            ]
        )

    def __repr__(self) -> str:
        ratios = ", ".join(
            f"{PHASES[phase]} {self.speedup(phase).median:.2f}x" for phase in self.phases
        )
        return f"SpeedReport({ratios}; accuracy {self.difference}; engine {self.engine})"

    # --- files

    def to_json(self) -> dict[str, Any]:
        """Every number, each run's time among them."""
        named = {
            name: asdict(value) | {"accuracy": value.accuracy._asdict()}
            for name, value in (("dense", self.dense), ("sparse", self.sparse))
        }
        return {
            "format": FORMAT,
            **named,
            "difference": {"value": self.difference.difference, **self.difference.ci._asdict()},
            "agreement": self.agreement._asdict(),
            "kl": self.kl._asdict(),
            "pairs": self.pairs,
            "speedup": {phase: self.speedup(phase)._asdict() for phase in self.phases},
            "limit": {phase: self.limit(phase) for phase in self.phases},
            "reached": {phase: self.reached(phase) for phase in self.phases},
            "verdict": self.verdict,
            **{
                name: getattr(self, name)
                for name in ("tokens", "samples", "engine", "plan", "notes", "meta")
            },
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "SpeedReport":
        """What `to_json` gave."""
        if stored.get("format") != FORMAT:
            raise CorelensError(
                f"JSON of the format {stored.get('format')!r}", FORMAT, "give what to_json() gave"
            )
        dense, sparse = (
            Side(**{**stored[name], "accuracy": Interval(**stored[name]["accuracy"])})
            for name in ("dense", "sparse")
        )
        differs = stored["difference"]
        same = ("pairs", "tokens", "samples", "engine", "plan", "notes", "meta")
        return cls(
            dense,
            sparse,
            difference=Difference(differs["value"], CI(differs["low"], differs["high"])),
            agreement=Interval(**stored["agreement"]),
            kl=Interval(**stored["kl"]),
            **{name: stored[name] for name in same},
        )

    def save(self, path: str | Path) -> None:
        """Write it: as a page if the name ends in .html, else as JSON, which `SpeedReport.load`
        reads back."""
        path = Path(path)
        content = (
            self.to_html()
            if path.suffix == ".html"
            else json.dumps(self.to_json(), indent=1, ensure_ascii=False)
        )
        write_whole(path, content)

    def to_html(self) -> str:
        """A whole page, to be read offline."""
        from corelens.viz.page import figure, page, section

        about = {name: value for name, value in self.meta.items() if value not in (None, "", 0)}
        about["versions"] = ", ".join(
            f"{name} {number}" for name, number in self.meta.get("versions", {}).items()
        )
        about |= {name: value for name, value in self.plan.items() if value not in (None, "", [])}
        caption = (
            "Speed-ups with quartiles of runs, and what the operation count allows; "
            "accuracy with 95% intervals."
        )
        body = section("", self._words(), figure(self.plot(), caption))
        return page(f"Sparse inference: {about.get('model', '')}", [body], about)

    @classmethod
    def load(cls, path: str | Path) -> "SpeedReport":
        """Read what `save` wrote."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CorelensError):
                raise
            raise CorelensError(
                f"{path}, which could not be read ({error})", "a file that save() wrote", "check it"
            ) from error


def size(count: float) -> str:
    """Bytes in words: 512 B, 3.1 MB, 2.4 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1000
    raise AssertionError


def _time(spread: Spread, quartiles: bool) -> str:
    scale, unit = (1, "s") if spread.median >= 1 else (1e3, "ms")
    around = f" [{spread.low * scale:.3g}, {spread.high * scale:.3g}]" if quartiles else ""
    return f"{spread.median * scale:.3g} {unit}{around}"


def _range(values: list[int]) -> str:
    return str(values[0]) if min(values) == max(values) else f"{min(values)} to {max(values)}"
