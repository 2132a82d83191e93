"""docs/which-heads.md as a notebook, docs/which-heads.ipynb: `python docs/_build/notebook.py`. Its
code is the page's, which the tests run; text between is the page's, too."""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]


def notebook(markdown: str) -> dict[str, Any]:
    """The page's text and its Python blocks as cells, in order, without outputs."""
    cells = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```", markdown, flags=re.DOTALL)):
        source = part.strip()
        if not source:
            continue
        if number % 2:
            cell: dict[str, Any] = {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell = {"cell_type": "markdown"}
        cell |= {"id": f"cell-{len(cells)}", "metadata": {}}
        cells.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def text() -> str:
    """The notebook of the page as it is now, as a file's text."""
    page = (DOCS / "which-heads.md").read_text(encoding="utf-8")
    return json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (DOCS / "which-heads.ipynb").write_text(text(), encoding="utf-8")
