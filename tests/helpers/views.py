"""What tests of pictures draw: a token map of 6 × 4 patches, scores, a model that hands out a given
pattern, and a page with every part."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from corelens.heads.scores import HeadScores
from corelens.tokens.cells import Picture, covered_tokens
from corelens.tokens.token_map import TokenMap
from corelens.viz import head_grid, head_grid_html, sorted_scores
from corelens.viz import page as pages

SIZE = (96, 64)  # 6 × 4 patches of 16 pixels
EVIL = '<script>alert(1)</script><img src=x onerror=alert(1)>" onload="x'


def grid_boxes(columns, rows, x0, y0, x1, y1):
    w, h = (x1 - x0) / columns, (y1 - y0) / rows
    return [
        [x0 + i * w, y0 + j * h, x0 + (i + 1) * w, y0 + (j + 1) * h]
        for j in range(rows)
        for i in range(columns)
    ]


def token_map(regions=(), boxes=None, frames=None, start=2):
    boxes = torch.tensor(boxes if boxes is not None else grid_boxes(6, 4, 0, 0, *SIZE))
    visual = torch.arange(start, start + len(boxes))
    length = int(visual[-1]) + 6
    pictures = [Picture(visual, boxes, frames)]
    return TokenMap(
        torch.ones(length, dtype=torch.bool), visual, visual, torch.tensor([length - 1]), pictures,
        parts={"question": torch.arange(length - 4, length - 1)},
        covered=covered_tokens(pictures, regions, "touch"), id="s1",
    )  # fmt: skip


def scores(layers=3, heads=5, n=20, **meta):
    base = np.random.default_rng(0).gamma(0.5, 0.1, size=(1, layers, heads))
    noise = np.random.default_rng(1).normal(0, 0.01, size=(n, layers, heads))
    return HeadScores(per_sample=np.abs(base + noise), meta={"metric": "ram", "key": "ram", **meta})


class FakeModel:
    """What `overlay` asks of a model: its size, prepare, to_str_tokens, pattern_rows,
    run_with_cache."""

    cfg = SimpleNamespace(n_layers=9, n_heads=9)

    def __init__(self, tm, pattern):
        self.tm, self.pattern, self.asked = tm, pattern, []

    def prepare(self, sample, **options):
        pictures = [*sample.images, *([sample.video] if sample.video else [])]
        return SimpleNamespace(token_maps=[self.tm], pictures=[pictures])

    def to_str_tokens(self, inputs):
        return [f" t{i}" for i in range(self.tm.length)]

    def pattern_rows(self, rows):
        self.asked.append(rows)
        return nullcontext()

    def run_with_cache(self, inputs, names_filter, return_type):
        self.asked.append((tuple(names_filter), return_type))
        return None, dict.fromkeys(names_filter, self.pattern)


def whole_page():
    s = scores(rows="question", reduce="max")
    return pages.page(
        f"Title {EVIL}",
        [
            pages.section(f"One {EVIL}", f"text {EVIL} `code {EVIL}` **strong**", pages.tiles([(EVIL,) * 3], hot=0)),
            pages.section("Two", pages.table(["a", EVIL], [[EVIL, EVIL], ["x", 0.25]], EVIL, hot=[0], groups=[1])),
            pages.section("Two", pages.note(EVIL), pages.heading(EVIL), pages.figure(head_grid(s), EVIL)),
            pages.section("", pages.pair(pages.figure(sorted_scores(s), "b"), pages.figure(head_grid(s), "c"))),
            pages.section("Pictures", pages.pictures([(EVIL, [(Image.new("RGB", (8, 8)), EVIL)] * 3)], EVIL)),
            pages.section("Grid", pages.figure(pages.html(head_grid_html(s)), "hover")),
        ],
        {"model": EVIL, EVIL: 3},
        subtitle=EVIL,
    )  # fmt: skip
