"""Accuracy, paired differences, ablation sweeps, generation and the measurement of speed."""

from corelens.evaluation.answers import Answer, Evaluation, paired
from corelens.evaluation.causal import causal_scores
from corelens.evaluation.contrast import SparseContrast, budget_contrast, sparse_contrast
from corelens.evaluation.evaluate import batches
from corelens.evaluation.lmms_eval import lmms_model, run_tasks
from corelens.evaluation.profile import HeadProfile, head_profile
from corelens.evaluation.rerank import PageRanking, rerank_pages
from corelens.evaluation.speed_report import SpeedReport
from corelens.evaluation.sweep import Point, Sweep, ablation_sweep
from corelens.evaluation.tuning import TunedSparse, tune_sparse
from corelens.evaluation.where_read import RowCosts

__all__ = [
    "Answer",
    "Evaluation",
    "HeadProfile",
    "PageRanking",
    "Point",
    "RowCosts",
    "SparseContrast",
    "SpeedReport",
    "Sweep",
    "TunedSparse",
    "ablation_sweep",
    "batches",
    "budget_contrast",
    "causal_scores",
    "head_profile",
    "lmms_model",
    "paired",
    "rerank_pages",
    "run_tasks",
    "sparse_contrast",
    "tune_sparse",
]
