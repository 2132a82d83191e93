"""Faithfulness as the field measures it: CPR, CMD and AUROC of rankings of heads (MIB, arXiv
2504.13151).

A circuit of the k first heads keeps its own output; the output of every other head is exchanged for
that of another sample's run. f(k) = (m(circuit) − m(∅)) / (m(all) − m(∅)), with m the
log-probability of the right answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from corelens.evaluation.evaluate import batches, evaluate
from corelens.findings.causal import causal_rankings
from corelens.findings.options import CAUSAL, READINGS
from corelens.findings.world import World
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores
from corelens.heads.stats import ranking
from corelens.interventions.ablation import ablate
from corelens.metrics.score import score_heads
from corelens.model.hooked import HookedMLLM

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's


def faithfulness(world: World) -> dict[str, Any]:
    """{ranking: {"cpr", "cmd", "curve": [[share, f], …]}} of RAM in both readings, visual mass,
    random order, and by causal effect."""
    shape = next(iter(world.scores.values())).values.shape
    rankings = {key: world.scores[key].values for key in READINGS}
    rankings["visual_mass"] = world.scores["visual_mass"].values
    rankings["random"] = np.where(
        np.isnan(rankings["ram"]), np.nan, np.random.default_rng(world.options.seed).random(shape)
    )
    if CAUSAL not in world.options.without:
        rankings |= {key: scores.values for key, scores in causal_rankings(world).items()}
    runs = _Interchange(world)
    none, whole = runs.logprob(HeadSet([])), runs.logprob(world.every())
    measured: dict[str, Any] = {"n": runs.n, "none": none, "all": whole}
    for name, values in rankings.items():
        order = [divmod(int(flat), shape[1]) for flat in ranking(values, world.options.seed)]
        counts = sorted({round(share * len(order)) for share in SHARES} | {0})
        shares, curve = [], []
        for k in counts:
            shares.append(k / len(order))
            gained = runs.logprob(HeadSet(order[:k])) - none
            curve.append(gained / (whole - none) if whole != none else 0.0)
        measured[name] = {
            "curve": list(map(list, zip(shares, curve, strict=True))),
            **areas(shares, curve),
        }
    return measured


def areas(shares: Sequence[float], f: Sequence[float]) -> dict[str, float]:
    """CPR, the area under f, and CMD, the area of |1 − f|, over the share of heads from the first
    to the last."""
    x, y = np.array(shares), np.array(f)
    width = x[-1] - x[0]
    return {
        "cpr": float(np.trapezoid(y, x) / width),
        "cmd": float(np.trapezoid(np.abs(1 - y), x) / width),
    }


def auroc(values: Float[np.ndarray, "layer head"], circuit: HeadSet) -> float:
    """How often a head of a known circuit scores above one outside it; ties count half."""
    inside = circuit.mask(*values.shape)
    within, outside = values[inside], values[~inside]
    above = (within[:, None] > outside).mean() + 0.5 * (within[:, None] == outside).mean()
    return float(above)


class _Interchange:
    """Runs in which all heads but a circuit write what they write in another sample's run."""

    def __init__(self, world: World):
        world.advance("faithfulness of the rankings")
        self.world = world
        samples = world.to_test[: world.options.effect_samples]
        self.n = len(samples)
        self.prepared = batches(world.model, samples, world.options.batch_size)
        self.others = batches(world.model, samples[1:] + samples[:1], world.options.batch_size)
        names = [f"blocks.{layer}.attn.hook_z" for layer in range(world.model.cfg.n_layers)]
        self.caches = []
        with torch.no_grad():
            for inputs in self.others:
                self.caches.append(
                    world.model.run_with_cache(inputs, names_filter=names, logits_to_keep=1)[1]
                )

    def logprob(self, circuit: HeadSet) -> float:
        """The mean log-probability of the right answers with this circuit alone keeping its own
        output."""
        self.world.limit.check()
        exchanged = self.world.every() - circuit
        total = 0.0
        for inputs, other, cache in zip(self.prepared, self.others, self.caches, strict=True):
            hooks = (
                ablate(exchanged, "resample", reference=(cache, other)) if len(exchanged) else []
            )
            answers = evaluate(self.world.model, [inputs], hooks).per_sample
            total += sum(answer.logprob for answer in answers)
        return total / self.n


def known_circuit(
    model: HookedMLLM, samples: Sequence[Any], circuit: HeadSet, keys: Sequence[Any]
) -> dict[str, float]:
    """AUROC of the heads' scores against a circuit that is known (a hand-built model of
    `corelens.testbed`)."""
    scores: dict[str, HeadScores] = score_heads(model, samples, list(keys))
    return {key: auroc(score.values, circuit) for key, score in scores.items()}
