"""Which part of a picture each visual token covers, measured: for families whose geometry nobody
wrote down.

Strips of a test picture are perturbed, columns first, then rows; each perturbed picture goes
through the family's own processor and tower, and the inputs of the decoder's first layer that move
are the tokens that see the strip. The tower's attention is off meanwhile, so that a token answers
for its own pixels alone. Columns × rows give each token's cell, for tiles and thumbnails alike. A
resampler (Q-Former, perceiver) has no such place: that is an error.
"""

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import attention_off
from corelens.inputs.processing import NOT_FOR_THE_MODEL
from corelens.layouts import Layout
from corelens.model.views import all_views
from corelens.tokens.cells import Cells

MOST_STRIPS = 128  # of an axis: 16 calls of 16 pictures for both
PICTURES = 16  # a call of the processor and the tower
MOVED = 0.3  # of a token's strongest response: what a strip must give to belong to its cell


def measured(layout: Layout, hf: nn.Module) -> Layout:
    """This layout; if nobody wrote its family's geometry down, it measures it when it is asked
    for."""
    if type(layout) is Layout:
        layout.probe = Prober(hf, layout)
    return layout


class Prober:
    """Cells by measurement, kept by processor options and picture size.

    Args:
        hf: the Hugging Face model (held weakly: the layout that asks belongs to it).
        layout: where its decoder is and which tokens stand for pictures.
    """

    def __init__(self, hf: nn.Module, layout: Layout):
        self.hf, self.layout = weakref.ref(hf), layout
        self.known: dict[str, Cells] = {}

    def __call__(self, processor: Any, options: dict[str, Any], size: tuple[int, int]) -> Cells:
        """The cells of one picture's placeholders, in the order of the prompt.

        Args:
            processor: the model's own. options: for its image processor. size: width, height of the
                original picture.

        Errors: tokens that never move, or that move wherever the picture is changed.
        """
        key = json.dumps(
            [processor.image_processor.to_dict(), options, size], default=str, sort_keys=True
        )
        if key not in self.known:
            hf = self.hf()
            assert hf is not None
            self.known[key] = _probe(hf, self.layout, processor, options, size)
        return self.known[key]

    def patches(self, tensors: Mapping[str, Any]) -> dict[int, Bool[Tensor, " placeholder"]] | None:
        """Which placeholders of a batch of tensors are patches: those that move when the pixels do.

        Per placeholder's token id a mask over all its tokens, row by row; None without pixels.
        """
        hf = self.hf()
        ids = tensors.get("input_ids")
        pixels = {
            name: x
            for name, x in tensors.items()
            if "pixel_values" in name and isinstance(x, Tensor) and x.is_floating_point()
        }
        if hf is None or ids is None or not pixels:
            return None
        generator = torch.Generator().manual_seed(0)
        noise = {
            name: torch.randn(x.shape, generator=generator).to(x) for name, x in pixels.items()
        }
        with torch.no_grad():
            seen = [
                first_layer_input(hf, self.layout.decoder(hf), {**tensors, **changed})
                for changed in ({}, noise)
            ]
        moved = (seen[1] - seen[0]).float().norm(dim=-1).cpu()
        on, ids = moved > 1e-4 * moved.max(), ids.cpu()
        return {
            token: on[ids == token]
            for token in set(self.layout.placeholders(hf.config))
            if bool((ids == token).any())
        }


def _probe(
    hf: nn.Module, layout: Layout, processor: Any, options: dict[str, Any], size: tuple[int, int]
) -> Cells:
    picture, noise = _test_picture(size)
    decoder = layout.decoder(hf)
    prompt = _prompt(layout, processor)

    def embedded(pictures: Sequence[np.ndarray]) -> Float[Tensor, "picture pos d_model"]:
        images = [[Image.fromarray(pixels.clip(0, 255).astype(np.uint8))] for pixels in pictures]
        return first_layer_input(hf, decoder, _processed(processor, prompt, images, options))

    ids = _processed(processor, prompt, [[Image.fromarray(picture.astype(np.uint8))]], options)[
        "input_ids"
    ][0]
    placeholder = torch.isin(ids.cpu(), torch.tensor(layout.placeholders(hf.config)))
    count = int(placeholder.sum())
    if not count:
        raise _unplaced(
            hf, "its prompt has no image token", "look at processor.apply_chat_template"
        )
    cells = []
    with attention_off(tower_modules(hf, decoder)), torch.no_grad():
        base = embedded([picture])[0, placeholder]
        _check_no_codes(hf, base)
        for axis, length in enumerate(size):
            edges = _edges(length, count, size[axis] / size[1 - axis])
            moved = []
            for first in range(0, len(edges) - 1, PICTURES):
                changed = []
                for start, stop in zip(
                    edges[first : first + PICTURES], edges[first + 1 :], strict=False
                ):
                    strip = (
                        (slice(None), slice(start, stop))
                        if axis == 0
                        else (slice(start, stop), slice(None))
                    )
                    pixels = picture.copy()
                    pixels[strip] += noise[strip]
                    changed.append(pixels)
                moved.append((embedded(changed)[:, placeholder] - base).float().norm(dim=-1).cpu())
            cells.append(spans(torch.cat(moved), torch.tensor(edges, dtype=torch.float64)))
    (columns, seen), (rows, seen_too) = cells
    visual = seen & seen_too
    box = torch.stack([columns[:, 0], rows[:, 0], columns[:, 1], rows[:, 1]], dim=1)
    _check_local(hf, box[visual], size, int(visual.sum()))
    box[visual] = _snapped(box[visual], size, count)
    box[~visual] = 0
    views = all_views(box, visual, placeholder.nonzero()[:, 0], size)
    return Cells(box=box, visual=visual, views=views)


def tower_modules(hf: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules beside the decoder's layers that have a config of their own (not all beside the
    decoder: some decoders hold the tower)."""
    inside = {decoder, *(module for layer in decoder.layers for module in layer.modules())}  # type: ignore[union-attr]
    text = {id(module.config) for module in inside if hasattr(module, "config")} | {id(hf.config)}
    held = [module for module in hf.modules() if module not in inside and hasattr(module, "config")]
    return [module for module in held if id(module.config) not in text]


def _test_picture(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A smooth picture [y, x, 3], and noise in blocks of 4 pixels to add to its strips."""
    width, height = size
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 196, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)).astype(
        np.int16
    )
    blocks = rng.choice([-48, 48], (-(-height // 4), -(-width // 4), 3)).astype(np.int16)
    return smooth, np.kron(blocks, np.ones((4, 4, 1), dtype=np.int16))[:height, :width]


def _prompt(layout: Layout, processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    return layout.plain_prompt(processor, 1, 0, "What is it?")


def _processed(
    processor: Any, prompt: str, images: list[Any], options: dict[str, Any]
) -> dict[str, Any]:
    more = {"images_kwargs": options} if options else {}
    features = processor(
        text=[prompt] * len(images),
        images=images,
        return_tensors="pt",
        padding=len(images) > 1,
        **more,
    )
    return {name: value for name, value in features.items() if name not in NOT_FOR_THE_MODEL}


class _Reached(Exception):
    """The decoder's first layer has been reached: nothing behind it needs to run."""


def first_layer_input(
    hf: nn.Module, decoder: nn.Module, tensors: dict[str, Any]
) -> Float[Tensor, "picture pos d_model"]:
    """What the decoder's first layer gets of a batch; nothing behind it runs."""
    weight = next(hf.parameters())
    tensors = {name: _like(value, weight) for name, value in tensors.items()}
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Reached

    handle = decoder.layers[0].register_forward_pre_hook(stop, with_kwargs=True)  # type: ignore[index, union-attr]
    try:
        hf(**tensors, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    x = seen[0]
    if x.ndim == 3:
        return x
    # of a decoder of several streams the first, which stands first or behind the positions
    return x[:, :, 0] if x.shape[:2] == tensors["input_ids"].shape else x[0]


def _like(value: Any, weight: Tensor) -> Any:
    """A tensor on the model's device, pixels in its dtype."""
    if not isinstance(value, Tensor):
        return value
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)


def _edges(length: int, count: int, ratio: float) -> list[int]:
    """Where strips begin and end: about four to a token of a picture cut evenly, 32 to 128, of two
    pixels or more."""
    along = max(1.0, (count * ratio) ** 0.5)
    strips = int(np.clip(round(4 * along), 32, MOST_STRIPS))
    strips = min(strips, max(1, length // 2))
    return np.unique(np.linspace(0, length, strips + 1).round().astype(int)).tolist()


def spans(
    moved: Float[Tensor, "strip token"], edges: Float[Tensor, " edge"]
) -> tuple[Float[Tensor, "token 2"], Bool[Tensor, " token"]]:
    """Per token where the strips begin and end that move it, and whether any does."""
    peak = moved.max(0).values
    seen = peak > 1e-4 * peak.max().clamp(min=1e-12)
    on = moved > MOVED * peak
    first = on.int().argmax(0)
    last = len(on) - 1 - on.flip(0).int().argmax(0)
    return torch.stack([edges[first], edges[last + 1]], dim=1), seen


def _check_no_codes(hf: nn.Module, base: Float[Tensor, "token d_model"]) -> None:
    """Raise where the tokens are rows of the embedding table, codes of a picture: they stay while a
    change is small, and jump with a large one, or with one far away that shifts a norm."""
    table: Any = hf.get_input_embeddings()  # type: ignore[operator]
    rows, sampled = nn.functional.normalize(table.weight.float()), base[:64].float()
    nearest = (nn.functional.normalize(sampled) @ rows.T.to(sampled.device)).amax(1)
    if float((nearest > 1 - 1e-5).float().mean()) > 0.9:
        raise _unplaced(hf, "they are codes out of the embedding table, which jump",
                        "write a Layout with image_cells() and register it: "
                        "cl.register_layout(MyLayout)")  # fmt: skip


def _check_local(
    hf: nn.Module, box: Float[Tensor, "token 4"], size: tuple[int, int], seen: int
) -> None:
    if not seen:
        raise _unplaced(hf, "none of its image tokens moves when pixels change while attention in "
            "its tower is off",
                        "such a resampler mixes the whole picture into each token")  # fmt: skip
    share = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (size[0] * size[1])
    if seen > 1 and float(share.median()) > 0.5:
        raise _unplaced(hf, "each of its image tokens moves wherever pixels change",
                        "its tokens have no place in the picture")  # fmt: skip


def _snapped(
    box: Float[Tensor, "token 4"], size: tuple[int, int], count: int
) -> Float[Tensor, "token 4"]:
    """Measured edges are off by up to a strip; cells of one size on an even grid are put on that
    grid."""
    box = box.clone()
    for view in _views(box):
        for axis, length in enumerate(size):
            strip = length / (len(_edges(length, count, size[axis] / size[1 - axis])) - 1)
            box[view, axis], box[view, axis + 2] = _even(
                box[view, axis], box[view, axis + 2], length, strip
            )
    return box


def _views(box: Float[Tensor, "token 4"]) -> list[Bool[Tensor, " token"]]:
    """Tokens with cells of one size: all tiles together, the thumbnail by itself.

    Tokens come row by row, so a view or tile begins where the next token lies higher up than the
    one before.
    """
    middle, extent = (box[:, 1] + box[:, 3]) / 2, box[:, 2:] - box[:, :2]
    begins = torch.cat([torch.tensor([True]), middle.diff() < -extent[1:, 1] / 2])
    part = begins.cumsum(0) - 1
    # of the views so far: width and height of a cell, and its tokens
    sizes: list[tuple[Tensor, Tensor]] = []
    for number in range(int(part[-1]) + 1):
        tokens = part == number
        cell = extent[tokens].median(0).values
        for i, (known, members) in enumerate(sizes):
            # a quarter more or less: the strips' own error
            if ((cell / known).log().abs() < 0.22).all():
                sizes[i] = (known, members | tokens)
                break
        else:
            sizes.append((cell, tokens))
    return [members for _, members in sizes]


def _even(
    low: Float[Tensor, " token"], high: Float[Tensor, " token"], length: float, strip: float
) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
    """The spans of equal cells side by side where these spans are that within a strip; else as they
    are.

    The lines between cells are fitted, not the cells' middles: a cell that the picture's border
    cuts has its inner line where it should be.
    """
    centre = (low + high) / 2
    order = centre.sort().values
    starts = torch.cat([torch.tensor([True]), order.diff() > 1.01 * strip])
    cell = torch.bucketize(centre, order[starts] - strip / 4, right=True) - 1
    n = int(starts.sum())
    if n < 2:
        return low, high
    first = torch.stack([low[cell == i].mean() for i in range(n)])
    last = torch.stack([high[cell == i].mean() for i in range(n)])
    line, index = (last[:-1] + first[1:]) / 2, torch.arange(1, n, dtype=low.dtype)
    step = torch.tensor(length / n, dtype=low.dtype)
    if (line - step * index).abs().max() < 1.01 * strip:  # the whole length, evenly
        line = step * index
    elif n > 2:
        step = ((line - line.mean()) * (index - index.mean())).sum() / (
            (index - index.mean()) ** 2
        ).sum()
        fitted = line.mean() + step * (index - index.mean())
        if (fitted - line).abs().max() > 1.01 * strip:
            return low, high  # unequal cells: what was measured
        line = fitted
    else:
        return low, high
    if (last[:-1] - first[1:]).mean().abs() > 1.05 * strip:
        return low, high  # overlapping cells, or gaps between them: what was measured
    edges = torch.cat([line[:1] - step, line, line[-1:] + step]).clamp(0, length)
    return edges[cell], edges[cell + 1]


def _unplaced(hf: nn.Module, reason: str, do: str) -> CorelensError:
    name = getattr(hf.config, "model_type", type(hf).__name__)
    return CorelensError(
        f"a model of type {name!r} whose image tokens could not be placed in the picture: {reason}",
        "image tokens that each see their own part of the picture, when regions, images or cells "
        "are asked for",
        f"{do}; hooks work without it, with rows and columns by position",
    )
