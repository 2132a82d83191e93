"""The logit lens on visual tokens: which words each patch's residual stream stands for, layer by
layer.

The residual stream after a layer, normed by the final norm and unembedded, as if the layers behind
it did nothing (nostalgebraist 2020, "interpreting GPT: the logit lens"); on visual tokens as in Neo
et al. 2024, arXiv 2410.07149.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.tokens.token_map import TokenMap
from corelens.viz import page, style
from corelens.viz.heat import Panel, cells, panels
from corelens.viz.view import View, beside, live_script

CHUNK = 256  # tokens unembedded at once: 256 × 150k words are 150 MB in float32
MOST_CELLS = 6000  # patches × layers on one page: 2 MB
MOST_WORDS = 600  # patches of a panel with a word in each


@dataclass(eq=False)
class LogitLens:
    """What the patches stand for at each layer.

    Args:
        ids: [layer, visual, k], the k likeliest tokens, likeliest first.
        probabilities: [layer, visual, k], theirs (over the whole vocabulary).
        words: {id: token as text}.
        layers: the layers looked at, in order.
        positions: [visual], where the patches stand in the padded row.
        token_map, pictures: of the sample.
    """

    ids: Int[np.ndarray, "layer visual k"]
    probabilities: Float[np.ndarray, "layer visual k"]
    words: dict[int, str]
    layers: list[int]
    positions: list[int]
    token_map: TokenMap = field(repr=False)
    pictures: list[Any] = field(repr=False)
    meta: dict[str, Any] = field(default_factory=dict)

    def top(self, position: int, layer: int = -1) -> list[tuple[str, float]]:
        """The likeliest tokens of one patch at one of `layers` (−1: the last of them), with their
        probabilities."""
        layer = self.layers[-1] if layer == -1 else layer
        if layer not in self.layers or position not in self.positions:
            raise CorelensError(
                f"layer {layer}, position {position}",
                f"layers among {self.layers}, positions from {self.positions[0]} to "
                f"{self.positions[-1]}",
                "choose a visual token",
            )
        index = self.layers.index(layer), self.positions.index(position)
        return [
            (self.words[int(i)], float(p))
            for i, p in zip(self.ids[index], self.probabilities[index], strict=True)
        ]

    def plot(self, layers: Sequence[int] | None = None, frames: int = 1) -> Figure:
        """The likeliest token of every patch written on it, one panel a layer (four, evenly spaced,
        by default)."""
        steps = evenly(self.layers, 4) if layers is None else list(layers)
        shown = panels(self.pictures, self.token_map, frames)
        wide = max(1.6, min(4.2, 13 / len(steps)))
        tall = max(image.height / image.width for image, _, _ in shown) * wide
        with style.axes(None, wide * len(steps) + 0.9, (tall + 0.3) * len(shown)) as first:
            figure = style.figure_of(first)
            first.remove()
            grid = figure.subplots(len(shown), len(steps), squeeze=False)
            for line, panel in zip(grid, shown, strict=True):
                for ax, layer in zip(line, steps, strict=True):
                    self._draw(ax, panel, layer, wide)
                    ax.set_title(f"layer {layer}", fontsize=9)
            scale = ScalarMappable(Normalize(0, 1), "cividis")
            bar = figure.colorbar(scale, ax=grid, fraction=0.03, pad=0.01, aspect=20)
            bar.set_label("probability of the token", fontsize=8)
            bar.outline.set_visible(False)
        return figure

    def _draw(self, ax: Any, panel: Panel, layer: int, wide: float) -> None:
        image = panel[0]
        ax.imshow(np.asarray(image.convert("RGB")), interpolation="antialiased")
        token_cells = cells(self.token_map, panel)
        for position, (x0, y0, x1, y1) in token_cells.items():
            word, probability = self.top(position, layer)[0]
            ax.add_patch(
                Rectangle(
                    (x0, y0),
                    x1 - x0,
                    y1 - y0,
                    facecolor=colour(probability),
                    alpha=cover(probability),
                    edgecolor="#ffffff70",
                    linewidth=0.4,
                )
            )
            if len(token_cells) <= MOST_WORDS:
                room = (x1 - x0) / image.width * wide * 72
                size = min(8.0, room / max(2, len(brief(word))) * 1.45)
                text = ax.text(
                    (x0 + x1) / 2,
                    (y0 + y1) / 2,
                    brief(word),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white",
                    parse_math=False,
                )
                text.set_path_effects([Stroke(linewidth=1.1, foreground="#000000b0"), Normal()])
        ax.set(xlim=(0, image.width), ylim=(image.height, 0))
        ax.set_axis_off()

    def view(self) -> View:
        """The interactive picture: a slider over layers; hovering a patch names its likeliest
        tokens."""
        shown = panels(self.pictures, self.token_map, 4)
        layers = evenly(self.layers, max(1, MOST_CELLS // len(self.positions)))
        charts = Markup("").join(self._chart(panel, layers) for panel in shown)
        last = len(layers) - 1
        labels = ",".join(f"layer {layer}" for layer in layers)
        stripe = Markup('<i style="background:{}"></i>')
        body = Markup(
            '<div class="cl-live" data-tips><style>{}</style><div class="steps">'
            '<input type="range" min="0" max="{}" value="{}" data-labels="{}" aria-label="layer">'
            '<output class="now">layer {}</output></div><div class="cl-lens">{}</div>'
            '<div class="legend" style="margin-left:0"><span>0</span><span class="bar">{}</span>'
            "<span>1</span><span>probability of the likeliest token</span></div>"
            '<output class="tip" hidden></output>{}</div>'
        ).format(
            Markup(beside("live.css")), last, last, labels, layers[-1], charts,
            Markup("").join(stripe.format(colour(i / 31)) for i in range(32)),
            live_script(),
        )  # fmt: skip
        caption = (
            "The word on a patch is the likeliest token of its residual stream after that "
            "layer (logit lens)."
        )
        return View("Logit lens on the picture", body, caption)

    def _chart(self, panel: Panel, layers: list[int]) -> Markup:
        image, number, frame = panel
        zoom = min(560 / image.width, 760 / image.height)
        width, height = image.width * zoom, image.height * zoom
        groups = []
        for step, layer in enumerate(layers):
            marks = []
            for position, cell in cells(self.token_map, panel).items():
                x0, y0, x1, y1 = (edge * zoom for edge in cell)
                best = self.top(position, layer)
                sure = best[0][1]
                words = ", ".join(f"‘{word}’ {probability:.2g}" for word, probability in best)
                marks.append(
                    Markup(
                        '<rect x="{:.0f}" y="{:.0f}" width="{:.0f}" height="{:.0f}" fill="{}" '
                        'fill-opacity="{:.2f}"><title>layer {}, patch {}: {}</title></rect>'
                        '<text x="{:.0f}" y="{:.0f}">{}</text>'
                    ).format(
                        x0, y0, x1 - x0, y1 - y0, colour(sure), cover(sure), layer, position, words,
                        (x0 + x1) / 2,
                        (y0 + y1) / 2, brief(best[0][0]),
                    )
                )  # fmt: skip
            hidden = Markup(' style="display:none"') if step < len(layers) - 1 else ""
            groups.append(
                Markup('<g data-step="{}"{}>{}</g>').format(step, hidden, Markup("").join(marks))
            )
        small = (
            image
            if zoom > 1
            else image.resize((round(width), round(height)), Image.Resampling.LANCZOS)
        )
        name = f"frame {frame}" if frame is not None else f"image {number}"
        return Markup(
            "<figure>"
            '<svg class="photo" viewBox="0 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" '
            'role="img" aria-label="{}"><image href="{}" width="{:.0f}" height="{:.0f}"/>{}</svg>'
            "</figure>"
        ).format(
            width,
            height,
            width,
            height,
            name,
            page.data_uri(small),
            width,
            height,
            Markup("").join(groups),
        )

    def _repr_html_(self) -> str:
        return self.view()._repr_html_()

    def save(self, path: Any) -> None:
        """Write the interactive picture as an offline page."""
        self.view().save(path)


def logit_lens(
    model: Any, sample: Any, layers: Sequence[int] | None = None, k: int = 5
) -> LogitLens:
    """Decode every patch's residual stream after each layer, and lay the words over the picture.

    Args:
        model: a HookedMLLM. sample: a Sample with a picture or video.
        layers: which layers; all by default.
        k: how many tokens are kept for each patch.
    Returns:
        A LogitLens: `.plot()` is a figure, a notebook shows the interactive picture, `.save(path)`
        writes it.
    """
    wanted = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    if not wanted or not all(0 <= layer < model.cfg.n_layers for layer in wanted):
        raise CorelensError(
            f"layers={layers}", f"layers from 0 to {model.cfg.n_layers - 1}", "layers count from 0"
        )
    inputs = model.prepare(sample)
    token_map = inputs.token_maps[0]
    visual = torch.cat(token_map.images).unique()
    likeliest: dict[int, tuple[Tensor, Tensor]] = {}

    def look(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        parts = [
            _likeliest(model, resid[0, chunk.to(resid.device)], k) for chunk in visual.split(CHUNK)
        ]
        ids, probabilities = zip(*parts, strict=True)
        likeliest[int(hook.name.split(".")[1])] = torch.cat(ids), torch.cat(probabilities)

    with torch.no_grad():
        hooks = [(f"blocks.{layer}.hook_resid_post", look) for layer in wanted]
        model.run_with_hooks(inputs, return_type=None, fwd_hooks=hooks)
    ids = torch.stack([likeliest[layer][0] for layer in wanted]).numpy()
    words = {int(i): model.tokenizer.decode([int(i)]) for i in np.unique(ids)}
    probabilities = torch.stack([likeliest[layer][1] for layer in wanted]).numpy()
    meta = {"sample": token_map.id, "family": model.cfg.family}
    return LogitLens(
        ids, probabilities, words, wanted, visual.tolist(), token_map, inputs.pictures[0], meta
    )


def _likeliest(model: Any, resid: Float[Tensor, "pos d_model"], k: int) -> tuple[Tensor, Tensor]:
    logits = model.unembed(model.ln_final(resid)).float()
    best = model.adapter.apply_output_logits_transform(logits).softmax(-1).topk(k)
    return best.indices.cpu(), best.values.cpu()


def evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of these, evenly spaced, the last among them."""
    return sorted({items[round(i)] for i in np.linspace(len(items) - 1, 0, min(count, len(items)))})


def brief(word: str) -> str:
    """A token short enough for a patch."""
    word = word.replace("\n", "↵").strip() or "␣"
    return word if len(word) <= 8 else f"{word[:7]}…"


def colour(probability: float) -> str:
    """Cividis: readable under every colour blindness, and in grey."""
    return style.to_hex(style.CIVIDIS(probability))


def cover(probability: float) -> float:
    """How much of the picture a word's colour hides: the surer, the more."""
    return 0.35 + 0.45 * probability
