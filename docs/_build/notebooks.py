"""Tutorials and findings, as pages of the site: each notebook's text, code and committed outputs;
nothing is run."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FOLDERS = {"Tutorials": "tutorials", "Findings": "notebooks"}  # by their title in the navigation


def on_config(config: Any, **_: Any) -> None:
    """Give each notebook its place in the navigation."""
    for title, folder in FOLDERS.items():
        entry = next(part for part in config.nav if title in part)
        entry[title] += [
            f"{folder}/{path.stem}.md" for path in sorted((ROOT / folder).glob("*.ipynb"))
        ]


def on_files(files: Files, config: Any, **_: Any) -> None:
    """Add a page, and its pictures, for each notebook."""
    for folder in FOLDERS.values():
        for path in sorted((ROOT / folder).glob("*.ipynb")):
            text, pictures = page_of(json.loads(path.read_text()), path.stem)
            files.append(File.generated(config, f"{folder}/{path.stem}.md", content=text))
            for name, content in pictures.items():
                files.append(File.generated(config, f"{folder}/{name}", content=content))


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs of a cell, with neighbouring pieces of printed text made one."""
    result: list[dict[str, Any]] = []
    for output in outputs:
        if result and output.get("name") == result[-1].get("name") == "stdout":
            text = "".join(result[-1]["text"]) + "".join(output["text"])
            result[-1] = {**output, "text": text}
        else:
            result.append(output)
    return result


def page_of(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the names under which the Markdown shows them."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source)  # a lesson links to the next
            parts.append(source.replace("<details>", '<details markdown="1">'))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in joined(cell["outputs"]):
            data = {kind: "".join(content) for kind, content in output.get("data", {}).items()}
            if "image/png" in data:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f'<img class="output" src="{name}" alt="Output of the code above">')
            elif "text/html" in data:
                parts.append(f'<div class="output">{data["text/html"]}</div>')
            elif output.get("name") != "stderr":
                text = data.get("text/plain") or "".join(output["text"])
                parts.append(f"```{{ .text .output .no-copy }}\n{text.rstrip()}\n```")
    return "\n\n".join(parts), pictures
