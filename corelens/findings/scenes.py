"""A few samples with where some heads look in them: pictures of attention, ready to show."""

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from corelens.findings.options import CONTROLLED, RANKINGS
from corelens.findings.setting import Setting
from corelens.heads.head_set import Head

FRAMES = 6  # of a video
WIDEST = 320  # pixels: pictures are kept no larger


def scenes(setting: Setting) -> list[dict[str, Any]]:
    """The first test samples, not chosen: each with its picture, the top head of two rankings and an ordinary head.

    Returns:
        [{"question", "answer", "given", "lines": [[(picture as base64, words), …], …]}]: one line for an image, one a
        head for a video.
    """
    shown: list[tuple[str, Head, str]] = []
    for name in CONTROLLED:
        scores = setting.scores[RANKINGS[name]]
        shown.append((f"top by {name}", next(iter(scores.top(k=1))), str(scores.meta["rows"])))
    last = setting.scores[RANKINGS[CONTROLLED[-1]]]
    shown.append(("ordinary head", list(last.top(1.0))[last.values.size // 2], str(last.meta["rows"])))
    samples = setting.to_test[: setting.options.scenes]
    given: list[str | None] = [None] * len(samples)
    if all(sample.answer is not None for sample in samples):
        given = [answer.given for answer in setting.clean.per_sample[: len(samples)]]
    setting.advance("looking at scenes")
    return [
        {"question": sample.question or "", "answer": sample.answer, "given": said}
        | {"lines": _lines(setting.model, sample, shown)}
        for sample, said in zip(samples, given, strict=True)
    ]


def _lines(model: Any, sample: Any, shown: list[tuple[str, Head, str]]) -> list[list[tuple[str, str]]]:
    from corelens.viz.overlay import attention_image, attention_map, chosen_row

    inputs = model.prepare(sample)
    token_map, pictures = inputs.token_maps[0], inputs.pictures[0]
    index = next((getattr(region, "image", 0) or 0 for region in sample.regions), 0)
    picture = pictures[min(index, len(pictures) - 1)]
    frames: list[tuple[Image.Image, int | None]] = [(picture, None)]
    if not isinstance(picture, Image.Image):  # the frames of a video
        every = list(picture)
        at = np.unique(np.linspace(0, len(every) - 1, min(FRAMES, len(every))).round().astype(int))
        frames = [(_image(every[i]), int(i)) for i in at]
    looks = []
    for label, head, rows in shown:
        name = f"blocks.{head.layer}.attn.hook_pattern_rows"
        with torch.no_grad(), model.pattern_rows(rows):
            _, cache = model.run_with_cache(inputs, names_filter=name, return_type=None)
        weights, seen = chosen_row(cache[name][0, head.head].float().cpu(), token_map)
        heats = [attention_map(token_map, weights, image.size, index, frame) for image, frame in frames]
        looks.append((f"{label}, **{head}**: {seen}", heats))
    # one scale, or an ordinary head would look as eager
    peak = max(float(heat.max()) for _, heats in looks for heat in heats) or 1.0
    regions = [region for region in sample.regions if (getattr(region, "image", 0) or 0) == index]
    plain = [_kept(attention_image(image, None, regions, frame)) for image, frame in frames]
    lit = [
        [
            _kept(attention_image(image, heat, regions, frame, peak))
            for (image, frame), heat in zip(frames, heats, strict=True)
        ]
        for _, heats in looks
    ]
    if len(frames) == 1:
        return [
            [(plain[0], "picture and region"), *((of[0], words) for of, (words, _) in zip(lit, looks, strict=True))]
        ]
    lines = [[(one, f"frame {frame}") for one, (_, frame) in zip(plain, frames, strict=True)]]
    for of, (words, _) in zip(lit, looks, strict=True):
        lines.append([(one, words if i == 0 else "") for i, one in enumerate(of)])
    return lines


def _image(frame: Any) -> Image.Image:
    return frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))


def _kept(image: Image.Image) -> str:
    """As JPEG in base64, no larger than is shown."""
    image = image.convert("RGB")
    image.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
