"""One page on one head: its scores, what it attends to, where it does so best and worst, and what
it is good for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.evaluation.answers import Evaluation
from corelens.evaluation.evaluate import batches, evaluate
from corelens.evaluation.sweep import hooks_of
from corelens.heads.intervals import Interval, accuracy_difference, mean_interval
from corelens.heads.scores import Head, HeadScores, HeadSet
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions.ablation import mean_z

KINDS = ("zero", "mean", "knockout")
PARTS = ("region", "rest of the picture", "question", "first token", "other text")


@dataclass
class Ablation:
    """What the samples lose without this head: clean minus ablated, paired by sample, with 95%
    intervals."""

    accuracy: Interval  # under the ablation
    lost: Interval  # accuracy lost
    logprob_lost: Interval  # log-probability of the gold answer lost (nats)


@dataclass(eq=False)
class HeadProfile:
    """What is known of one head. `masses[part]` is what it attends to, [sample], at the rows named
    in `meta`."""

    head: Head
    scores: dict[str, HeadScores]
    masses: dict[str, Float[np.ndarray, " sample"]]
    samples: list[Sample] = field(repr=False)
    # sample → the picture with this head's attention on it
    looks: dict[int, Any] = field(repr=False)
    clean: Evaluation | None
    ablations: dict[str, Ablation]
    meta: dict[str, Any]

    def rank(self, key: str) -> int:
        """Its rank by a score, 1 for the highest head."""
        return list(self.scores[key].top(1.0)).index(self.head) + 1

    @property
    def order(self) -> list[int]:
        """The samples, from the one in which the head puts most on the region to the one in which
        it puts least."""
        return [int(i) for i in np.argsort(-self.masses["region"], kind="stable")]

    def plot(self) -> Any:
        """What it attends to, over samples, and its rank among all heads: a matplotlib figure."""
        from corelens.viz.profile_page import profile_figure

        return profile_figure(self)

    def page(self) -> str:
        """The page, one offline HTML document."""
        from corelens.viz.profile_page import profile_page

        return profile_page(self)

    def save(self, path: str | Path) -> None:
        """Write the page."""
        write_whole(path, self.page())

    def _repr_html_(self) -> str:
        from corelens.viz.profile_page import profile_html

        return profile_html(self)

    def __repr__(self) -> str:
        ranks = ", ".join(
            f"{key} {scores.values[self.head]:.3g} (rank {self.rank(key)} of {scores.values.size})"
            for key, scores in self.scores.items()
        )
        return f"HeadProfile({self.head}: {ranks}; region {self.masses['region'].mean():.3f})"

    def to_json(self) -> dict[str, Any]:
        """Every number of the page."""
        return {
            "head": list(self.head),
            "scores": {
                key: {
                    "value": float(entry.values[self.head]),
                    "rank": self.rank(key),
                    "of": entry.values.size,
                }
                for key, entry in self.scores.items()
            },
            "masses": {part: mass.tolist() for part, mass in self.masses.items()},
            "samples": [sample.id for sample in self.samples],
            "clean": None if self.clean is None else self.clean.interval._asdict(),
            "ablations": {
                kind: {
                    name: getattr(entry, name)._asdict()
                    for name in ("accuracy", "lost", "logprob_lost")
                }
                for kind, entry in self.ablations.items()
            },
            **self.meta,
        }


def head_profile(
    model: Any,
    samples: Sequence[Sample],
    scores: HeadScores | Mapping[str, HeadScores],
    head: Any,
    rows: str | None = None,
    reduce: str | None = None,
    examples: int = 3,
    batch_size: int = 32,
) -> HeadProfile:
    """Look at one head: its scores, what it attends to, its best and worst samples, what its
    ablation does.

    Args:
        model: a HookedMLLM.
        samples: questions with regions; those without answers leave the ablations out.
        scores: of all heads, one or several ({key: HeadScores}, as `score_heads` returns them); the
            first ranks.
        head: (layer, head), or its name "L3H5".
        rows: whose attention; by default the rows of the first score, else the question's.
        reduce: "mean": all of a sample's rows; "max": the one that puts most on the region. By
            default as the first score is, else "mean".
        examples: how many best and worst samples are shown.
        batch_size: samples in one forward.
    Returns:
        A HeadProfile; a notebook shows it, `.save(path)` writes the page.
    """
    named = {scores.label: scores} if isinstance(scores, HeadScores) else dict(scores)
    samples = list(samples)
    if not named or not samples:
        raise CorelensError(
            f"{len(named)} scores and {len(samples)} samples",
            "one score and one sample at least",
            "see score_heads",
        )
    profiled = Head.of(head)
    for ranking in named.values():
        HeadSet(profiled).check(*ranking.values.shape)
    rows = rows or str(next(iter(named.values())).meta.get("rows") or "question")
    reduce = reduce or str(next(iter(named.values())).meta.get("reduce") or "mean")
    weights = _attention(model, samples, profiled, rows, reduce, batch_size)
    masses = {part: np.array([float(row[part]) for row, _ in weights]) for part in PARTS}
    profile = HeadProfile(
        profiled,
        named,
        masses,
        samples,
        {},
        None,
        {},
        {"rows": rows, "reduce": reduce, "family": model.cfg.family},
    )
    best_and_worst = dict.fromkeys([*profile.order[:examples], *profile.order[-examples:]])
    profile.looks.update(
        _looks(model, {index: (samples[index], weights[index][1]) for index in best_and_worst})
    )
    if all(sample.answer is not None for sample in samples):
        prepared = batches(model, samples, batch_size)
        profile.clean = clean = evaluate(model, prepared)
        reference = mean_z(model, samples, batch_size=batch_size)
        for kind in KINDS:
            run = evaluate(model, prepared, hooks_of(kind, HeadSet(profiled), reference))
            profile.ablations[kind] = Ablation(
                run.interval,
                accuracy_difference(clean.correct, run.correct),
                mean_interval(clean.logprobs - run.logprobs),
            )
    return profile


def _attention(
    model: Any, samples: list[Sample], head: Head, rows: str, reduce: str, batch_size: int
) -> list[tuple[dict[str, Tensor], Float[Tensor, " key"]]]:
    """Per sample what the head puts on each part, and its attention on every token of the sample's
    unpadded row."""
    from corelens.viz.overlays import chosen_row

    attention: list[tuple[dict[str, Tensor], Tensor]] = []

    def look(pattern: Float[Tensor, "batch row key"], hook: Any) -> None:
        inputs: Inputs = hook.ctx["inputs"]
        for line, rows_read, token_map in zip(
            pattern.cpu(), hook.ctx["rows"].cpu(), inputs.token_maps, strict=True
        ):
            token_map.evidence_rows(rows)  # raises where no row can see the region
            weights, _ = chosen_row(line[rows_read >= 0], token_map, reduce)
            parts = {name: torch.zeros(token_map.length, dtype=torch.bool) for name in PARTS}
            parts["region"][token_map.region] = True
            parts["rest of the picture"][token_map.visual] = True
            parts["question"][token_map.parts.get("question", [])] = True
            parts["first token"][token_map.start] = True
            parts["other text"][:] = True
            taken = torch.zeros(token_map.length, dtype=torch.bool)
            masses = {}
            for name, part in parts.items():  # a token counts for the first part that has it
                masses[name] = weights[part & ~taken].sum()
                taken |= part
            attention.append((masses, weights[token_map.start :]))

    answer = "answer" in rows
    name = f"blocks.{head.layer}.attn.head.{head.head}.hook_pattern_rows"
    with torch.no_grad(), model.pattern_rows(rows):
        for start in range(0, len(samples), batch_size):
            inputs = model.prepare(
                samples[start : start + batch_size], **({"answer": True} if answer else {})
            )
            model.run_with_hooks(inputs, return_type=None, fwd_hooks=[(name, look)])
    return attention


def _looks(
    model: Any, by_sample: dict[int, tuple[Sample, Float[Tensor, " key"]]]
) -> dict[int, Any]:
    """Pictures with the attention on them (of a video: the frame that gets most); one scale for all
    of them."""
    from corelens.viz.heat import attention_image, attention_map, of_panel, panels

    brightest = {}
    for index, (sample, weights) in by_sample.items():
        inputs = model.prepare(sample)
        heats = []
        for image, number, frame in panels(inputs.pictures[0], inputs.token_maps[0], frames=32):
            heat = attention_map(inputs.token_maps[0], weights, image.size, number, frame)
            heats.append(
                (float(heat.max()), image, heat, of_panel(sample.regions, number, frame), frame)
            )
        brightest[index] = max(heats, key=lambda panel: panel[0])
    peak = max((panel[0] for panel in brightest.values()), default=1.0)
    return {index: attention_image(*panel[1:], peak=peak) for index, panel in brightest.items()}
