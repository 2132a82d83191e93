"""How the tables of README and documentation are written."""

import textwrap
from typing import Any


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    table_rows = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([table_rows[0], "|---" * len(rows[0]) + "|", *table_rows[1:]]) + "\n"


def interval(part: dict[str, Any]) -> str:
    """ "0.084 [0.052, 0.120]"; of an accuracy with `ci`, or of a value with `low` and `high`."""
    if "ci" in part:
        value, (low, high) = part["accuracy"], part["ci"]
    else:
        value, low, high = part["value"], part["low"], part["high"]
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def paragraph(text: str, indent: str = "") -> str:
    """Text in rows of 120 columns at most."""
    wrapped = textwrap.fill(
        text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped + "\n"


def listed(names: list[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return f" {last} ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
