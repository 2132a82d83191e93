"""Measured families: tiles and thumbnails have their names, and separators are no visual tokens."""

from functools import cache

import pytest
import torch
from PIL import Image

import corelens as cl
from corelens.errors import CorelensError
from corelens.inputs.tensors import from_tensors
from corelens.layouts.base import Layout
from corelens.model.probing import measured
from corelens.model.views import views_of
from helpers import families, family_recent
from helpers.family_parts import randomise

SIZE = (320, 256)


@cache
def token_map_of(family):
    hf, processor = family_recent.BUILDERS[family]()
    model = cl.HookedMLLM(randomise(hf), processor, check=False)
    return model.prepare(cl.Sample([Image.new("RGB", SIZE)], "What is it?")).token_maps[0]


def bounds(token_map, name):
    cells = torch.tensor([token_map.cell(int(p))[1:] for p in token_map.positions(name)])
    return [*cells[:, :2].min(0).values.tolist(), *cells[:, 2:].max(0).values.tolist()]


@pytest.mark.parametrize("family", ["aya_vision", "llama4"])
def test_tiles_and_the_thumbnail_have_their_names(family):
    token_map = token_map_of(family)
    views = token_map.pictures[0].views
    tiles = [f"tile:{number}" for number in range(int(views.max()) + 1)]
    assert len(tiles) >= 2
    named = torch.cat([token_map.positions(name) for name in [*tiles, "thumbnail"]])
    assert torch.equal(named.sort().values, token_map.visual)
    whole = bounds(token_map, "thumbnail")
    assert whole[2] - whole[0] > 0.9 * SIZE[0] and whole[3] - whole[1] > 0.9 * SIZE[1]
    boxes = [bounds(token_map, name) for name in tiles]
    middles = [((b[1] + b[3]) // 2, (b[0] + b[2]) // 2) for b in boxes]
    assert middles == sorted(middles) and len(set(middles)) == len(middles)  # row by row
    area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes)
    assert 0.8 < area / (SIZE[0] * SIZE[1]) < 1.2  # side by side


def grid(columns, rows, x0, y0, x1, y1):
    w, h = (x1 - x0) / columns, (y1 - y0) / rows
    return torch.tensor(
        [[x0 + w * c, y0 + h * r, x0 + w * (c + 1), y0 + h * (r + 1)]
         for r in range(rows) for c in range(columns)]
    )  # fmt: skip


def test_views_are_told_apart_by_rows_columns_and_markers():
    whole = grid(4, 4, 0, 0, 100, 100)
    square = [grid(4, 4, x, y, x + 50, y + 50) for y in (0, 50) for x in (0, 50)]
    box = torch.cat([*square, whole])
    wanted = torch.tensor([0, 1, 2, 3, -1]).repeat_interleave(16)
    assert torch.equal(views_of(box, torch.arange(80), (100, 100)), wanted)
    # one above the other: nothing but the marker between them tells them apart
    stacked = torch.cat([grid(4, 4, 0, 0, 100, 50), grid(4, 4, 0, 50, 100, 100), whole])
    marked = torch.arange(48) + torch.tensor([0, 1, 2]).repeat_interleave(16)
    assert views_of(stacked, marked, (100, 100)).tolist() == [0] * 16 + [1] * 16 + [-1] * 16
    assert views_of(whole, torch.arange(16), (100, 100)) is None
    # a break behind every row is no view
    rows = torch.arange(16) + torch.arange(4).repeat_interleave(4)
    assert views_of(whole, rows, (100, 100)) is None


def test_a_picture_shown_once_has_no_tiles():
    hf, processor = family_recent.mistral3()
    model = cl.HookedMLLM(randomise(hf), processor, check=False)
    token_map = model.prepare(cl.Sample([Image.new("RGB", SIZE)], "What is it?")).token_maps[0]
    with pytest.raises(CorelensError, match="shows each picture once"):
        token_map.positions("tile:0")


def test_tensors_by_hand_have_the_visual_tokens_of_the_closed_form():
    hf, processor = families.tiny("llava_next")  # newline tokens between rows of patches
    model = cl.HookedMLLM(hf, processor, check=False)
    inputs = model.prepare(cl.Sample([Image.new("RGB", (300, 180))], "What is it?"))
    known = inputs.token_maps[0]
    assert len(known.visual) < len(known.placeholder)
    layout = measured(Layout().fitted(hf), hf)
    found = from_tensors(inputs.tensors, layout, hf.config, processor).token_maps[0]
    assert torch.equal(found.placeholder, known.placeholder)
    assert torch.equal(found.visual, known.visual)
