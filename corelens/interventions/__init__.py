"""Interventions: every factory returns a list of hooks, and lists add up."""

from corelens.interventions.ablate import ablate, mean_z
from corelens.interventions.edges import edge_bias, knockout

__all__ = ["ablate", "edge_bias", "knockout", "mean_z"]
