"""CoreLens: mechanistic interpretability for multimodal LLMs.

Hooks on every attention head of a Hugging Face vision-language model, the heads that fetch visual
evidence (CoRe heads), causal tests of them, and what they save. See the README for a first hour.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from corelens.errors import CorelensError

if TYPE_CHECKING:
    from corelens.data import load_data, load_samples, save_samples, synthetic
    from corelens.demo import list_demos, load_demo
    from corelens.evaluation.causal_scores import causal_scores
    from corelens.evaluation.contrast import budget_contrast, sparse_contrast
    from corelens.evaluation.evaluate import Evaluation, ablation_sweep, evaluate, paired
    from corelens.evaluation.head_profile import HeadProfile, head_profile
    from corelens.evaluation.rerank import PageRanking, rerank_pages
    from corelens.evaluation.speed_report import SpeedReport
    from corelens.evaluation.tuning import tune_sparse
    from corelens.evaluation.where_read import RowCosts, where_read
    from corelens.explorer.explore import Explorer, explore
    from corelens.findings import study
    from corelens.heads.scores import Head, HeadScores, HeadSet
    from corelens.inputs.prepare import Inputs, Sample
    from corelens.interventions import (
        PatchResult,
        ablate,
        accuracy,
        activation_patch,
        answer_logprob,
        attribution_patch,
        counterfactual,
        edge_bias,
        kl,
        knockout,
        logit_diff,
        mean_z,
        pair,
        patch,
        path_hooks,
        path_patch,
    )
    from corelens.layouts import Layout, register_layout
    from corelens.metrics import Metric, metric
    from corelens.metrics.record import record, record_ram
    from corelens.metrics.score import score_heads
    from corelens.metrics.sinks import visual_sinks
    from corelens.model.bound import bind
    from corelens.model.cache import ActivationCache
    from corelens.model.hooked import HookedMLLM
    from corelens.sparse import BlockSparse, KVBudget, Pruned, SparseInference, Streaming
    from corelens.tokens.regions import Box, Mask, Tube
    from corelens.tokens.token_map import TokenMap
    from corelens.viz import (
        ablation_curves,
        head_grid,
        logit_lens,
        overlay,
        patch_heatmap,
        sorted_scores,
        token_view,
    )

__version__ = "0.1.0"

# Where the public names live. Each is imported when it is first used: `import corelens` and the
# commands that need no model wait for neither torch nor transformers.
_PLACES = {
    "corelens.data": ("load_data", "load_samples", "save_samples", "synthetic"),
    "corelens.demo": ("list_demos", "load_demo"),
    "corelens.evaluation.causal_scores": ("causal_scores",),
    "corelens.evaluation.contrast": ("budget_contrast", "sparse_contrast"),
    "corelens.evaluation.evaluate": ("Evaluation", "ablation_sweep", "evaluate", "paired"),
    "corelens.evaluation.head_profile": ("HeadProfile", "head_profile"),
    "corelens.evaluation.rerank": ("PageRanking", "rerank_pages"),
    "corelens.evaluation.speed_report": ("SpeedReport",),
    "corelens.evaluation.tuning": ("tune_sparse",),
    "corelens.evaluation.where_read": ("RowCosts", "where_read"),
    "corelens.explorer.explore": ("Explorer", "explore"),
    "corelens.findings": ("study",),
    "corelens.heads.scores": ("Head", "HeadScores", "HeadSet"),
    "corelens.inputs.prepare": ("Inputs", "Sample"),
    "corelens.interventions": (
        "PatchResult",
        "ablate",
        "accuracy",
        "activation_patch",
        "answer_logprob",
        "attribution_patch",
        "counterfactual",
        "edge_bias",
        "kl",
        "knockout",
        "logit_diff",
        "mean_z",
        "pair",
        "patch",
        "path_hooks",
        "path_patch",
    ),
    "corelens.layouts": ("Layout", "register_layout"),
    "corelens.metrics": ("Metric", "metric"),
    "corelens.metrics.record": ("record", "record_ram"),
    "corelens.metrics.score": ("score_heads",),
    "corelens.metrics.sinks": ("visual_sinks",),
    "corelens.model.bound": ("bind",),
    "corelens.model.cache": ("ActivationCache",),
    "corelens.model.hooked": ("HookedMLLM",),
    "corelens.sparse": ("BlockSparse", "KVBudget", "Pruned", "SparseInference", "Streaming"),
    "corelens.tokens.regions": ("Box", "Mask", "Tube"),
    "corelens.tokens.token_map": ("TokenMap",),
    "corelens.viz": (
        "ablation_curves",
        "head_grid",
        "logit_lens",
        "overlay",
        "patch_heatmap",
        "sorted_scores",
        "token_view",
    ),
}
_ROOM = {name: room for room, names in _PLACES.items() for name in names}

__all__ = [
    "ActivationCache",
    "BlockSparse",
    "Box",
    "CorelensError",
    "Evaluation",
    "Explorer",
    "Head",
    "HeadProfile",
    "HeadScores",
    "HeadSet",
    "HookedMLLM",
    "Inputs",
    "KVBudget",
    "Layout",
    "Mask",
    "Metric",
    "PageRanking",
    "PatchResult",
    "Pruned",
    "RowCosts",
    "Sample",
    "SparseInference",
    "SpeedReport",
    "Streaming",
    "TokenMap",
    "Tube",
    "ablate",
    "ablation_curves",
    "ablation_sweep",
    "accuracy",
    "activation_patch",
    "answer_logprob",
    "attribution_patch",
    "bind",
    "budget_contrast",
    "causal_scores",
    "counterfactual",
    "edge_bias",
    "evaluate",
    "explore",
    "head_grid",
    "head_profile",
    "kl",
    "knockout",
    "list_demos",
    "load_data",
    "load_demo",
    "load_samples",
    "logit_diff",
    "logit_lens",
    "mean_z",
    "metric",
    "overlay",
    "pair",
    "paired",
    "patch",
    "patch_heatmap",
    "path_hooks",
    "path_patch",
    "record",
    "record_ram",
    "register_layout",
    "rerank_pages",
    "save_samples",
    "score_heads",
    "sorted_scores",
    "sparse_contrast",
    "study",
    "synthetic",
    "token_view",
    "tune_sparse",
    "visual_sinks",
    "where_read",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'corelens' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ROOM[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
