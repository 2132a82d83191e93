"""One run of one sample, recorded for the explorer: what each row of text puts on each visual
token, head by head.

The layer × head grid needs two numbers a row and head (mass on the region and on the picture):
these are kept for all heads. Maps over the visual tokens are kept for the heads of highest mass, as
far as a budget of bytes reaches; what was left out is written down. Attention is stored as
round(255·√(a / peak)) in one byte, peak being the largest value of its row and head, which keeps
small values apart: the error is at most peak / 255.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.scores import HeadScores
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.tokens.regions import Box, Mask, Shape
from corelens.tokens.token_map import TokenMap
from corelens.viz.heat import of_panel, panels, tokens_in_frame

BUDGET = 1_300_000  # bytes of maps
MOST_ROWS = 64  # rows of text
MOST_TEXT = 128  # text tokens that are shown, and kept as keys
LONGEST = 720  # pixels of a picture's longer side on the page
FRAMES = 12  # of a video, evenly spaced


@dataclass(frozen=True)
class Answer:
    """What the model generated: its text, and the probability of each token given those before
    it."""

    text: str
    tokens: list[str]
    probabilities: list[float]

    def as_dict(self) -> dict[str, Any]:
        """As the page reads it."""
        return {"text": self.text, "tokens": self.tokens, "p": self.probabilities}


def record(
    model: Any,
    sample: Sample,
    hooks: Sequence[Hook] = (),
    scores: Sequence[HeadScores] = (),
    first: Sequence[tuple[int, int]] = (),
    max_new_tokens: int = 8,
    budget: int = BUDGET,
) -> dict[str, Any]:
    """Run a sample, let the model answer, and return what the explorer shows, ready for JSON.

    Args:
        model: a HookedMLLM. sample: with at least one picture; regions are optional.
        hooks: interventions that are active in the run. scores: rankings that the page offers.
        first: heads whose maps are kept before all others.
        max_new_tokens: how long the answer may get.
        budget: bytes of attention maps, before base64.

    Errors: a sample without a picture; scores of another shape than the model's.
    """
    inputs, answer = answered(model, sample, hooks, max_new_tokens)
    token_map = inputs.token_maps[0]
    if not len(token_map.visual):
        raise CorelensError(
            f"{sample.label} without a picture", "a sample with an image, pages or a video",
            "the explorer shows where heads look in a picture: give the sample one",
        )  # fmt: skip
    rows, text = _rows(token_map), token_map.text[-MOST_TEXT:]
    layers = model.hook_names("attn.hook_pattern_rows")
    region = _region(token_map)
    mass = _masses(model, inputs, hooks, layers, rows, token_map.visual, region)
    heads, rows_kept = _within(budget, mass["region" if len(region) else "picture"], rows,
                               len(token_map.visual) + len(text), first)  # fmt: skip
    maps = _maps(model, inputs, hooks, heads, rows[rows_kept], torch.cat([token_map.visual, text]))
    views = _views(inputs, token_map, sample.regions)
    left_out = _left_out(
        heads=(len(heads), int(np.isfinite(mass["picture"][0]).sum())),
        rows=(len(rows_kept), int((token_map.text > token_map.visual.min()).sum())),
        text=(len(text), len(token_map.text)),
        frames=(sum(view["frame"] is not None for view in views), _frames(token_map)),
    )
    return {
        # of a folder its name alone
        "model": Path(str(model.cfg.model_name or model.cfg.family)).name,
        "shape": [model.cfg.n_layers, model.cfg.n_heads],
        "question": sample.question or "", "id": sample.id,
        "answer": answer.as_dict(),
        "tokens": _tokens(model, inputs, token_map, text, rows[rows_kept]),
        "views": views,
        "region": [int(i) for i in torch.isin(token_map.visual, region).nonzero()[:, 0]],
        "mass": {name: _base64(_quantised(values[rows_kept])) for name, values in mass.items()},
        "heads": [list(head) for head in heads], "pinned": [list(head) for head in first],
        "maps": {"peak": _base64(maps[1]), "bytes": _base64(maps[0]),
        "visual": len(token_map.visual)},
        "scores": {score.label: _scored(score, model) for score in scores},
        "left_out": left_out,
    }  # fmt: skip


def answered(
    model: Any, sample: Sample, hooks: Sequence[Hook], max_new_tokens: int
) -> tuple[Inputs, Answer]:
    """Let the model answer under `hooks`, and prepare the sample with that answer behind its
    question."""
    prompt = model.prepare(sample)
    with model.hooks(fwd_hooks=list(hooks)):
        ids = model.generate(prompt, max_new_tokens=max_new_tokens)[0]
    text = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    if not text:
        return prompt, Answer("", [], [])
    inputs = model.prepare(replace(sample, answer=text), answer=True)
    positions = inputs.token_maps[0].answer
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits = model(inputs)[0, positions.to(model.device) - 1].float()
    tokens = inputs.tensors["input_ids"][0, positions.to(model.device)]
    probabilities = logits.softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
    return inputs, Answer(
        text, [model.tokenizer.decode([int(token)]) for token in tokens], probabilities
    )


def _rows(token_map: TokenMap) -> Int[Tensor, " row"]:
    """Text tokens that can see a picture: those behind its first token; the last ones if there are
    many."""
    text = token_map.text
    return text[text > token_map.visual.min()][-MOST_ROWS:]


def _region(token_map: TokenMap) -> Int[Tensor, " region"]:
    known = "region" not in token_map.missing and token_map.covered
    return token_map.region if known else torch.empty(0, dtype=torch.long)


def _masses(
    model: Any,
    inputs: Inputs,
    hooks: Sequence[Hook],
    layers: Sequence[str],
    rows: Tensor,
    visual: Tensor,
    region: Tensor,
) -> dict[str, Float[np.ndarray, "row layer head"]]:
    """Summed attention of every row and head on all visual tokens and on the region's; NaN where
    there is no head."""
    shape = (len(rows), model.cfg.n_layers, model.cfg.n_heads)
    mass = {name: np.full(shape, np.nan, dtype=np.float32) for name in ("region", "picture")}

    def reduce(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        for name, keys in (("region", region), ("picture", visual)):
            summed = pattern[0][..., keys.to(pattern.device)].sum(-1).T.float().cpu().numpy()
            mass[name][:, hook.layer(), : summed.shape[1]] = summed

    _run(model, inputs, [*hooks, *((name, reduce) for name in layers)], rows)
    return mass


def _maps(
    model: Any,
    inputs: Inputs,
    hooks: Sequence[Hook],
    heads: Sequence[tuple[int, int]],
    rows: Tensor,
    keys: Tensor,
) -> tuple[UInt8[np.ndarray, "row head key"], Float[np.ndarray, "row head"]]:
    """Attention of these heads from these rows on these keys, one byte each, and the peak that 255
    stands for."""
    shape = (len(rows), len(heads))
    stored, peaks = np.zeros((*shape, len(keys)), dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    number = {head: i for i, head in enumerate(heads)}

    def keep(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
        for head in range(pattern.shape[1]):
            if (i := number.get((hook.layer(), head))) is not None:
                attention = pattern[0, head][:, keys.to(pattern.device)].float().cpu().numpy()
                peaks[:, i] = attention.max(-1)
                stored[:, i] = np.round(
                    255 * np.sqrt(attention / np.maximum(peaks[:, i, None], 1e-12))
                )

    layers = sorted({layer for layer, _ in heads})
    _run(
        model,
        inputs,
        [*hooks, *((f"blocks.{layer}.attn.hook_pattern_rows", keep) for layer in layers)],
        rows,
    )
    return stored, peaks


def _run(model: Any, inputs: Inputs, hooks: list[Hook], rows: Tensor) -> None:
    with torch.no_grad(), model.pattern_rows(rows.tolist()):
        model.run_with_hooks(inputs, fwd_hooks=hooks, return_type=None)


def _within(
    budget: int,
    mass: Float[np.ndarray, "row layer head"],
    rows: Int[Tensor, " row"],
    keys: int,
    first: Sequence[tuple[int, int]],
) -> tuple[list[tuple[int, int]], Int[np.ndarray, " kept_row"]]:  # fmt: skip
    """The heads of highest mass in any row, and the last rows, whose maps fit into a budget of
    bytes."""
    number_of_rows = int(np.clip(budget // (8 * keys), 1, len(rows)))  # eight heads at the least
    highest = np.nan_to_num(mass.max(0), nan=-1)
    order = np.argsort(-highest, axis=None, kind="stable")
    ranked = [
        (int(i // mass.shape[2]), int(i % mass.shape[2])) for i in order if highest.flat[i] >= 0
    ]
    wanted = list(dict.fromkeys([*((int(layer), int(head)) for layer, head in first), *ranked]))
    heads = wanted[: max(1, budget // (number_of_rows * keys))]
    return sorted(heads), np.arange(len(rows) - number_of_rows, len(rows))


def _left_out(**counts: tuple[int, int]) -> list[str]:
    """A sentence for each thing of which fewer are shown than there are: (shown, all)."""
    sentences = {
        "heads": "Maps are kept for the {} of {} heads whose attention is highest.",
        "rows": "The last {} of {} text tokens behind the picture are rows here.",
        "text": "The last {} of {} text tokens are shown.",
        "frames": "{} of {} frames are shown.",
    }
    return [sentences[name].format(*pair) for name, pair in counts.items() if pair[0] < pair[1]]


def _frames(token_map: TokenMap) -> int:
    """How many frames of videos the model was given."""
    videos = [picture.frames for picture in token_map.pictures or [] if picture.frames is not None]
    return sum(len(frames[frames >= 0].unique()) for frames in videos)  # (−1 pads)


def _tokens(
    model: Any, inputs: Inputs, token_map: TokenMap, text: Tensor, rows: Tensor
) -> list[dict[str, Any]]:
    """Every text token that is shown: its text, the part it belongs to, and which row it is, if it
    is one."""
    ids = inputs.tensors["input_ids"][0].cpu()
    parts = {name: set(positions.tolist()) for name, positions in token_map.parts.items()}
    number = {position: i for i, position in enumerate(rows.tolist())}
    first = int(token_map.last)

    def part_of(position: int) -> str:
        return next((name for name, inside in parts.items() if position in inside), "template")

    return [
        {
            "text": model.tokenizer.decode([int(ids[position])]),
            "part": part_of(position),
            "row": number.get(position, -1),
            "predicts": position >= first and "answer" in parts,
        }
        for position in text.tolist()
    ]


def _views(inputs: Inputs, token_map: TokenMap, regions: Sequence[Shape]) -> list[dict[str, Any]]:
    """Every picture, page or frame as a small image, with the cells of its visual tokens and the
    regions' outlines."""
    # a model whose geometry is not known: attention on text alone is shown
    if token_map.pictures is None:
        return []
    index = {position: i for i, position in enumerate(token_map.visual.tolist())}
    views = []
    for image, number, frame in panels(inputs.pictures[0], token_map, FRAMES):
        picture = token_map.pictures[number]
        shown = tokens_in_frame(picture, frame)
        boxes = [[round(x, 1) for x in box] for box in picture.box[shown].tolist()]
        views.append({
            "label": f"frame {frame}" if frame is not None else f"image {number}", "image": number,
            "frame": frame,
            "size": [image.width, image.height], "src": _source(image),
            "cells": boxes,
            "keys": [index[position] for position in picture.positions[shown].tolist()],
            "outlines": [_outline(region, frame) for region in of_panel(regions, number, frame)],
        })  # fmt: skip
    return views


def _outline(region: Shape, frame: int | None) -> list[float]:
    """The smallest box around a region in its picture: x0, y0, x1, y1."""
    if isinstance(region, (Box, Mask)):
        return list(region.bounds)
    assert frame is not None
    return list(region.boxes[frame].bounds)


def _source(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    kind = "png" if small.getcolors(4096) else "jpeg"  # few colours: drawn, sharp and small as PNG
    small.save(buffer, kind, quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _quantised(values: Float[np.ndarray, "..."]) -> np.ndarray:
    """Masses of 0 to 1 as 16-bit numbers; 65535 stands for a head that does not exist."""
    return np.where(np.isnan(values), 65535, np.round(np.clip(values, 0, 1) * 65534)).astype("<u2")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _scored(score: HeadScores, model: Any) -> list[list[float | None]]:
    if score.values.shape != (model.cfg.n_layers, model.cfg.n_heads):
        raise CorelensError(
            f"scores of {score.values.shape[0]} layers × {score.values.shape[1]} heads",
            f"{model.cfg.n_layers} × {model.cfg.n_heads}, as the model has", "give this model's "
                "own scores",
        )  # fmt: skip
    return [
        [None if np.isnan(value) else round(float(value), 5) for value in layer]
        for layer in score.values
    ]
