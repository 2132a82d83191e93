"""Visual sinks on their picture."""

from typing import Any

import torch
from matplotlib.figure import Figure

from corelens.viz import style
from corelens.viz.heat import attention_image, attention_map, panels


def sinks_figure(sinks: Any, number: int = 0) -> Figure:
    """The first picture of a sample with the attention that its tokens draw whatever is asked,
    sinks outlined.

    Args:
        sinks: a VisualSinks.
        number: of the sample.
    """
    inputs = sinks.inputs[number]
    token_map = inputs.token_maps[0]
    weights = torch.zeros(token_map.length)
    weights[token_map.visual] = torch.from_numpy(sinks.strengths[number]).float()
    image, picture, frame = panels(inputs.pictures[0], token_map, frames=1)[0]
    heat = attention_map(token_map, weights[token_map.start :], image.size, picture, frame)
    boxes = [box for box in sinks.boxes(number) if frame is not None or box.image == picture]
    overlay = attention_image(image, heat, boxes, frame, peak=float(heat.max()) or 1.0)
    with style.axes(None, 3.6, 3.6) as ax:
        ax.imshow(overlay)
        ax.set_axis_off()
        ax.set_title(
            f"{len(sinks.tokens[number])} sinks, {sinks.share[number]:.0%} of visual attention"
        )
    return style.figure_of(ax)
