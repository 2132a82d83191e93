"""The one page that every report is made of: offline, light and dark, and whatever it is given to
show is escaped.

`page(title, [section("Heads", text("…"), figure(fig, "…"))], meta)` gives a whole HTML document.
The helpers return `Markup`: what they were given is escaped in it. Only `html` takes markup as it
is; hand it our own.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in order. Made by `section`."""

    title: str
    parts: tuple[Markup, ...]
    anchor: str


def page(
    title: str,
    sections: Iterable[Section],
    meta: Mapping[str, Any] | None = None,
    subtitle: str | None = None,
) -> str:
    """A whole HTML document that asks the network for nothing (its content security policy forbids
    it).

    Args:
        title, subtitle: what was found, in words.
        sections: made by `section`; a title list appears when there are three or more.
        meta: how it was made (model, data, seed, versions …), shown at the foot.
    """
    template = _environment().get_template("page.html.jinja")
    return template.render(
        title=title, subtitle=subtitle, sections=_unique(sections), meta=meta or {}
    )


def section(title: str, *parts: Markup | str) -> Section:
    """A section; a plain string among the parts becomes a paragraph. An empty title gives no
    heading."""
    made = tuple(part if isinstance(part, Markup) else text(part) for part in parts)
    return Section(title, made, re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section")


def text(*paragraphs: str) -> Markup:
    """Paragraphs. `backticks` set code, **stars** set strong; everything else is escaped."""
    return Markup("\n").join(Markup("<p>{}</p>").format(_inline(p)) for p in paragraphs)


def heading(title: str) -> Markup:
    """A smaller heading within a section."""
    return Markup("<h3>{}</h3>").format(title)


def folded(summary: str, *parts: Markup | str) -> Markup:
    """Parts behind a line that opens them: what few readers need."""
    inside = Markup("").join(part if isinstance(part, Markup) else text(part) for part in parts)
    return Markup("<details><summary>{}</summary>{}</details>").format(_inline(summary), inside)


def note(*paragraphs: str) -> Markup:
    """A remark that must not be overlooked: a caveat, a warning, what a control does not show."""
    return Markup('<aside class="note">{}</aside>').format(text(*paragraphs))


def tiles(numbers: Iterable[Sequence[str]], hot: int | None = None) -> Markup:
    """A row of large numbers: (label, value) or (label, value, what stands small below it); `hot`
    marks one."""
    made = []
    for i, (label, value, *more) in enumerate(numbers):
        small = Markup('<dd class="more">{}</dd>').format(more[0]) if more else ""
        made.append(
            Markup('<div class="tile{}"><dt>{}</dt><dd class="value">{}</dd>{}</div>').format(
                " hot" if i == hot else "", label, value, small
            )
        )
    return Markup('<dl class="tiles">{}</dl>').format(Markup("").join(made))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    caption: str | None = None,
    hot: Iterable[int] = (),
    groups: Iterable[int] = (),
) -> Markup:
    """A table. The first column names its row; numbers and cells like "0.42 [0.38, 0.47]" stand to
    the right.

    Args:
        hot: rows to mark. groups: rows above which a stronger line is drawn.
    """
    rows, hot, groups = [list(row) for row in rows], set(hot), set(groups)
    right = [i > 0 and all(_numeric(row[i]) for row in rows) for i in range(len(columns))]
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(
            Markup(' class="num"') if right[i] else "", column
        )
        for i, column in enumerate(columns)
    )
    body = []
    for number, row in enumerate(rows):
        mark = " ".join(
            name for name, marked in (("hot", hot), ("group", groups)) if number in marked
        )
        cells = [Markup('<th scope="row">{}</th>').format(_inline(str(row[0])))]
        cells += [
            Markup("<td{}>{}</td>").format(Markup(' class="num"') if right[i] else "", _cell(cell))
            for i, cell in enumerate(row[1:], 1)
        ]
        body.append(Markup('<tr class="{}">{}</tr>').format(mark, Markup("").join(cells)))
    return Markup(
        '<div class="scroll"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(
        Markup("<caption>{}</caption>").format(_inline(caption)) if caption else "",
        head,
        Markup("\n").join(body),
    )


def figure(fig: "Figure | Markup", caption: str) -> Markup:
    """A matplotlib figure as inline SVG (inverted on a dark page, so no photographs in it), or
    markup of our own."""
    if isinstance(fig, Figure):
        return Markup(
            '<figure class="ink" role="group">{}<figcaption>{}</figcaption></figure>'
        ).format(svg(fig, caption), _inline(caption))
    return Markup('<figure><div class="plot">{}</div><figcaption>{}</figcaption></figure>').format(
        fig, _inline(caption)
    )


def pair(*figures: Markup) -> Markup:
    """Figures side by side where there is room."""
    return Markup('<div class="pair">{}</div>').format(Markup("").join(figures))


def pictures(
    rows: Iterable[tuple[str | None, Sequence[tuple[Image.Image | str, str]]]],
    caption: str,
    columns: int | None = None,
) -> Markup:
    """Small pictures in rows: [(words above the row or None, [(picture, words below it), …]),
    …]."""
    rows = [(above, list(row)) for above, row in rows]
    columns = columns or max(len(row) for _, row in rows)
    cells = []
    for above, row in rows:
        if above:
            cells.append(Markup('<div class="rowhead">{}</div>').format(_inline(above)))
        for image, words in row:
            alt = re.sub(r"[*`]", "", words)
            cells.append(
                Markup('<div><img src="{}" alt="{}"><p class="say">{}</p></div>').format(
                    data_uri(image), alt, _inline(words)
                )
            )
        cells += [Markup("<div></div>")] * (-len(row) % columns)
    grid = Markup(
        '<div class="pictures" style="grid-template-columns:repeat({},minmax(0,14.5rem))">{}</div>'
    )
    return Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(
        grid.format(columns, Markup("").join(cells)), _inline(caption)
    )


def wide(part: Markup) -> Markup:
    """A part that may be wider than the text where the window is."""
    return Markup('<div class="bleed wide">{}</div>').format(part)


def html(trusted: str) -> Markup:
    """Markup of our own making, taken as it is. Never anything that came from a model, a data set
    or a user."""
    return Markup(trusted)


def svg(fig: Figure, label: str) -> Markup:
    """A matplotlib figure as one `<svg>` element: text stays text, no background, ids of its own,
    always the same."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "corelens"}):
        fig.savefig(
            buffer,
            format="svg",
            transparent=True,
            bbox_inches="tight",
            pad_inches=0.02,
            metadata={"Date": None, "Creator": None},
        )
    markup = buffer.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r' (d|x|y)="[^"]+"', _rounded, re.sub(r"\n +", "\n", markup))
    # two figures on one page must not share ids: clip paths and markers are referred to by them
    prefix = "f" + hashlib.sha1((label + markup).encode()).hexdigest()[:8] + "-"
    markup = re.sub(r'\bid="', f'id="{prefix}', markup)
    markup = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}", markup)
    named = Markup('<svg role="img" aria-label="{}" ').format(re.sub(r"[*`]", "", label))
    return named + Markup(markup[len("<svg ") :])


def _rounded(match: re.Match[str]) -> str:
    """Coordinates to a hundredth of a point: nobody sees more, and they are half of a page."""
    return re.sub(r"(\.\d\d)\d+", r"\1", match[0])


def data_uri(image: Image.Image | str) -> str:
    """A picture as a data URI: PNG, or JPEG where that is much smaller (photographs); a JPEG in
    base64 as it is."""
    if isinstance(image, str):
        return f"data:image/jpeg;base64,{image}"
    image = image.convert("RGB")
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=90, subsampling=0)
    small = jpeg.tell() < 0.6 * png.tell()
    kind, data = ("jpeg", jpeg) if small else ("png", png)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _unique(sections: Iterable[Section]) -> list[Section]:
    seen: dict[str, int] = {}
    made = []
    for part in sections:
        seen[part.anchor] = seen.get(part.anchor, 0) + 1
        anchor = part.anchor if seen[part.anchor] == 1 else f"{part.anchor}-{seen[part.anchor]}"
        made.append(Section(part.title, part.parts, anchor))
    return made


def _inline(words: str) -> Markup:
    safe = str(escape(words))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", safe))


_NUMBER = re.compile(
    r"\s*[-+−±×<≤>≥]?\s*[\d.,]+(e[-+]?\d+)?\s*(%|×|x|s|ms|pp|points?|MB|GB|GiB)?\s*((\[.*\])|(\(.*\))|(±.*))?\s*"
)


def _numeric(cell: Any) -> bool:
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return True
    words = str(cell)
    return words.strip() in ("", "–", "—", "n/a") or _NUMBER.fullmatch(words) is not None


def _cell(cell: Any) -> Markup:
    """A cell; an interval behind a number is set back."""
    words = f"{cell:.3g}" if isinstance(cell, float) else str(cell)
    match = re.fullmatch(r"(.*\S)\s+(\[[^\]]*\])", words)
    if match and _numeric(words):
        return Markup('{} <span class="ci">{}</span>').format(match[1], match[2])
    return _inline(words)
