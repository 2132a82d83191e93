"""Pictures: tensors, scores and token maps in; a figure or offline HTML out. Reports:
`corelens.viz.page`."""

from corelens.viz.curves import ablation_curves, sorted_scores
from corelens.viz.head_grids import head_grid, head_grid_html
from corelens.viz.heat import attention_image, attention_map
from corelens.viz.lens import LogitLens, logit_lens
from corelens.viz.overlays import attention_overlay, overlay
from corelens.viz.patch_effects import patch_heatmap
from corelens.viz.tokens import token_view
from corelens.viz.view import View

__all__ = [
    "LogitLens",
    "View",
    "ablation_curves",
    "attention_image",
    "attention_map",
    "attention_overlay",
    "head_grid",
    "head_grid_html",
    "logit_lens",
    "overlay",
    "patch_heatmap",
    "sorted_scores",
    "token_view",
]
