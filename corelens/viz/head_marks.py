"""Which heads are in a set: marks on the layer × head grid, or names by layer."""

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from corelens.heads.scores import HeadSet
from corelens.viz import style


def head_marks(
    heads: HeadSet, n_layers: int | None = None, n_heads: int | None = None, ax: Axes | None = None
) -> Figure:
    """The heads of a set as filled cells of the layer × head grid, numbered in the set's order.

    Args:
        n_layers, n_heads: the model's; by default just large enough for the set.
    """
    down = n_layers or 1 + max((head.layer for head in heads), default=0)
    across = n_heads or 1 + max((head.head for head in heads), default=0)
    cell = min(0.3, 6.2 / across, 6.6 / down)
    with style.axes(ax, max(2.4, across * cell + 0.6), max(1.2, down * cell + 0.7)) as ax:
        mask = heads.mask(down, across)
        ax.pcolormesh(
            mask, cmap=style.MARKS, vmin=0, vmax=1, edgecolors="white", linewidth=min(0.8, cell * 3)
        )
        if len(heads) <= 40:
            for number, (layer, head) in enumerate(heads, 1):
                ax.text(
                    head + 0.5,
                    layer + 0.5,
                    str(number),
                    ha="center",
                    va="center",
                    color="white",
                    fontsize=min(8, cell * 26),
                )
        ax.set_aspect("equal")
        ax.invert_yaxis()
        for axis, count in ((ax.xaxis, across), (ax.yaxis, down)):
            shown = style.ticks(count)
            axis.set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="head", ylabel="layer")
        ax.set_title(
            f"{len(heads)} of {down * across} heads, numbered in their order", fontsize=8.5
        )
    return style.figure_of(ax)


def heads_html(heads: HeadSet) -> Markup:
    """Names of heads, one line a layer."""
    line = Markup(
        '<tr><th style="text-align:left">layer {}</th><td style="text-align:left">{}</td></tr>'
    )
    marks = [
        line.format(layer, ", ".join(f"L{layer}H{head}" for head in of))
        for layer, of in heads.by_layer().items()
    ]
    return Markup("<p>{} heads</p><table>{}</table>").format(len(heads), Markup("").join(marks))
