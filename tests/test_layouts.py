"""Token maps proven by experiment: paint pixels, and see which merged embeddings change.

The tower's attention is switched off (its output zeroed), so that what a token holds comes from its
own patches alone; the embeddings are taken where the decoder receives them, so merging, tiling,
newlines and scattering are the model's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample, prepare
from corelens.layouts import Layout, layout_for, register_layout
from corelens.model.towers import tower_layers
from corelens.tokens.token_map import TokenMap
from helpers.families import FAMILIES, tiny

PIXELS = {  # pixels along a token in the picture the tower sees
    "qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32, "qwen3_vl_moe": 32, "llava": 14, "llava_next": 14,
    "llava_onevision": 14, "internvl": 28, "gemma3": 28, "idefics3": 28, "smolvlm": 32, "paligemma": 14,
}  # fmt: skip
NATIVE = {  # a size (width, height) that passes unresized, at least in one view
    "qwen2_vl": (140, 84), "qwen2_5_vl": (140, 84), "qwen3_vl": (160, 96), "qwen3_vl_moe": (160, 96),
    "llava": (112, 112), "llava_next": (112, 112), "llava_onevision": (148, 148), "internvl": (224, 112),
    "gemma3": (112, 112), "idefics3": (336, 168), "smolvlm": (256, 128), "paligemma": (112, 112),
}  # fmt: skip
SIZES = [(200, 130), (640, 100), (61, 300)]  # odd, wide, narrow
VIDEO = [
    family for family in FAMILIES if getattr(tiny(family)[1], "video_processor", None) is not None
]


# --- the experiment


class _Seen(Exception):
    """Stops the forward pass once the embeddings are merged."""


@contextmanager
def local_tower(family: str) -> Iterator[None]:
    """Attention of the vision tower gives zeros: no patch sees another."""
    model, _ = tiny(family)
    layout = layout_for(model.config)
    layers = tower_layers(model, layout, "vision")
    assert len(layers) >= 2

    def silence(module, args, output):
        return (
            (torch.zeros_like(output[0]), *output[1:])
            if isinstance(output, tuple)
            else torch.zeros_like(output)
        )

    handles = [
        layer.module.get_submodule(layer.attention).register_forward_hook(silence)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def merged(
    family: str, samples: list[Sample], **options: Any
) -> tuple[torch.Tensor, list[TokenMap]]:
    """Embeddings [sample, pos, d_model] as the decoder receives them, and the token maps."""
    model, processor = tiny(family)
    layout = layout_for(model.config)
    inputs = prepare(samples, processor, layout, model.config, **options)
    seen = []

    def stop(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"])
        raise _Seen

    handle = layout.decoder(model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with local_tower(family), torch.no_grad(), pytest.raises(_Seen):
            model(**inputs.tensors)
    finally:
        handle.remove()
    return seen[0], inputs.token_maps


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 80, (height, width, 3), dtype=np.uint8)


Cell = tuple[int, float, float, float, float]
Block = tuple[int, int, int, int]


def all_cells(tm: TokenMap) -> dict[int, Cell]:
    return {position: tm.cell(position) for position in tm.visual.tolist()}


def some_cells(cells: dict[int, Cell], count: int = 6) -> list[int]:
    """Tokens whose cell holds a pixel: the first, the last, and some between."""
    tokens = [p for p, (_, x0, y0, x1, y1) in cells.items() if x1 - x0 >= 3 and y1 - y0 >= 3]
    between = np.random.default_rng(len(tokens)).permutation(tokens[1:-1])[: count - 2].tolist()
    return [tokens[0], *between, tokens[-1]]


def inside(cell: Cell) -> Block:
    """Whole pixels in the middle of a cell: x0, y0, x1, y1."""
    _, x0, y0, x1, y1 = cell
    left, top = int(x0 + (x1 - x0) * 0.35), int(y0 + (y1 - y0) * 0.35)
    return (
        left,
        top,
        max(left + 1, int(x0 + (x1 - x0) * 0.65)),
        max(top + 1, int(y0 + (y1 - y0) * 0.65)),
    )


def reach(family: str, cell: Cell, size: tuple[int, int]) -> tuple[float, float]:
    """How far beyond a cell the resampler reads, in pixels of the picture: 0 where the view is not
    resized."""
    twice = family in ("idefics3", "smolvlm")  # scaled, then squashed, with Lanczos's three lobes
    scale = [(cell[3] - cell[1]) / PIXELS[family], (cell[4] - cell[2]) / PIXELS[family]]
    if size == NATIVE[family] and all(abs(s - 1) < 1e-6 for s in scale):
        return 0.0, 0.0
    x, y = ((8 if twice else 3) * max(1.0, s) + 1 for s in scale)
    return x, y


def near(family: str, cell: Cell, block: Block, size: tuple[int, int]) -> bool:
    rx, ry = reach(family, cell, size)
    return (
        cell[1] - rx < block[2]
        and block[0] < cell[3] + rx
        and cell[2] - ry < block[3]
        and block[1] < cell[4] + ry
    )


def contains(cell: Cell, block: Block) -> bool:
    return (
        cell[1] <= block[0] and cell[2] <= block[1] and cell[3] >= block[2] and cell[4] >= block[3]
    )


def alike(cell: Cell, other: Cell) -> bool:
    """Cells of one size: tokens of one view, as a rule."""
    return (
        abs(cell[3] - cell[1] - other[3] + other[1]) < 1e-6
        and abs(cell[4] - cell[2] - other[4] + other[2]) < 1e-6
    )


def check_painted(
    family: str,
    cells: dict[int, Cell],
    position: int,
    changes: torch.Tensor,
    block: Block,
    size: tuple[int, int],
) -> None:
    """`changes` [pos]: how much each embedding moved when `block`, in the middle of a cell, was
    painted."""
    moved = set((changes > 1e-6).nonzero()[:, 0].tolist())
    assert position in moved
    assert moved <= {p for p, cell in cells.items() if near(family, cell, block, size)}
    # In every view the token that contains the paint whole moved; the token itself more than its
    # neighbours.
    holding = {p for p, cell in cells.items() if contains(cell, block)}
    assert holding <= moved
    neighbours = [
        p for p, cell in cells.items() if alike(cell, cells[position]) and p not in holding
    ]
    assert not neighbours or changes[position] > changes[neighbours].max()


def paint(
    family: str, size: tuple[int, int], wrong: Callable[[TokenMap], TokenMap] = lambda tm: tm
) -> None:
    """Paint the middle of one cell at a time; then everything but the cell (and what the resampler
    reads around it)."""
    clean = noise(*size)
    model, processor = tiny(family)
    tm = wrong(
        prepare(
            Sample(images=[clean]), processor, layout_for(model.config), model.config
        ).token_maps[0]
    )
    cells = all_cells(tm)
    tokens = some_cells(cells)
    blocks, pictures = [inside(cells[position]) for position in tokens], []
    for x0, y0, x1, y1 in blocks:
        pictures.append(clean.copy())
        pictures[-1][y0:y1, x0:x1] = 255
    for position in tokens:
        cell = cells[position]
        rx, ry = reach(family, cell, size)
        y0, y1 = max(0, int(np.floor(cell[2] - ry))), int(np.ceil(cell[4] + ry))
        x0, x1 = max(0, int(np.floor(cell[1] - rx))), int(np.ceil(cell[3] + rx))
        pictures.append(255 - clean)
        pictures[-1][y0:y1, x0:x1] = clean[y0:y1, x0:x1]
    embeddings, _ = merged(family, [Sample(images=[picture]) for picture in [clean, *pictures]])
    changes = (embeddings[1:] - embeddings[0]).abs().amax(-1)
    for number, (position, block) in enumerate(zip(tokens, blocks, strict=True)):
        check_painted(family, cells, position, changes[number], block, size)
        assert changes[number][tm.text].max() == 0
        assert changes[len(tokens) + number, position] < 1e-6


def shifted(tm: TokenMap) -> TokenMap:
    """A wrong map: every token claims the cell of the next."""
    return replace(
        tm, pictures=[replace(picture, box=picture.box.roll(-1, dims=0)) for picture in tm.pictures]
    )


# --- pictures


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_where_paint_shows(family, size):
    paint(family, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_exact_without_resizing(family):
    paint(family, NATIVE[family])


@pytest.mark.parametrize("size", [None, SIZES[0]], ids=["native", "resized"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_map_shifted_by_one_cell_fails(family, size):
    with pytest.raises(AssertionError):
        paint(family, size or NATIVE[family], shifted)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_of_one_sample_are_told_apart(family):
    """Paint one picture of three of different sizes: only tokens of that picture move, and those
    where the paint is."""
    pictures = [noise(200, 130, 1), noise(90, 150, 2), noise(120, 120, 3)]
    if family == "llava_onevision":  # several pictures of one sample are not tiled there
        assert len(merged(family, [Sample(images=pictures)])[1][0].visual) == 3 * 25
    for number in (0, 2):
        painted = [picture.copy() for picture in pictures]
        painted[number][40:60, 50:70] = 255
        embeddings, (tm, _) = merged(family, [Sample(images=pictures), Sample(images=painted)])
        moved = set(
            ((embeddings[1] - embeddings[0]).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
        )
        assert moved and moved <= set(tm.images[number].tolist())
        size, block = pictures[number].shape[1::-1], (50, 40, 70, 60)
        assert all(tm.cell(position)[0] == number for position in moved)
        assert all(near(family, tm.cell(position), block, size) for position in moved)
        assert {p for p in tm.images[number].tolist() if contains(tm.cell(p), block)} <= moved


@pytest.mark.parametrize("size", [(300, 100), (100, 250), (260, 100), (110, 100)], ids=str)
def test_pan_and_scan(size):
    """Gemma 3 with pan-and-scan: the whole picture, then crops along the longer side, where it is
    long enough."""
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 64}
    clean = noise(*size)
    painted = clean.copy()
    block = (size[0] // 2 - 20, size[1] // 2 - 15, size[0] // 2 - 8, size[1] // 2 - 5)
    painted[block[1] : block[3], block[0] : block[2]] = 255
    samples = [Sample(images=[clean]), Sample(images=[painted])]
    embeddings, (tm, _) = merged("gemma3", samples, images_kwargs=options)
    views = len(tm.visual) // 16
    assert views == {(300, 100): 4, (100, 250): 4, (260, 100): 4, (110, 100): 1}[size]
    moved = set(((embeddings[1] - embeddings[0]).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist())
    assert moved <= {p for p in tm.visual.tolist() if near("gemma3", tm.cell(p), block, size)}
    holding = {p for p in tm.visual.tolist() if contains(tm.cell(p), block)}
    assert holding <= moved and (views == 1 or len(moved) >= 2)


# --- video


def check_video(
    family: str, count: int, wrong: Callable[[TokenMap], TokenMap] = lambda tm: tm
) -> None:
    """Paint one place in one frame: tokens of that frame (or its pair) move, there."""
    size = (160, 96)
    frames = [noise(*size, seed) for seed in range(count)]
    pixels = {"llava_onevision": 28, "internvl": 28, "smolvlm": 32}.get(family, PIXELS[family])
    block, lobes = (64, 30, 72, 40), 8 if family == "smolvlm" else 3
    for frame in {count // 2, count - 1}:
        painted = [picture.copy() for picture in frames]
        painted[frame][block[1] : block[3], block[0] : block[2]] = 255
        embeddings, (tm, _) = merged(family, [Sample(video=frames), Sample(video=painted)])
        tm = wrong(tm)
        moved = set(
            ((embeddings[1] - embeddings[0]).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
        )
        seeing = {p for p in tm.visual.tolist() if frame in tm.frames(p)}
        assert moved and moved <= seeing == set(tm.positions(f"frame:{frame}").tolist())
        for position in moved:
            _, x0, y0, x1, y1 = tm.cell(position)
            rx, ry = (lobes * max(1.0, side / pixels) + 1 for side in (x1 - x0, y1 - y0))
            assert (
                x0 - rx < block[2]
                and block[0] < x1 + rx
                and y0 - ry < block[3]
                and block[1] < y1 + ry
            )
        assert {p for p in seeing if contains(tm.cell(p), block)} <= moved


@pytest.mark.parametrize("count", [4, 5, 1])
@pytest.mark.parametrize("family", VIDEO)
def test_frames(family, count):
    """An even and an odd number of frames, and a single one."""
    check_video(family, count)


@pytest.mark.parametrize("family", VIDEO)
def test_a_map_shifted_by_a_frame_or_a_cell_fails(family):
    def by_a_frame(tm: TokenMap) -> TokenMap:
        tokens = (tm.pictures[0].frames[:, 0] == 0).sum()
        return replace(
            tm,
            pictures=[replace(p, frames=p.frames.roll(int(tokens), dims=0)) for p in tm.pictures],
        )

    with pytest.raises(AssertionError):
        check_video(family, 4, by_a_frame)
    with pytest.raises(AssertionError):
        check_video(family, 4, shifted)


# --- registering


def test_an_unknown_family_is_wrapped_and_says_what_is_missing():
    model, processor = tiny("llava")
    tm = prepare(
        Sample(images=[noise(50, 50)], question="What?"), processor, Layout(), model.config
    ).token_maps[0]
    assert len(tm.visual) == 64 and len(tm.question) > 0
    for ask in (
        lambda: tm.images,
        lambda: tm.regions,
        lambda: tm.cell(int(tm.visual[0])),
        lambda: tm.positions("region"),
    ):
        with pytest.raises(CorelensError, match="register_layout"):
            ask()


def test_registering_a_layout():
    class Known(Layout):
        model_types = ("a_type_of_its_own",)

    class Config:
        model_type = "a_type_of_its_own"

    assert type(layout_for(Config())) is Layout
    assert register_layout(Known) is Known
    assert type(layout_for(Config())) is Known
    with pytest.raises(CorelensError, match="model_types"):
        register_layout(type("Nameless", (Layout,), {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_module_paths(family):
    """Every path that a layout names is there (experts have no gate of their own)."""
    model, _ = tiny(family)
    layout = layout_for(model.config)
    names = [
        "attention",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "ln1",
        "ln2",
        "attn_out",
        "mlp_out",
        "mlp",
    ]
    for layer in layout.decoder(model).layers:
        for name in (
            names if family == "qwen3_vl_moe" else [*names, "mlp_gate", "mlp_up", "mlp_down"]
        ):
            assert layer.get_submodule(getattr(layout, name))
    for layer in tower_layers(model, layout, "vision"):
        assert not layer.absent() and layer.n_heads == layer.n_kv_heads == 2


# --- DeepStack


def _into_layer(decoder: torch.nn.Module, layer: int, run: Callable[[], Any]) -> torch.Tensor:
    """What a decoder layer receives (output_hidden_states gives what layers return, before
    DeepStack's addition)."""
    seen: list[torch.Tensor] = []
    handle = decoder.layers[layer].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_is_seen_and_edited(family):
    model, processor = tiny(family)
    layout = layout_for(model.config)
    decoder = layout.decoder(model)
    inputs = prepare(
        [Sample(images=[noise(64, 96)]), Sample(images=[noise(128, 64)])],
        processor,
        layout,
        model.config,
    )
    run = inputs.tensors
    with torch.no_grad():
        plain = model(**run)
        seen = []
        for _ in range(2):  # the count starts anew with every forward pass
            seen.clear()
            with layout.deepstack(
                decoder, lambda layer, added: seen.append((layer, added)) or added
            ):
                watched = model(**run)
        assert [layer for layer, _ in seen] == list(range(layout.deepstack_layers(model))) == [0, 1]
        assert torch.equal(watched.logits, plain.logits)
        for row, tm in enumerate(inputs.token_maps):
            off = torch.ones(tm.length, dtype=torch.bool)
            off[tm.visual] = False
            assert all(
                added[row, off].abs().max() == 0 and added[row, tm.visual].abs().min() > 0
                for _, added in seen
            )
        # everywhere, text too
        with layout.deepstack(decoder, lambda layer, added: added + (layer == 1)):
            edited = _into_layer(decoder, 2, lambda: model(**run))
        assert torch.allclose(edited, _into_layer(decoder, 2, lambda: model(**run)) + 1, atol=1e-6)
        assert "_deepstack_process" not in vars(decoder)
        assert torch.equal(model(**run).logits, plain.logits)
    with pytest.raises(RuntimeError), layout.deepstack(decoder, lambda layer, added: added):
        raise RuntimeError
    assert "_deepstack_process" not in vars(decoder) and not decoder._forward_pre_hooks
