"""docs/which-heads.md as a notebook with its outputs, docs/which-heads.ipynb: `python
docs/_build/notebook.py` runs it (a minute; it needs nbclient, which the extra `dev` brings). Code
and text are the page's."""

import json
import re
import tempfile
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


def made() -> dict[str, Any]:
    """The notebook of the page as it is now, not yet run."""
    return notebook((DOCS / "which-heads.md").read_text(encoding="utf-8"))


def run(cells: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its code. What runs of the kernel differ in is left out, and
    what is written to the error stream: progress bars and warnings."""
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        unrun = nbformat.reads(json.dumps(cells), as_version=4)
        executed = NotebookClient(
            unrun, timeout=900, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in executed["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] == "code":
            cell["outputs"] = [
                part
                for part in cell["outputs"]
                if part.get("name") != "stderr"
                and not any("widget" in x for x in part.get("data", {}))
            ]
    executed["metadata"] = cells["metadata"]
    return json.loads(nbformat.writes(executed))


if __name__ == "__main__":
    text = json.dumps(run(made()), indent=1, ensure_ascii=False) + "\n"
    (DOCS / "which-heads.ipynb").write_text(text, encoding="utf-8")
