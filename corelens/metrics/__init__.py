"""Scores of heads: one a file, each a pure function of attention rows and a TokenMap, and `metric` to name them."""

from corelens.metrics.calibrated_ram import calibrated_ram
from corelens.metrics.gaze import gaze
from corelens.metrics.lift import lift
from corelens.metrics.localization import localization
from corelens.metrics.precision import precision
from corelens.metrics.qr import qr
from corelens.metrics.ram import ram
from corelens.metrics.random import random
from corelens.metrics.registry import SPECS, Metric, check_finite, head_scores, metric, metrics
from corelens.metrics.retrieval import retrieval
from corelens.metrics.value_mass import value_mass
from corelens.metrics.visual_head import visual_head
from corelens.metrics.visual_mass import visual_mass

__all__ = [
    "SPECS",
    "Metric",
    "calibrated_ram",
    "check_finite",
    "gaze",
    "head_scores",
    "lift",
    "localization",
    "metric",
    "metrics",
    "precision",
    "qr",
    "ram",
    "random",
    "retrieval",
    "value_mass",
    "visual_head",
    "visual_mass",
]
