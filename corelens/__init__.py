"""CoreLens: mechanistic interpretability for multimodal LLMs.

Hooks on every attention head of a Hugging Face vision-language model, the heads that fetch visual
evidence (CoRe heads), causal tests of them, and what they save. See the README for a first hour.

The names that a first hour needs are here. All others are reached through their room, which needs
no import of its own: `cl.viz.logit_lens`, `cl.data.load_samples`, `cl.evaluation.tune_sparse`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from corelens.errors import CorelensError

if TYPE_CHECKING:
    from corelens import data as data
    from corelens import demo as demo
    from corelens import evaluation as evaluation
    from corelens import explorer as explorer
    from corelens import findings as findings
    from corelens import heads as heads
    from corelens import inputs as inputs
    from corelens import interventions as interventions
    from corelens import layouts as layouts
    from corelens import metrics as metrics
    from corelens import model as model
    from corelens import sparse as sparse
    from corelens import testbed as testbed
    from corelens import tokens as tokens
    from corelens import viz as viz
    from corelens.data.synthetic import synthetic
    from corelens.demo import list_demos, load_demo
    from corelens.evaluation.answers import paired
    from corelens.evaluation.evaluate import evaluate
    from corelens.evaluation.rerank import rerank_pages
    from corelens.evaluation.sweep import ablation_sweep
    from corelens.evaluation.where_read import where_read
    from corelens.explorer.explore import explore
    from corelens.findings import study
    from corelens.heads.head_set import Head, HeadSet
    from corelens.heads.scores import HeadScores
    from corelens.inputs.sample import Sample
    from corelens.interventions import (
        ablate,
        activation_patch,
        attribution_patch,
        counterfactual,
        edge_bias,
        knockout,
        logit_diff,
        mean_z,
        patch,
        path_hooks,
        path_patch,
    )
    from corelens.layouts import register_layout
    from corelens.metrics import metric
    from corelens.metrics.record import record_ram
    from corelens.metrics.score import score_heads
    from corelens.model.bound import bind
    from corelens.model.hooked import HookedMLLM
    from corelens.sparse import KVBudget, Pruned, SparseInference, Streaming
    from corelens.tokens.regions import Box, Mask, Span, Tube
    from corelens.viz import head_grid, overlay

__version__ = "0.1.0"

# Where the public names live. Each is imported when it is first used: `import corelens` and the
# commands that need no model wait for neither torch nor transformers.
_PUBLIC = {
    "corelens.data.synthetic": ("synthetic",),
    "corelens.demo": (
        "list_demos",
        "load_demo",
    ),
    "corelens.evaluation.answers": ("paired",),
    "corelens.evaluation.sweep": ("ablation_sweep",),
    "corelens.evaluation.evaluate": ("evaluate",),
    "corelens.evaluation.rerank": ("rerank_pages",),
    "corelens.evaluation.where_read": ("where_read",),
    "corelens.explorer.explore": ("explore",),
    "corelens.findings": ("study",),
    "corelens.heads.head_set": (
        "Head",
        "HeadSet",
    ),
    "corelens.heads.scores": ("HeadScores",),
    "corelens.inputs.sample": ("Sample",),
    "corelens.interventions": (
        "ablate",
        "activation_patch",
        "attribution_patch",
        "counterfactual",
        "edge_bias",
        "knockout",
        "logit_diff",
        "mean_z",
        "patch",
        "path_hooks",
        "path_patch",
    ),
    "corelens.layouts": ("register_layout",),
    "corelens.metrics": ("metric",),
    "corelens.metrics.record": ("record_ram",),
    "corelens.metrics.score": ("score_heads",),
    "corelens.model.bound": ("bind",),
    "corelens.model.hooked": ("HookedMLLM",),
    "corelens.sparse": (
        "KVBudget",
        "Pruned",
        "SparseInference",
        "Streaming",
    ),
    "corelens.tokens.regions": (
        "Box",
        "Mask",
        "Span",
        "Tube",
    ),
    "corelens.viz": (
        "head_grid",
        "overlay",
    ),
}
_MODULE = {name: module for module, names in _PUBLIC.items() for name in names}

# Names that changed when they moved to their room.
_RENAMED = {"pair": "interventions.counterfactual_pairs", "record": "metrics.record_metrics"}

_ROOMS = (
    "data",
    "demo",
    "evaluation",
    "explorer",
    "findings",
    "heads",
    "inputs",
    "interventions",
    "layouts",
    "metrics",
    "model",
    "sparse",
    "testbed",
    "tokens",
    "viz",
)

__all__ = [
    "Box",
    "CorelensError",
    "Head",
    "HeadScores",
    "HeadSet",
    "HookedMLLM",
    "KVBudget",
    "Mask",
    "Pruned",
    "Sample",
    "Span",
    "SparseInference",
    "Streaming",
    "Tube",
    "ablate",
    "ablation_sweep",
    "activation_patch",
    "attribution_patch",
    "bind",
    "counterfactual",
    "edge_bias",
    "evaluate",
    "explore",
    "head_grid",
    "knockout",
    "list_demos",
    "load_demo",
    "logit_diff",
    "mean_z",
    "metric",
    "overlay",
    "paired",
    "patch",
    "path_hooks",
    "path_patch",
    "record_ram",
    "register_layout",
    "rerank_pages",
    "score_heads",
    "study",
    "synthetic",
    "where_read",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        value = globals()[name] = getattr(import_module(_MODULE[name]), name)
        return value
    if name in _ROOMS:
        return import_module(f"corelens.{name}")
    new_name = _RENAMED.get(name) or _name_in_a_room(name)
    message = f"module 'corelens' has no attribute {name!r}"
    raise AttributeError(f"{message}: it is corelens.{new_name}" if new_name else message)


def _name_in_a_room(name: str) -> str | None:
    """ "viz.logit_lens" for "logit_lens": where a public name is that is not here."""
    if name.startswith("_"):
        return None
    rooms = (room for room in _ROOMS if name in import_module(f"corelens.{room}").__all__)
    return next((f"{room}.{name}" for room in rooms), None)


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
