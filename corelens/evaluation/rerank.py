"""Pages of a document ranked by what heads look at: page retrieval without a retriever.

As MMRetHeads (arXiv 2605.27243) and QRHead (arXiv 2506.09944) rank documents; on MMDocIR (arXiv
2501.08828) the measure is the recall of evidence pages among the first k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from corelens.data.scoring import recall_at
from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.heads.intervals import Interval, mean_interval
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Sample
from corelens.metrics.score import NULL_QUESTION
from corelens.model.hooked import HookedMLLM


@dataclass
class PageRanking:
    """Pages ranked for each question.

    Args:
        ranked: per sample its pages, best first, by the names that `meta["pages"]` gives them (else
            0, 1, …).
        scores: per sample the score of each page, in the order in which the pages are shown.
        gold: per sample its evidence pages.
        meta: heads, rows and samples.
    """

    ranked: list[list[Any]]
    scores: list[Float[np.ndarray, " _"]]
    gold: list[list[Any]]
    meta: dict[str, Any] = field(default_factory=dict)

    def recall(self, k: int = 1) -> Interval:
        """Mean share of a question's evidence pages among its first k, MMDocIR's recall@k, with a
        95% interval."""
        each = [
            recall_at(pages, gold, k) for pages, gold in zip(self.ranked, self.gold, strict=True)
        ]
        return mean_interval(np.array(each))

    @property
    def chance(self) -> float:
        """Recall@1 of a page drawn at random."""
        return float(np.mean([1 / len(pages) for pages in self.ranked]))

    def plot(self) -> Any:
        """A matplotlib figure: recall@k over k, beside that of pages drawn at random."""
        from corelens.viz.curves import recall_curve

        most = max(len(pages) for pages in self.ranked)
        counts = np.array([len(pages) for pages in self.ranked])
        random = [float(np.minimum(1.0, k / counts).mean()) for k in range(1, most + 1)]
        return recall_curve([self.recall(k) for k in range(1, most + 1)], random)

    def _repr_html_(self) -> str:
        from corelens.viz.view import image_html

        return f"{image_html(self.plot(), 'recall at k')}<p>{escape(repr(self))}</p>"

    def __repr__(self) -> str:
        return (
            f"PageRanking({len(self.ranked)} questions: recall@1 {self.recall()}, chance "
            f"{self.chance:.3f})"
        )


def rerank_pages(
    model: HookedMLLM,
    samples: Sequence[Sample],
    heads: Any,
    rows: str = "question",
    calibrated: bool = True,
    batch_size: int = 1,
    hooks: Sequence[Hook] = (),
) -> PageRanking:
    """Rank the pages of each sample by the attention that heads put on them.

    Score of a page = Σ over heads of the mean over `rows` of Σ over its visual tokens of A, minus
    the same under the null question "N/A" (`calibrated`): what a page draws whatever is asked is
    taken away.

    Args:
        model: a HookedMLLM.
        samples: questions about several images, the pages. `meta["evidence_pages"]` holds the right
            ones (as `cl.data.load_data` fills it for MMDocIR), by the names in `meta["pages"]`;
            without it, the images that the sample's regions lie on.
        heads: a HeadSet, or anything that makes one, for instance
            `scores["calibrated_ram"].top(0.05)`. Choose them on other documents.
        rows: whose attention.
        calibrated: two forwards a batch instead of one.
        batch_size: samples a forward.
        hooks: to run under.
    Raises:
        CorelensError: no head; a sample with fewer than two images, without evidence, or
            (calibrated) that is a chat.
    """
    selected = heads if isinstance(heads, HeadSet) else HeadSet(heads)
    selected.check(model.cfg.n_layers, model.cfg.n_heads)
    samples = list(samples)
    if not len(selected) or not samples:
        raise CorelensError(
            f"{len(selected)} heads and {len(samples)} samples", "one of each or more", "give them"
        )
    for sample in samples:
        _check(sample, calibrated)
    scores: list[np.ndarray] = []
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            on_pages = _page_masses(model, batch, selected, rows, hooks)
            if calibrated:
                asked_nothing = [replace(sample, question=NULL_QUESTION) for sample in batch]
                null = _page_masses(model, asked_nothing, selected, rows, hooks)
                on_pages = [page - calm for page, calm in zip(on_pages, null, strict=True)]
            scores += on_pages
    ranked = []
    for sample, of_pages in zip(samples, scores, strict=True):
        pages = _pages(sample)
        ranked.append([pages[i] for i in np.argsort(-of_pages, kind="stable")])
    meta = {
        "heads": selected.to_json(),
        "rows": rows,
        "calibrated": calibrated,
        "samples": [s.id for s in samples],
    }
    return PageRanking(ranked, scores, [_evidence(sample) for sample in samples], meta)


def _page_masses(
    model: HookedMLLM, samples: list[Sample], heads: HeadSet, rows: str, hooks: Sequence[Hook]
) -> list[Float[np.ndarray, " _"]]:
    """Per sample the attention on each of its pages, summed over the heads, mean over the rows."""
    inputs = model.prepare(samples, answer="answer" in rows)
    totals = [
        torch.zeros(len(token_map.images), dtype=torch.double) for token_map in inputs.token_maps
    ]

    def reader(numbers: list[int]) -> Callable[..., None]:
        def add_pages(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            wanted = pattern.detach()[:, numbers].sum(1)  # [batch, row, key]
            for of_sample, row_numbers, total, token_map in zip(
                wanted, hook.ctx["rows"].cpu(), totals, inputs.token_maps, strict=True
            ):
                asking = torch.isin(row_numbers, token_map.positions(rows, rows=True))
                mean = of_sample[asking.to(of_sample.device)].mean(0).double().cpu()
                total += torch.stack([mean[positions].sum() for positions in token_map.images])

        add_pages.rows = rows  # type: ignore[attr-defined]
        return add_pages

    reading = [
        (f"blocks.{layer}.attn.hook_pattern_rows", reader(numbers))
        for layer, numbers in heads.by_layer().items()
    ]
    model.run_with_hooks(inputs, fwd_hooks=[*hooks, *reading], return_type=None)
    return [total.numpy() for total in totals]


def _pages(sample: Sample) -> list[Any]:
    pages = sample.meta.get("pages")
    return list(pages) if pages is not None else list(range(len(sample.images)))


def _evidence(sample: Sample) -> list[Any]:
    evidence = sample.meta.get("evidence_pages")
    if evidence is not None:
        return list(evidence)
    return sorted({_pages(sample)[region.image] for region in sample.regions})


def _check(sample: Sample, calibrated: bool) -> None:
    if len(sample.images) < 2 or len(_pages(sample)) != len(sample.images):
        raise CorelensError(
            f"{sample.label} with {len(sample.images)} images and {len(_pages(sample))} "
            "names of pages",
            "a question about several images, the pages, each with a name or none",
            "for instance cl.data.load_data of MMDocIR's folder",
        )
    if calibrated and sample.messages is not None:
        raise CorelensError(
            f"{sample.label} which is a chat",
            "a question that can be replaced by 'N/A'",
            "calibrated=False",
        )
    if not _evidence(sample):
        raise CorelensError(
            f"{sample.label} without evidence pages",
            "the right pages",
            'meta["evidence_pages"], or regions',
        )
