"""The pages of docs/ are Markdown that a code-hosting site shows as it is; the site of mkdocs has
more, and gets it here.

- A link to a notebook or to CHANGELOG.md leads to the page that the site makes of it.
- A picture that links to an explorer's page becomes that page, in a frame.
- A drawing (SVG) stands in the page itself, and so takes the text's colour.
- Code blocks that follow each other, each below a line of `**Name**`, become tabs.
"""

import os
import re
import textwrap
from pathlib import Path, PurePosixPath
from typing import Any

DOCS = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\(((?:\.\./)+(?:tutorials/\w+\.ipynb|notebooks/\w+\.ipynb|CHANGELOG\.md))")
FRAMED = re.compile(r"\[!\[([^\]]*)\]\([^)]*\)\]\(([^)]*explorer\.html#[^)]*)\)")
DRAWING = re.compile(r"!\[[^\]]*\]\((images/[\w-]+\.svg)\)")
TAB = re.compile(r"\*\*(\w[\w ]*)\*\*\n\n(```python\n.*?\n```)\n", re.DOTALL)
TABS = re.compile(rf"(?:^{TAB.pattern}\n*){{2,}}", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page's Markdown as the site needs it."""
    return for_site(markdown, PurePosixPath(page.file.src_uri))


def for_site(markdown: str, page: PurePosixPath) -> str:
    """The same of a page by its path below docs/."""
    frame = r'<iframe class="explorer" src="\2" title="\1" loading="lazy"></iframe>'
    markdown = OUTSIDE.sub(lambda link: "](" + inside(link[1], page), markdown)
    markdown = TABS.sub(lambda blocks: "".join(map(tab, TAB.finditer(blocks[0]))), markdown)
    return DRAWING.sub(lambda link: drawing(DOCS / link[1]), FRAMED.sub(frame, markdown))


def inside(link: str, page: PurePosixPath) -> str:
    """The link from a page of the site to the page that is made of a file beside docs/."""
    file = PurePosixPath(os.path.normpath(page.parent / link)).relative_to("..")
    made = "changelog.md" if file.name == "CHANGELOG.md" else file.with_suffix(".md").as_posix()
    return os.path.relpath(made, page.parent)


def tab(block: re.Match[str]) -> str:
    """A named block of code as one tab."""
    return f'=== "{block[1]}"\n\n{textwrap.indent(block[2], "    ")}\n\n'


def drawing(path: Path) -> str:
    """A drawing's SVG without the style that it needs where it is shown as a picture."""
    text = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return f"<figure>{' '.join(text.split())}</figure>"
