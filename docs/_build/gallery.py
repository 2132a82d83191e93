"""Draw the pictures of docs/gallery.md by its own code: `python docs/_build/gallery.py` (needs
Chromium for one)."""

import ast
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

DOCS = Path(__file__).parents[1]
ENTRY = re.compile(
    r"```python\n(.*?)```(?:\n\n!\[[^\]]*\]\((images/[\w-]+\.png)\))?", flags=re.DOTALL
)
MOST = 150_000  # bytes a picture


def last_value(code: str, space: dict) -> object:
    """Run a block; the value of its last line."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "gallery", "exec"), space)
    return (
        None
        if last is None
        else eval(compile(ast.Expression(last.value), "gallery", "eval"), space)
    )


def draw(value: object, path: Path) -> None:
    """A figure as it is; an interactive view as Chromium shows it."""
    if hasattr(value, "savefig"):
        for dpi in (110, 84, 64):  # as fine as fits
            value.savefig(path, dpi=dpi, bbox_inches="tight", pad_inches=0.08)
            if path.stat().st_size <= MOST:
                break
    else:
        with tempfile.TemporaryDirectory() as folder:
            value.save(Path(folder) / "page.html")
            subprocess.run(
                [
                    shutil.which("chromium"),
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--hide-scrollbars",
                    f"--user-data-dir={folder}/profile",
                    "--virtual-time-budget=3000",
                    "--window-size=1000,1500",
                    f"--screenshot={path}",
                    f"file://{folder}/page.html",
                ],
                check=True,
                capture_output=True,
            )
    print(path.name, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    space: dict = {}
    for code, image in ENTRY.findall((DOCS / "gallery.md").read_text()):
        value = last_value(code, space)
        if image:
            draw(value, DOCS / image)
