"""Which rows the answer hangs on: the evidence is cut off from all heads, one group of rows after
the other.

Attention shows where heads look, not what the answer needs. A ranking of heads at rows whose cut
costs nothing finds heads that look and are not needed.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from rich.progress import Progress
from torch import Tensor

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.evaluation.evaluate import batches
from corelens.evaluation.late_runs import LateRuns
from corelens.evaluation.lists import listed
from corelens.evaluation.resume import samples_folder
from corelens.heads.intervals import CI, Difference, Interval, accuracy_difference, mean_interval
from corelens.inputs.sample import Sample, as_sample
from corelens.metrics.registry import metric
from corelens.model.hooked import HookedMLLM
from corelens.runs.processes import carry_out, check_folder
from corelens.tokens.regions import no_region
from corelens.tokens.token_map import TokenMap

NAMES = ("question", "template", "last", "answer")  # groups that are also names of rows
FORMAT = "corelens.row_costs/1"


@dataclass
class RowCosts:
    """What it costs to cut the evidence off from groups of rows, in all heads.

    Groups: "question" (its tokens together), "question[0]", "question[1]" … (each alone, counted
    from the first), "template" (the text around the question), "last" (the row that predicts the
    first answer token), "answer" (the rows that predict the answer's other tokens; absent where
    answers have one token), and "all" of them.

    Args:
        costs: {group: accuracy lost}, paired by sample, with its 95% interval (Newcombe's, as
            `cl.paired`).
        logprob_costs: {group: log-probability of the gold answer lost} (nats), with a bootstrap
            interval.
        counts: {group: how many samples have such rows}; the others are left out of the group.
        texts: {group: the token's text}, for single tokens ("…" behind it where samples differ).
        clean: accuracy without any cut.
        meta: the model and the samples.
    """

    costs: dict[str, Difference]
    logprob_costs: dict[str, Difference]
    counts: dict[str, int]
    texts: dict[str, str]
    clean: Interval
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> str:
        """The costliest group whose name can be given as `rows=`; of equal ones the costlier in
        log-probability."""
        names = [name for name in NAMES if name in self.costs]
        return max(
            names,
            key=lambda name: (self.costs[name].difference, self.logprob_costs[name].difference),
        )

    def hurts(self, rows: str) -> bool:
        """Whether cutting these rows off from the evidence costs accuracy: the interval lies above
        0.

        Args:
            rows: a name as scores carry it in `meta["rows"]`, or several joined by "+": then
                whether one of them hurts.
        """
        parts = [part.strip() for part in rows.split("+")]
        known = [part if part in self.costs else "all" for part in parts]
        if parts == ["answer"]:  # as rows, "answer" holds the last row, too
            known.append("last")
        return any(self.costs[part].ci.low > 0 for part in known)

    @property
    def conclusion(self) -> str:
        """One sentence: at which rows the evidence is needed, if a cut at any of them certainly
        costs accuracy."""
        best = self.costs[self.rows]
        if best.ci.low > 0:
            return f"the answer hangs on rows={self.rows}"
        return (
            f"no group of rows costs accuracy beyond its interval (n={self.counts[self.rows]}): "
            "too few samples, or the answer does not hang on the evidence"
        )

    def advice(self, scores: Any) -> str | None:
        """What to know about a ranking before its heads are ablated; None if its rows are those
        that matter.

        Args:
            scores: a HeadScores, whose `meta` says at which rows it was read.
        """
        best = self.costs[self.rows]
        if best.ci.low <= 0:
            return (
                f"cutting the evidence off from all heads costs {points(self.costs['all'])} at all "
                "rows together and "
                f"{points(best)} in any one group: these answers (accuracy {self.clean.value:.2f}) "
                "do not hang on it"
            )
        rows = str(scores.meta.get("rows") or "")
        if not rows or self.hurts(rows):
            return None
        cost = self.costs.get(rows)
        own = "" if cost is None else f" (cutting rows={rows} off from it costs {points(cost)})"
        return (
            f"{scores.label}: these heads look, and the answer does not need it{own}; "
            f"rows={self.rows} costs {points(best)}: try '{self.better_key(scores)}'"
        )

    def better_key(self, scores: Any) -> str:
        """The key of the same metric at the rows that matter; of RAM if the scores are of no metric
        here."""
        try:
            return metric(str(scores.meta.get("key")), rows=self.rows).key
        except CorelensError:
            return metric("ram", rows=self.rows).key

    def plot(self) -> Any:
        """A matplotlib figure: a bar a group of rows, what cutting it costs in accuracy, with its
        interval."""
        from corelens.viz.curves import cost_bars

        labels = [
            f"{group}  {self.texts[group]!r}" if group in self.texts else group
            for group in self.costs
        ]
        return cost_bars(labels, [(cost.difference, *cost.ci) for cost in self.costs.values()])

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "format": FORMAT,
            "rows": self.rows,
            "clean": self.clean._asdict(),
            "groups": {
                group: {
                    "cost": [cost.difference, *cost.ci],
                    "logprob_cost": [
                        self.logprob_costs[group].difference,
                        *self.logprob_costs[group].ci,
                    ],
                    "samples": self.counts[group],
                    "text": self.texts.get(group),
                }
                for group, cost in self.costs.items()
            },
            **self.meta,
        }

    def save(self, path: str | Path) -> None:
        """Write the numbers as JSON."""
        write_whole(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> "RowCosts":
        """Read what `save` wrote."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            groups = stored["groups"]
            if stored["format"] != FORMAT:
                raise ValueError(stored["format"])

            def costs(key: str) -> dict[str, Difference]:
                return {name: Difference(x[key][0], CI(*x[key][1:])) for name, x in groups.items()}

            known = ("format", "rows", "clean", "groups")
            return cls(
                costs("cost"),
                costs("logprob_cost"),
                {name: x["samples"] for name, x in groups.items()},
                {name: x["text"] for name, x in groups.items() if x["text"] is not None},
                Interval(**stored["clean"]),
                {name: value for name, value in stored.items() if name not in known},
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise CorelensError(
                f"{path}, which cannot be read ({type(error).__name__}: {error})",
                "what RowCosts.save wrote",
                "measure again: cl.where_read(model, samples).save(path)",
            ) from error

    def table(self) -> list[tuple[str, str, str, str]]:
        """(group, samples, accuracy lost, log-probability lost), a line for each group, the single
        tokens last."""
        order = sorted(self.costs, key=lambda group: "[" in group)
        return [
            (
                f"{group} {self.texts[group]!r}" if group in self.texts else group,
                str(self.counts[group]),
                str(self.costs[group]),
                str(self.logprob_costs[group]),
            )
            for group in order
        ]

    def __str__(self) -> str:
        text = [
            f"accuracy {self.clean}; lost with the evidence cut off from all heads, at these rows:"
        ]
        text += [f"  {group:<24} {cost}  (n={n})" for group, n, cost, _ in self.table()]
        return "\n".join([*text, self.conclusion])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(str(self))}</pre>"


def points(cost: Difference) -> str:
    """A difference of accuracies in words: "99 points"."""
    return f"{100 * cost.difference:.0f} points"


def where_read(
    model: HookedMLLM,
    samples: Sequence[Sample],
    tokens: bool = True,
    batch_size: int = 32,
    columns: str = "region",
    progress: bool = False,
    out: str | Path | None = None,
) -> RowCosts:
    """Cut the evidence off from all heads at one group of rows after the other, and measure what
    the answers lose.

    Use the samples that heads are scored on, not those that ablations are then tested on.

    Args:
        model: a HookedMLLM.
        samples: questions with regions and answers (a list, or a world's name).
        tokens: also each token of the question alone.
        batch_size: samples a forward.
        columns: what is cut off: "region", "visual", …
        progress: show a bar.
        out: a run folder: what is lost at each group of rows is kept, a run that was stopped goes
            on, and the processes of `accelerate launch` or `torchrun` share the groups.
    Raises:
        CorelensError: no sample; a sample without a region or an answer; a stream; a run folder of
            another run.
    """
    check_folder(out)
    values = listed(samples, "where_read", "every group of rows is one more run of all")
    samples = [as_sample(value) for value in values]  # (prepared inputs have no regions to check)
    check_marked(samples, columns)
    prepared = batches(model, samples, batch_size)
    runs = LateRuns(model, prepared)
    token_maps = [token_map for inputs in prepared for token_map in inputs.token_maps]
    groups = _groups(token_maps, tokens)
    sizes = [len(inputs) for inputs in prepared]
    clean = runs.clean

    def cut(rows: Sequence[Int[Tensor, " _"]]) -> list[list[float]]:
        """Of each sample, without these rows: whether it is answered, and its log-probability."""
        evaluation = runs.evaluate(None, _by_batch(rows, sizes), columns)
        return [evaluation.correct.tolist(), evaluation.logprobs.tolist()]

    measured: dict[str, list[list[float]]] = {}
    if out is None:
        with Progress(transient=True, disable=not progress) as bar:
            task = bar.add_task("cutting off rows", total=len(groups))
            for group, rows in groups.items():
                measured[group] = cut(rows)
                bar.advance(task)
    else:
        options: dict[str, Any] = {
            "run": "where_read",
            "columns": columns,
            "batch_size": batch_size,
        }
        with samples_folder(model, samples, out, **options) as folder:
            pieces = [folder.piece(group, 1, partial(cut, rows)) for group, rows in groups.items()]
            carry_out(folder.claims, pieces, progress, unit="group")
            measured = {group: folder.read(group) for group in groups}
    costs: dict[str, Difference] = {}
    logprob_costs: dict[str, Difference] = {}
    for group, rows in groups.items():
        has = np.array([len(of_sample) > 0 for of_sample in rows])
        correct, logprobs = map(np.array, measured[group])
        costs[group] = _difference(accuracy_difference(clean.correct[has], correct[has]))
        logprob_costs[group] = _difference(mean_interval((clean.logprobs - logprobs)[has]))
    return RowCosts(
        costs,
        logprob_costs,
        {group: sum(len(of_sample) > 0 for of_sample in rows) for group, rows in groups.items()},
        _texts(model, prepared, groups),
        clean.interval,
        {"n": len(samples), "columns": columns, "samples": [sample.id for sample in samples]},
    )


def check_marked(samples: Sequence[Sample], columns: str = "region") -> None:
    """Raise for no samples, and for one without the region that is to be cut off."""
    blind = [sample.id for sample in samples if not sample.regions and columns == "region"]
    if blind:
        raise no_region(blind[0])
    if not samples:
        raise CorelensError(
            "no samples",
            "questions with answers and with regions that can be cut off",
            "give a list of samples, for instance cl.synthetic('refer', 64)",
        )


def _groups(token_maps: Sequence[TokenMap], tokens: bool) -> dict[str, list[Int[Tensor, " _"]]]:
    """{group: the rows of each sample}; groups that no sample has are left out."""
    nothing = torch.empty(0, dtype=torch.long)
    questions = [token_map.parts.get("question", nothing) for token_map in token_maps]
    groups = {
        "question": questions,
        "template": [token_map.template for token_map in token_maps],
        "last": [token_map.last for token_map in token_maps],
        # the first is the last row
        "answer": [(token_map.answer - 1)[1:] for token_map in token_maps],
    }
    groups["all"] = [torch.cat(of_sample) for of_sample in zip(*groups.values(), strict=True)]
    for number in range(max(map(len, questions)) if tokens else 0):
        groups[f"question[{number}]"] = [question[number : number + 1] for question in questions]
    return {group: rows for group, rows in groups.items() if any(map(len, rows))}


def _by_batch(rows: Sequence[Int[Tensor, " _"]], sizes: Sequence[int]) -> list[Int[Tensor, "_ _"]]:
    """The samples' rows as one table a batch, padded with −1."""
    tables, start = [], 0
    for size in sizes:
        of_batch = list(rows[start : start + size])
        tables.append(torch.nn.utils.rnn.pad_sequence(of_batch, batch_first=True, padding_value=-1))
        start += size
    return tables


def _texts(
    model: HookedMLLM, prepared: Sequence[Any], groups: dict[str, list[Tensor]]
) -> dict[str, str]:
    """{group: text} of the groups of single tokens: the most common token, "…" behind it where
    samples differ."""
    ids = [line for inputs in prepared for line in inputs.tensors["input_ids"].cpu()]
    texts = {}
    for group, rows in groups.items():
        if "[" in group:
            each = Counter(int(line[of[0]]) for line, of in zip(ids, rows, strict=True) if len(of))
            common = model.tokenizer.decode([each.most_common(1)[0][0]])
            texts[group] = common if len(each) == 1 else f"{common}…"
    return texts


def _difference(interval: Interval) -> Difference:
    return Difference(interval.value, interval.ci)
