"""What commands write to --out: which kind of file, a picture of a figure, a page that opens."""

import io
from pathlib import Path
from typing import Any

import typer

from corelens.disk.write import write_whole
from corelens.errors import CorelensError

PICTURE = ("png", "pdf", "svg", "jpg")


def show_page(path: Path, wanted: bool) -> None:
    """Open a page that was written, if that is wanted."""
    if wanted and path.suffix.lower() == ".html":
        typer.launch(path.resolve().as_uri())


def write_picture(figure: Any, path: Path) -> None:
    """A matplotlib figure as a file, of the kind that its name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lower().lstrip("."), bbox_inches="tight")
    write_whole(path, buffer.getvalue())


def ending(out: Path, *others: str) -> str:
    """The ending of a file to write, without its dot: a picture's, html, or one of `others`."""
    suffix, known = out.suffix.lower().lstrip("."), ("html", *others, *PICTURE)
    if suffix not in known:
        raise CorelensError(
            f"--out {out}", f"a file that ends in .{', .'.join(known)}", "name it so"
        )
    return suffix
