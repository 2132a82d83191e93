"""Scores of heads: one a file, each a pure function of attention rows and a TokenMap, and `metric` to name them."""

from corelens.metrics.gaze import gaze
from corelens.metrics.lift import lift
from corelens.metrics.precision import precision
from corelens.metrics.ram import ram
from corelens.metrics.random import random
from corelens.metrics.registry import SPECS, Metric, check_finite, metric, metrics
from corelens.metrics.visual_mass import visual_mass

__all__ = [
    "SPECS", "Metric", "check_finite", "gaze", "lift", "metric", "metrics", "precision", "ram", "random", "visual_mass"
]  # fmt: skip
