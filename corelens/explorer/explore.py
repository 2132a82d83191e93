"""`cl.explore`: click a token, point at a head, and see where it looks; live in Jupyter, and as one
offline page."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.explorer.assets import HERE, script, style
from corelens.explorer.recording import BUDGET, record
from corelens.heads.head_set import HeadSet
from corelens.heads.scores import HeadScores
from corelens.inputs.prepare import Sample
from corelens.model.hooked import HookedMLLM

START = (
    'corelensExplorer(document.getElementById("explorer"), '
    'JSON.parse(document.getElementById("recording").textContent));'
)


def explore(
    model: HookedMLLM,
    sample: Sample,
    scores: "HeadScores | Iterable[HeadScores] | dict[str, HeadScores] | None" = None,
    heads: Any = (),
    max_new_tokens: int = 8,
    budget: int = BUDGET,
) -> "Explorer":
    """See a head look: the picture, the text's tokens and the layer × head grid, each answering to
    the others.

    The model answers the sample once. Click a token and the grid shows how much every head puts
    from there on the evidence, on the picture, on a box that you drag, or on a patch that you
    click; point at a head to see its attention on the picture; click it to pin it.

    Args:
        model: a HookedMLLM.
        sample: with a picture, pages or a video. Without regions all works but the mass on the
            evidence.
        scores: rankings by which the grid can be coloured too.
        heads: pinned from the start, a HeadSet or what makes one.
        max_new_tokens: the longest answer.
        budget: bytes of attention maps to keep; beyond it, maps of the heads with least mass are
            left out, and the page says so.

    Returns:
        An Explorer: a notebook shows it (live with the extra `corelens[jupyter]`, else as a page);
        `.save(path)` writes one offline HTML file.

    Errors: a sample without a picture; scores of another model.
    """
    rankings = list(scores.values()) if isinstance(scores, dict) else scores
    if rankings is None:
        rankings = []
    elif isinstance(rankings, HeadScores):
        rankings = [rankings]
    pinned = HeadSet(heads).check(model.cfg.n_layers, model.cfg.n_heads)
    return Explorer(model, sample, list(rankings), pinned, max_new_tokens, budget)


class Explorer:
    """What `cl.explore` returns; `recording` is the run as JSON data
    (`corelens.explorer.recording`)."""

    def __init__(
        self, model: HookedMLLM, sample: Sample, scores: Sequence[HeadScores], heads: HeadSet,
        max_new_tokens: int, budget: int,
    ):  # fmt: skip
        self.model, self.sample = model, sample
        self.settings: dict[str, Any] = {
            "scores": scores,
            "max_new_tokens": max_new_tokens,
            "budget": budget,
        }
        self.pinned = heads
        self.recording = record(model, sample, first=list(heads), **self.settings)
        self._widget: Any = None

    def __repr__(self) -> str:
        layers, heads = self.recording["shape"]
        maps = len(self.recording["heads"])
        return f"Explorer({self.sample.question!r}, {layers} layers × {heads} heads, {maps} maps)"

    def page(self) -> str:
        """One offline HTML document; what the sample says is escaped, and nothing is asked of the
        network."""
        environment = Environment(loader=FileSystemLoader(HERE), autoescape=True)
        return environment.get_template("page.html.jinja").render(
            title=self.sample.question or "Explorer",
            model=self.recording["model"],
            explorer=self.part(),
        )

    def part(self) -> Markup:
        """The explorer as a part of another page: its style, its data and its script; once a
        page."""
        data = json.dumps(self.recording, allow_nan=False).replace("<", "\\u003c")
        return Markup(
            '<style>{}</style><div id="explorer"></div>'
            '<script type="application/json" id="recording">{}</script><script>{}\n{}</script>'
        ).format(
            Markup(style()),
            Markup(data),
            Markup(script()),
            Markup(START),
        )

    def save(self, path: str | Path) -> Path:
        """Write the page; returns its path."""
        write_whole(path, self.page())
        return Path(path)

    @property
    def widget(self) -> Any:
        """The live form, an anywidget; needs the extra `corelens[jupyter]`."""
        if self._widget is None:
            try:
                from corelens.explorer.widget import ExplorerWidget
            except ImportError as error:
                raise CorelensError(
                    "the live explorer without anywidget", "the extra corelens[jupyter]",
                    "pip install 'corelens[jupyter]', or use .save(path) for the page",
                ) from error  # fmt: skip
            self._widget = ExplorerWidget(self)
        return self._widget

    @property
    def value(self) -> dict[str, Any]:
        """What was chosen in the live form: `heads` (HeadSet), `box` (Box or None), `hooks`, and
        `code` to paste."""
        return self.widget.value

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live form and, for a front end that cannot show it, the page in a frame of its
        own."""
        page = {"text/html": self._repr_html_(), "text/plain": repr(self)}
        try:
            live = self.widget._repr_mimebundle_(**kwargs)
        except CorelensError:  # no live form is installed
            return page
        data, metadata = live if isinstance(live, tuple) else (live, {})
        return {**page, **data, "text/plain": repr(self)}, metadata

    def _repr_html_(self) -> str:
        frame = '<iframe srcdoc="{}" width="100%" height="760" style="border:0"></iframe>'
        return str(Markup(frame).format(self.page()))
