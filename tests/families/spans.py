"""Whether spans of a sound name the tokens that hear them: a row's cell in the table of token maps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import corelens as cl
from corelens.errors import CorelensError
from corelens.hf import silent
from corelens.model.probing import first_layer_input
from corelens.model.towers import attention_modules
from families.checks import raised, reason
from helpers import family_audio
from helpers.family_parts import randomise

RATE, SECONDS = 16000, 1.9
SPANS = (cl.Span(0.3, 0.6), cl.Span(0.8, 1.2), cl.Span(1.4, 1.7))
THINKERS = {"qwen2_5_omni_thinker": "qwen2_5_omni", "qwen3_omni_moe_thinker": "qwen3_omni_moe"}
ENDS = 1  # token before and behind a span's that may move, too: they hear a little of it
MOVES = 0.2  # of what the token that moves most does


def spans_of(model_type: str) -> str:
    """ "right", or what is wrong, or why a type takes no spans; "" for a type that is not built with
    its feature extractor."""
    build = family_audio.BUILDERS.get(THINKERS.get(model_type, model_type))
    if build is None or model_type in THINKERS.values():
        return ""
    try:
        hf, processor = build()
        model = cl.HookedMLLM(randomise(hf), processor, check=False)
        results = [_right(model, span) for span in SPANS]
    except CorelensError as error:
        return f"none: {reason(error)}"
    except Exception as error:
        return f"none: {raised(error)}"
    right, shifted = zip(*results, strict=True)
    return f"{sum(right)} of {len(right)} spans, {sum(shifted)} shifted"


def _right(model: Any, span: cl.Span) -> tuple[bool, bool]:
    """Whether the tokens that move when a span's sound is changed are the span's, but for some
    at each end, and half of those that hear little of it; and whether the span's, moved by as many as
    they are, would be."""
    sound, other = (
        np.random.default_rng(seed).normal(0, 0.1, int(SECONDS * RATE)) for seed in (0, 9)
    )
    changed, part = sound.copy(), slice(int(span.start * RATE), int(span.end * RATE))
    changed[part] = other[part]
    sample = cl.Sample(audio=[(sound, RATE)], question="What is said?", regions=[span])
    token_map = model.prepare(sample).token_maps[0]
    before, after = (_heard(model, waveform, token_map.audio) for waveform in (sound, changed))
    moves = (after - before).norm(dim=-1)
    moved = set(token_map.audio[moves > MOVES * moves.max()].tolist())
    region = token_map.region.tolist()
    first, last = region[0], region[-1]

    def fits(by: int) -> bool:
        inside = {p for p in moved if first + by - ENDS <= p <= last + by + ENDS}
        return moved == inside and 2 * len(moved) >= len(region)

    steps = (len(region), -len(region))
    return fits(0), any(fits(by) for by in steps)


def _heard(model: Any, waveform: np.ndarray, positions: Tensor) -> Tensor:
    inputs = model.prepare(cl.Sample(audio=[(waveform, RATE)], question="What is said?"))
    with silent(attention_modules(model.hf, model.layout, "audio")), torch.no_grad():
        return first_layer_input(model.hf, model.layout.decoder(model.hf), inputs.tensors)[0][
            positions
        ]
