"""Interactive pictures: one HTML element that a notebook shows as it is, and that `save` writes as
an offline page."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from corelens.disk.write import write_whole
from corelens.errors import CorelensError


@dataclass(frozen=True)
class View:
    """An interactive picture.

    Args:
        title: what it shows.
        body: the element, with its style and script; no file and no network behind it.
        caption: how to read it, with units.
    """

    title: str
    body: Markup
    caption: str

    def _repr_html_(self) -> str:
        return f"{self.body}<p>{escape(self.caption)}</p>"

    def page(self) -> str:
        """A whole offline HTML document."""
        from corelens.viz import page

        return page.page(self.title, [page.section("", page.figure(self.body, self.caption))])

    def save(self, path: str | Path) -> None:
        """Write the page."""
        write_whole(path, self.page())


class LiveFigure(Figure):
    """A matplotlib figure with an interactive twin: notebooks show the twin, `savefig` and print
    show the figure."""

    make_view: Callable[[], View] | None = None

    def _repr_html_(self) -> str | None:
        return super()._repr_html_() if self.make_view is None else self.make_view()._repr_html_()

    def save_html(self, path: str | Path) -> None:
        """Write the interactive twin as an offline page."""
        if self.make_view is None:
            raise CorelensError(
                "a figure without an interactive twin", "what cl.head_grid returns", "use savefig"
            )
        self.make_view().save(path)


def live_script() -> Markup:
    """The script that gives every marked element (`data-tips`) on the page quick tooltips, and a
    layer slider."""
    return Markup("<script>{}</script>").format(Markup(beside("live.js")))


def image_html(figure: Figure, alt: str) -> str:
    """A figure as an `<img>` on white paper, for notebooks."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", facecolor="white")
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/png;base64,{}"/>').format(alt, data)


@cache
def beside(name: str) -> str:
    """The text of a file that lies beside this one."""
    return (Path(__file__).parent / name).read_text()
