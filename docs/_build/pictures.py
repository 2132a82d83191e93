"""Draw the pictures of docs/index.md and docs/concepts.md: `python docs/_build/pictures.py`."""

from pathlib import Path

import corelens as cl

IMAGES = Path(__file__).parents[1] / "images"

model = cl.load_demo("qwen3vl-s")
sample = cl.synthetic("refer", n=1, seed=1)[0]
core = cl.score_heads(model, cl.synthetic("refer", n=60, seed=2), "ram[rows=last]")[
    "ram[rows=last]"
].top(0.05)
model.prepare(sample).show().savefig(IMAGES / "patches.png", dpi=130)
cl.overlay(model, sample, core, rows="last").savefig(IMAGES / "overlay.png", dpi=120)
