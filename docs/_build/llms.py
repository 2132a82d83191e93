"""llms.txt, a summary for coding agents (llmstxt.org), made of the docs: `python
docs/_build/llms.py llms.txt`.

It holds the lead of the start page, the code of the cheat sheet, every page with its first
sentence, and every public name with the first line of its docstring. The site has it at its root.
Nothing is imported from the package.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from reference import DOCS, defined_in, public_names

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def llms_txt() -> str:
    """The whole text."""
    lead = _paragraphs((DOCS / "index.md").read_text(encoding="utf-8"))[0]
    code = CODE.findall((DOCS / "cheat-sheet.md").read_text(encoding="utf-8"))
    parts = [
        f"# CoreLens\n\n> {lead}",
        "## How it is used\n\n```python\n" + "\n".join(code) + "```",
    ]
    pages = [page for page in sorted(DOCS.rglob("*.md")) if "reference" not in page.parts]
    links = [f"- [{title}]({path}): {first}" for title, path, first in map(_page, pages)]
    parts.append("## Pages\n\n" + "\n".join(links))
    names = [
        f"- `cl.{name}`: {_first_line(name, module)}" for name, module in public_names().items()
    ]
    parts.append("## Public names\n\n" + "\n".join(names))
    return "\n\n".join(parts) + "\n"


def _paragraphs(markdown: str) -> list[str]:
    """Paragraphs of plain text, each in one line."""
    blocks = re.split(r"\n\s*\n", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))
    return [" ".join(block.split()) for block in blocks if re.match(r"[\w`*\"]", block.strip())]


def _page(path: Path) -> tuple[str, str, str]:
    text = path.read_text(encoding="utf-8")
    title = next(line[2:] for line in text.splitlines() if line.startswith("# "))
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", _paragraphs(text)[0])
    return (
        title,
        path.relative_to(DOCS).with_suffix(".html").as_posix(),
        re.split(r"(?<=[.?:]) ", plain)[0],
    )


def _first_line(name: str, module: str) -> str:
    """The first sentence of the docstring of a public name, read from its source."""
    plain = name.rpartition(".")[2]
    path = DOCS.parent.joinpath(*defined_in(name, module).split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(
        encoding="utf-8"
    )
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == plain:
            return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    return ""


def on_post_build(config: Any, **_: Any) -> None:
    """Put it at the root of the site."""
    (Path(config.site_dir) / "llms.txt").write_text(llms_txt(), encoding="utf-8")


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "llms.txt").write_text(llms_txt(), encoding="utf-8")
