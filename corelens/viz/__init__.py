"""Pictures: tensors, scores and token maps in; a figure or offline HTML out. Reports: `corelens.viz.page`."""

from corelens.viz.curves import ablation_curves, sorted_scores
from corelens.viz.head_grid import head_grid, head_grid_html
from corelens.viz.overlay import attention_image, attention_map, attention_overlay, overlay

__all__ = [
    "ablation_curves",
    "attention_image",
    "attention_map",
    "attention_overlay",
    "head_grid",
    "head_grid_html",
    "overlay",
    "sorted_scores",
]
