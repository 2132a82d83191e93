"""Interventions: every factory returns a list of hooks, and lists add up."""

from corelens.interventions.ablation import ablate, mean_z
from corelens.interventions.attribution import attribution_patch
from corelens.interventions.counterfactuals import counterfactual, counterfactual_pairs
from corelens.interventions.knockouts import edge_bias, knockout
from corelens.interventions.metrics import accuracy, answer_logprob, kl, logit_diff
from corelens.interventions.patching import activation_patch, patch
from corelens.interventions.path import path_patch
from corelens.interventions.path_run import path_hooks
from corelens.interventions.result import PatchResult

__all__ = [
    "PatchResult",
    "ablate",
    "accuracy",
    "activation_patch",
    "answer_logprob",
    "attribution_patch",
    "counterfactual",
    "counterfactual_pairs",
    "edge_bias",
    "kl",
    "knockout",
    "logit_diff",
    "mean_z",
    "patch",
    "path_hooks",
    "path_patch",
]
