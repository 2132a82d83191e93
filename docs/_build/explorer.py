"""Make the explorer's example page and, by Chromium, its picture: `python
docs/_build/explorer.py`."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import corelens as cl

DOCS = Path(__file__).parents[1]


def main() -> None:
    """The first scene of its seed, with two rankings to colour by; the picture shows where a head
    looks from the token "star"."""
    model, samples = cl.load_demo(), cl.synthetic("refer", n=31, seed=1)
    scores = cl.score_heads(model, samples[1:], ["ram", "ram[rows=last]"])
    page = cl.explore(model, samples[0], scores).save(DOCS / "examples/explorer.html")
    picture = DOCS / "images/explorer.png"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                shutil.which("chromium") or "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={folder}",
                "--virtual-time-budget=3000",
                "--window-size=1180,850",
                f"--screenshot={picture}",
                f"file://{page.resolve()}#rows=7&head=135&by=region",
            ],
            check=True,
            capture_output=True,
        )
    for path in (page, picture):
        print(path.relative_to(DOCS), f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
