"""Cells by measurement: they are the closed forms' where there is one, and where there is none,
painting a cell moves it."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import corelens as cl
from corelens.hf import attention_off
from corelens.layouts.base import Layout
from corelens.model import probing
from helpers import families, family_recent
from helpers.family_parts import randomise

SIZE = (320, 256)
PLACED = ("mistral3", "aya_vision", "glm46v", "qwen3_5", "lfm2_vl", "llama4", "gemma4")


@cache
def recent(family):
    hf, processor = family_recent.BUILDERS[family]()
    return cl.HookedMLLM(randomise(hf), processor)


def overlap(a, b):
    inner = (
        (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    )
    return inner / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_measured_cells_are_the_closed_form(family):
    hf, processor = families.tiny(family)
    model = cl.HookedMLLM(hf, processor)
    size = (300, 180) if family == "llava_next" else SIZE
    token_map = model.prepare(cl.Sample([Image.new("RGB", size)], "What is it?")).token_maps[0]
    cells = probing.Prober(hf, model.layout)(processor, {}, size)
    visual = torch.isin(token_map.placeholder, token_map.visual)
    known = torch.tensor(
        [token_map.cell(position)[1:] for position in token_map.visual.tolist()],
        dtype=torch.float64,
    )
    # tokens of padding alone have no cell
    seen = (known[:, 2] > known[:, 0]) & (known[:, 3] > known[:, 1])
    assert torch.equal(cells.visual, visual.masked_scatter(visual, seen))
    measured, known = cells.box[cells.visual], known[seen]
    if (
        family == "llava_onevision"
    ):  # a pooled token sees its neighbours' pixels too, by weights: the middle is what counts
        middle = (measured[:, :2] + measured[:, 2:]) / 2
        assert ((known[:, :2] <= middle) & (middle <= known[:, 2:])).all()
    else:
        assert overlap(measured, known).min() > 0.94


@pytest.mark.parametrize("family", PLACED)
def test_painting_a_cell_moves_its_token(family):
    model = recent(family)
    picture, noise = probing._test_picture(SIZE)
    token_map = model.prepare(
        cl.Sample([Image.fromarray(picture.astype(np.uint8))], "What is it?")
    ).token_maps[0]
    decoder = model.layout.decoder(model.hf)
    tower = [
        m
        for m in model.hf.modules()
        if m not in set(decoder.modules()) and getattr(m, "config", None) is not model.hf.config
    ]

    def features(pixels):
        tensors = model.prepare(
            cl.Sample([Image.fromarray(pixels.clip(0, 255).astype(np.uint8))], "What is it?")
        ).tensors
        with torch.no_grad(), attention_off(tower):
            return probing.first_layer_input(model.hf, decoder, tensors)[0]

    before = features(picture)

    def moved_by(x0, y0, x1, y1):
        """How far each visual token moves when the middle of this cell is painted."""
        inner = (
            slice(round(y0 + 0.2 * (y1 - y0)), round(y1 - 0.2 * (y1 - y0))),
            slice(round(x0 + 0.2 * (x1 - x0)), round(x1 - 0.2 * (x1 - x0))),
        )
        painted = picture.copy()
        painted[inner] += noise[inner]
        return (features(painted) - before).norm(dim=-1)[token_map.visual]

    for index in range(0, len(token_map.visual), max(1, len(token_map.visual) // 6)):
        _, x0, y0, x1, y1 = token_map.cell(int(token_map.visual[index]))
        moved = moved_by(x0, y0, x1, y1)
        # of whichever view
        _, left, top, right, bottom = token_map.cell(int(token_map.visual[moved.argmax()]))
        assert left <= (x0 + x1) / 2 <= right and top <= (y0 + y1) / 2 <= bottom
        # a map that is off by one cell would not pass
        step = x1 - x0 if x1 + (x1 - x0) <= SIZE[0] else x0 - x1
        if x0 + step >= 0:
            assert moved_by(x0 + step, y0, x1 + step, y1)[index] < 0.5 * moved[index]


@pytest.mark.parametrize("family", PLACED)
def test_regions_and_ram_work(family):
    sample = cl.Sample(
        [Image.new("RGB", SIZE)],
        "What digit is on the red circle?",
        "7",
        regions=[cl.Box(10, 10, 60, 60)],
    )
    model = recent(family)
    assert len(model.prepare(sample).token_maps[0].region) >= 1
    scores = cl.score_heads(model, [sample], ["ram"])["ram"].values
    assert scores.shape[-1] == model.cfg.n_heads and np.nanmax(scores) > 0


def test_a_size_is_measured_once_in_few_calls(monkeypatch):
    model = recent("mistral3")
    calls = []
    original = probing.first_layer_input
    monkeypatch.setattr(
        probing, "first_layer_input", lambda *args: calls.append(1) or original(*args)
    )
    sample = cl.Sample([Image.new("RGB", (308, 252))], "What is it?")
    model.prepare(sample)
    assert 1 < len(calls) <= 17
    model.prepare([sample, sample])
    assert len(calls) <= 17


def test_tokens_without_a_place_are_refused(monkeypatch):
    hf, processor = family_recent.mistral3()
    model = cl.HookedMLLM(randomise(hf), processor)
    projector = model.hf.model.multi_modal_projector
    handle = projector.register_forward_hook(
        lambda module, args, out: out + out.mean(0, keepdim=True) * 50
    )
    inputs = model.prepare(cl.Sample([Image.new("RGB", SIZE)], "What is it?"))
    with pytest.raises(cl.CorelensError, match="could not be placed in the picture"):
        inputs.token_maps[0].images  # noqa: B018
    handle.remove()
    projector.register_forward_hook(lambda module, args, out: out * 0)
    inputs = model.prepare(cl.Sample([Image.new("RGB", (300, 256))], "What is it?"))
    with pytest.raises(cl.CorelensError, match="none of its image tokens moves"):
        inputs.token_maps[0].images  # noqa: B018


def test_a_written_layout_is_not_measured():
    hf, processor = families.tiny("internvl")
    assert cl.HookedMLLM(hf, processor).layout.probe is None
    assert isinstance(recent("mistral3").layout, Layout)
