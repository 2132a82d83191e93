"""Which seconds of a sound each audio token hears, measured.

As `corelens.model.probing` does for pictures: short strips of a test sound are replaced by other
noise, the changed sounds go through the family's own processor and tower with the tower's attention
off, and the inputs of the decoder's first layer that move are the tokens that hear the strip. A
token hears a short stretch only, so strips that lie far apart are replaced at once: a coarse pass
says about where a token is, a fine one exactly.

A token's place does not depend on the sound's length, so sounds are measured at 2, 4, 8 … seconds,
once each.
"""

import json
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import silent
from corelens.inputs.processing import NOT_FOR_THE_MODEL
from corelens.inputs.sounds import ear_options, frame_step, sampling_rate, spoken
from corelens.layouts import Layout
from corelens.model.probing import first_layer_input
from corelens.model.towers import attention_modules

SHORTEST = 2  # seconds of the shortest test sound
FINE = 4  # strips a token
BATCH = 16  # sounds a call of the processor and the tower
HEARS = 0.05  # of a token's strongest response: what a strip must give to be heard
EVEN = 0.2  # of a step: how far tokens may lie from an even grid to be put on it


class SoundProbing:
    """Seconds by measurement, kept by processor options and length of the test sound.

    Args:
        hf: the Hugging Face model (held weakly: the layout that asks belongs to it).
        layout: where its decoder is and which token stands for sounds.
    """

    def __init__(self, hf: nn.Module, layout: Layout):
        self.hf, self.layout = weakref.ref(hf), layout
        self.known: dict[str, Float[Tensor, "token 2"]] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, processor: Any, n_samples: int) -> Float[Tensor, "token 2"]:
        """Which seconds each placeholder of a sound hears; (0, 0): none, it stands for padding.

        Errors: tokens that never move, or that move wherever the sound is changed.
        """
        hf = self.hf()
        assert hf is not None
        rate, length = sampling_rate(processor), SHORTEST
        while length * rate < n_samples:
            length *= 2
        key = _key(processor, length)
        if key not in self.known:
            self.known[key] = _measure(hf, self.layout, processor, length * rate)
        counted = _key(processor, f"{n_samples} samples")
        if counted not in self.counts:
            silence = np.zeros(n_samples, np.float32)
            _, is_audio = _processed(self.layout, hf, processor, [silence])
            self.counts[counted] = int(is_audio.sum())
        count, measured = self.counts[counted], self.known[key]
        padding = measured.new_zeros(max(count - len(measured), 0), 2)
        return torch.cat([measured, padding])[:count]


def _key(processor: Any, length: Any) -> str:
    return json.dumps([ear_options(processor), length], default=str, sort_keys=True)


def _measure(
    hf: nn.Module, layout: Layout, processor: Any, n_samples: int
) -> Float[Tensor, "token 2"]:
    rate = sampling_rate(processor)
    rng = np.random.default_rng(0)
    sound, other = (rng.normal(0, 0.1, n_samples).astype(np.float32) for _ in range(2))
    decoder = layout.decoder(hf)

    def embedded(sounds: Sequence[np.ndarray]) -> Float[Tensor, "sound token d_model"]:
        tensors, is_audio = _processed(layout, hf, processor, sounds)
        x = first_layer_input(hf, decoder, tensors)
        return torch.stack([row[mask] for row, mask in zip(x, is_audio, strict=True)])

    with silent(attention_modules(hf, layout, "audio")), torch.no_grad():
        base = embedded([sound])[0]
        count = len(base)
        if not count:
            raise _unheard(hf, "its prompt has no audio token")

        def moved(edges: np.ndarray, groups: int) -> Float[Tensor, "group token"]:
            """How far each token moves when every strip of a group is replaced."""
            changes = []
            for group in range(groups):
                changed = sound.copy()
                for start, stop in zip(edges[group:-1:groups], edges[group + 1 :: groups]):  # noqa: B905
                    changed[start:stop] = other[start:stop]
                changes.append(changed)
            parts = [embedded(changes[i : i + BATCH]) for i in range(0, groups, BATCH)]
            return torch.cat([(part - base).float().norm(dim=-1).cpu() for part in parts])

        fine = _edges(n_samples, FINE * count)
        strips = len(fine) - 1
        # as few sounds as can be: a group's strips lie 2.5 strips of the coarse pass apart
        first = int(np.ceil((2.5 * strips) ** 0.5))
        groups = int(np.ceil(2.5 * strips / first))
        if first + groups >= strips:
            response = moved(fine, strips)
        else:
            coarse = _edges(n_samples, first)
            roughly = moved(coarse, first)
            _check_local(hf, roughly)  # (what follows looks near each token only)
            about = _centres(roughly, coarse)
            response = moved(fine, groups)[torch.arange(strips) % groups]
            middle = torch.tensor((fine[:-1] + fine[1:]) / 2)
            far = (middle[:, None] - about).abs() > groups / 2 * n_samples / strips
            response = response.masked_fill(far, 0.0)
    seconds, seen = _seconds(response, fine / rate, frame_step(processor) / rate)
    if not seen.any():
        raise _unheard(hf, "none of its audio tokens moves when the sound changes")
    _check_local(hf, response[:, seen])
    if 8 * len(torch.unique(seconds[seen, 0])) < int(seen.sum()):
        raise _unheard(hf, "most of its audio tokens move with one and the same part")
    return seconds


def _check_local(hf: nn.Module, response: Float[Tensor, "strip token"]) -> None:
    share = (response > 0.3 * response.max(0).values).float().mean(0)
    if response.shape[1] > 1 and float(share.median()) > 0.5:
        raise _unheard(hf, "each of its audio tokens moves wherever the sound changes")


def _edges(n_samples: int, strips: int) -> np.ndarray:
    return np.linspace(0, n_samples, min(strips, n_samples) + 1).round().astype(int)


def _centres(response: Float[Tensor, "strip token"], edges: np.ndarray) -> Float[Tensor, " token"]:
    """Where each token's strips have their middle, each strip weighted by how far it moves the
    token."""
    middle = torch.tensor((edges[:-1] + edges[1:]) / 2, dtype=torch.float64)
    weight = response.double().pow(2)
    return (middle[:, None] * weight).sum(0) / weight.sum(0).clamp(min=1e-30)


def _seconds(
    response: Float[Tensor, "strip token"], edges: np.ndarray, hop: float
) -> tuple[Float[Tensor, "token 2"], Bool[Tensor, " token"]]:
    """Each token's stretch, and whether it hears any.

    A token hears more than its step: convolutions and frames overlap. Its stretch goes to the
    middle between its own middle and its neighbours'; middles that lie on an even grid are put on
    it. Where several tokens hear the same stretch (a window's queries), it is that stretch.
    """
    peak = response.max(0).values
    seen = peak > 1e-4 * peak.max().clamp(min=1e-12)
    on = response > HEARS * peak
    first, last = on.int().argmax(0), len(on) - on.flip(0).int().argmax(0)
    boundaries = torch.tensor(edges, dtype=torch.float64)
    measured = torch.stack([boundaries[first], boundaries[last]], dim=1)
    result = torch.zeros(len(seen), 2, dtype=torch.float64)
    result[seen] = measured[seen]
    centre = measured[seen].mean(1)
    if len(centre) < 4 or float(centre.diff().min()) < 0.25 * float(centre.diff().median()):
        return result, seen
    index = torch.arange(len(centre), dtype=torch.float64)
    x, y = index[1:-1], centre[1:-1]  # what the first and the last hear is cut by the border
    step = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    whole = (step / hop).round() * hop
    step = whole if whole > 0 and abs(float(step - whole)) < 0.02 * float(step) else step
    start = (y - step * x).mean()
    if float((y - start - step * x).abs().max()) < EVEN * float(step):
        between = start + step * (index[:-1] + 0.5)
    else:
        between = (centre[1:] + centre[:-1]) / 2
    end = between[-1:] + between[-1:].new_tensor(float(centre.diff().median()))
    cells = torch.cat([torch.zeros(1, dtype=torch.float64), between, end])
    result[seen] = torch.stack([cells[:-1], cells[1:]], dim=1)
    return result, seen


def _processed(
    layout: Layout, hf: nn.Module, processor: Any, sounds: Sequence[np.ndarray]
) -> tuple[dict[str, Any], Bool[Tensor, "sound pos"]]:
    """A batch of prompts with one sound each, and which of their tokens stand for it."""
    features = processor(
        text=[_prompt(processor)] * len(sounds), return_tensors="pt", padding=len(sounds) > 1,
        **spoken(processor, sounds),
    )  # fmt: skip
    config: Any = hf.config
    is_audio = features["input_ids"].cpu() == layout.audio_placeholder(config)
    return {name: x for name, x in features.items() if name not in NOT_FOR_THE_MODEL}, is_audio


def _prompt(processor: Any) -> str:
    content = [{"type": "audio"}, {"type": "text", "text": "What is it?"}]
    template = getattr(processor, "chat_template", None) or getattr(
        getattr(processor, "tokenizer", None), "chat_template", None
    )
    if template:
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            chat_template=template,
        )
    return getattr(processor, "audio_token", "") + "What is it?"


def _unheard(hf: nn.Module, reason: str) -> CorelensError:
    name = getattr(hf.config, "model_type", type(hf).__name__)
    return CorelensError(
        f"a model of type {name!r} whose audio tokens could not be placed in the sound: {reason}",
        "audio tokens that each hear their own part of the sound (only spans and times need it)",
        "without it hooks take rows and columns by position, and 'audio' for all audio tokens",
    )
