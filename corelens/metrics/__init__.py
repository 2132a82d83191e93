"""Scores of heads: one a file, each a plain function and the `Metric` made of it; `metric` finds
them by name."""

from corelens.metrics.definition import Metric, check_finite
from corelens.metrics.over_samples import head_scores
from corelens.metrics.registry import METRICS, metric, metrics

__all__ = ["METRICS", "Metric", "check_finite", "head_scores", "metric", "metrics"]
