"""Scores of heads: one a file, each a plain function and the `Metric` made of it; `metric` finds
them by name."""

from corelens.metrics.definition import Metric, check_finite
from corelens.metrics.over_samples import head_scores
from corelens.metrics.record import Record, record_metrics, record_ram
from corelens.metrics.registry import METRICS, metric, metrics
from corelens.metrics.sinks import VisualSinks, visual_sinks

__all__ = [
    "METRICS",
    "Metric",
    "Record",
    "VisualSinks",
    "check_finite",
    "head_scores",
    "metric",
    "metrics",
    "record_metrics",
    "record_ram",
    "visual_sinks",
]
