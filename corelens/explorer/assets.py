"""The script and the style sheet of the explorer, for the page and for the widget."""

from pathlib import Path

HERE = Path(__file__).parent


def script() -> str:
    """The JavaScript that defines `corelensExplorer`: the legends, and what draws them."""
    return "\n".join(_text(name) for name in ("legend.js", "explorer.js"))


def style() -> str:
    """The style sheet."""
    return _text("explorer.css")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
