"""Draw the pictures of docs/index.md and docs/concepts.md: `python docs/_build/pictures.py`."""

from pathlib import Path

import corelens as cl

IMAGES = Path(__file__).parents[1] / "images"

model = cl.load_demo()
sample = cl.synthetic("refer", n=1, seed=1)[0]
scores = cl.score_heads(model, cl.synthetic("refer", n=60, seed=2), "ram")["ram"]
model.prepare(sample).show().savefig(IMAGES / "patches.png", dpi=130)
cl.overlay(model, sample, scores.top(k=5)).savefig(IMAGES / "overlay.png", dpi=120)
