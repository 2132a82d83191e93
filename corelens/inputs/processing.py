"""Calling a processor on a batch of prompts and pictures."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.limits import process_apart
from corelens.inputs.media import Medium
from corelens.inputs.prompts import Prompt
from corelens.inputs.question import question_among_tokens
from corelens.inputs.sounds import Sound, check_sounds, spoken
from corelens.layouts import Layout

# [batch, pos]
PER_TOKEN = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"
)  # fmt: skip
CROSS_MASK = "cross_attention_mask"  # of Llama 3.2 Vision: [batch, pos, image, tile]
ASSUMED_FPS = 24.0  # transformers' own assumption
# where a processor's output may depend on a video's rate
RATE_SHOWS = ("input_ids", "second_per_grid_ts")
NOT_FOR_THE_MODEL = (
    "labels",
    "text_replacement_offsets",
    "offset_mapping",
    "video_metadata",
    "num_crops",
)


@dataclass
class SampleTokens:
    """One sample's tokens without padding: prompt, then answer.

    Args:
        ids: the token ids.
        types: further tensors with one value a token, by name.
        prompt: how many of the tokens are the prompt.
        question: the question's positions, or why they are not known; None for a prompt without a
            question.
    """

    ids: list[int]
    types: dict[str, list[Any]] = field(default_factory=dict)
    prompt: int = 0
    question: list[int] | CorelensError | None = None


def run_processor(
    processor: Any,
    layout: Layout,
    prompts: Sequence[Prompt],
    pictures: Sequence[Sequence[Any]],
    images_kwargs: dict[str, Any],
    sounds: Sequence[Sequence[Sound]],
) -> tuple[dict[str, Any], list[SampleTokens]]:
    """The processor's output (its per-token tensors with the processor's own padding), and the
    SampleTokens of each prompt.

    `pictures` are those of the prompts' media, at the sizes that the processor gets; `sounds` are
    those of the prompts.
    """
    for sample_sounds in sounds:
        check_sounds(processor, sample_sounds)
    texts = [prompt.text for prompt in prompts]
    videos = any(isinstance(picture, list) for row in pictures for picture in row)
    if videos and getattr(processor, "video_processor", None) is None:
        raise CorelensError(
            f"a video for {type(processor).__name__}, which takes none",
            "a model whose processor has a video processor",
            "give the frames as images: Sample(images=frames)",
        )
    all_media = [medium for prompt in prompts for medium in prompt.media]
    if any(medium.kind == "video" and medium.fps is None for medium in all_media):
        _warn_of_rate(processor, layout)
    special = not _has_bos(processor, texts[0])
    layout.check_batch(pictures)
    try:
        apart = process_apart(
            processor,
            [prompt.media for prompt in prompts],
            pictures,
            images_kwargs,
            lambda frames, medium: _media(layout, [[frames]], [[medium]]),
        )
    except CorelensError:
        raise
    except Exception as error:  # processors raise what their array code raises
        raise _refused(error, pictures) from error
    shown_pictures = pictures if apart is None else apart.standins
    options: dict[str, Any] = {"images_kwargs": images_kwargs} if images_kwargs else {}
    for kind in () if apart is None else apart.pixels:  # the blanks have their size already
        options[f"{kind}s_kwargs"] = {**options.get(f"{kind}s_kwargs", {}), "do_resize": False}
    options["add_special_tokens"] = special

    def call(rows: Sequence[int], **more: Any) -> dict[str, Any]:
        media = _media(
            layout, [shown_pictures[row] for row in rows], [prompts[row].media for row in rows]
        ) | spoken(processor, [sound.waveform for row in rows for sound in sounds[row]])
        padding = len(rows) > 1
        try:
            of_rows = [texts[row] for row in rows]
            return dict(
                processor(
                    text=of_rows, return_tensors="pt", padding=padding, **media, **options, **more
                )
            )
        except Exception as error:  # processors raise what their array code raises
            raise _refused(error, pictures) from error

    # Some processors stumble over the offsets of a row that has no pictures, so these are asked of
    # the others only.
    all_rows = range(len(texts))
    with_media = [row for row in all_rows if pictures[row] or sounds[row]]
    changes: list[Any] = [[] for _ in texts]
    if len(with_media) == len(texts):
        output = with_offsets = call(all_rows, return_text_replacement_offsets=True)
    else:
        output = call(all_rows)
        with_offsets = call(with_media, return_text_replacement_offsets=True) if with_media else {}
    offsets_of_rows = with_offsets.get("text_replacement_offsets") or [[] for _ in with_media]
    for row, offsets in zip(with_media, offsets_of_rows, strict=True):
        changes[row] = offsets
    if apart is not None:
        apart.put_into(output)
    real = output["attention_mask"].bool()
    made = []
    for number, prompt in enumerate(prompts):
        keep = real[number]
        ids = output["input_ids"][number][keep].tolist()
        types = {
            name: output[name][number][keep].tolist()
            for name in (*PER_TOKEN[2:], CROSS_MASK)
            if name in output
        }
        expanded = _expand(prompt.processed, changes[number])
        question = question_among_tokens(
            processor, expanded, ids, special, prompt.question, changes[number]
        )
        made.append(SampleTokens(ids, types, len(ids), question))
        if prompt.answer is not None:
            _append_answer(processor, layout, made[-1], expanded, prompt.answer, special)
    output["images_kwargs"] = images_kwargs
    return output, made


def pad(
    samples: Sequence[SampleTokens], starts: Sequence[int], length: int, pad_id: int
) -> dict[str, Tensor]:
    """Per-token tensors [batch, length, ...]: a sample's tokens from its start on, padding
    elsewhere."""
    of_first = {"input_ids": samples[0].ids, "attention_mask": samples[0].ids, **samples[0].types}
    tensors = {
        name: torch.tensor(values).new_zeros(len(samples), length, *np.shape(values)[1:])
        for name, values in of_first.items()
    }
    tensors["input_ids"].fill_(pad_id)
    for number, (tokens, start) in enumerate(zip(samples, starts, strict=True)):
        stop = start + len(tokens.ids)
        values = {"input_ids": tokens.ids, "attention_mask": [1] * len(tokens.ids), **tokens.types}
        for name, value in values.items():
            tensors[name][number, start:stop] = torch.tensor(value)
    return tensors


def pad_id(processor: Any) -> int:
    """The id to pad with; its value does not matter, attention leaves it out, but it must be no
    placeholder."""
    tokenizer = processor.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


# --- the call


def _has_bos(processor: Any, text: str) -> bool:
    """Whether the template wrote the BOS token itself: the tokenizer must then not write it once
    more."""
    bos = getattr(processor.tokenizer, "bos_token", None)
    return bos is not None and text.startswith(bos)


def _media(
    layout: Layout, pictures: Sequence[Sequence[Any]], media: Sequence[Sequence[Medium]]
) -> dict[str, Any]:
    """Pictures nested by sample, as chat templates pass them: several of one sample may be treated
    differently."""
    images = [[p for p in row if isinstance(p, Image.Image)] for row in pictures]
    options: dict[str, Any] = {"images": images} if any(images) else {}
    videos: list[list[np.ndarray]] = []
    metadata = []
    for row, of_row in zip(pictures, media, strict=True):
        videos.append([])
        for frames, medium in zip(row, of_row, strict=True):
            if isinstance(frames, Image.Image):
                continue
            again = max(
                layout.min_frames - len(frames), 0
            )  # the last frame once more, for processors that refuse fewer
            frames = [*frames, *[frames[-1]] * again]
            videos[-1].append(np.stack([np.asarray(frame) for frame in frames]))
            metadata.append(_metadata(frames, medium, again))
    if metadata:
        # Frames were chosen by whoever made the sample, and regions name them by index: none may be
        # dropped.
        options |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
    return options


def _metadata(frames: Sequence[Image.Image], medium: Medium, again: int) -> dict[str, Any]:
    """What transformers calls a video's metadata: which frames of which rate these are."""
    rate = medium.fps or ASSUMED_FPS
    indices = list(range(len(frames) - again)) if medium.indices is None else list(medium.indices)
    indices += [indices[-1] + 1 + i for i in range(again)]
    return {
        "total_num_frames": indices[-1] + 1,
        "fps": rate,
        "duration": (indices[-1] + 1) / rate,
        "frames_indices": indices,
        "width": frames[0].width,
        "height": frames[0].height,
    }


def _warn_of_rate(processor: Any, layout: Layout) -> None:
    """Warn if the frame rate that a video lacks would change what this processor makes of it.

    Found by asking it: two black frames at two rates. Some write times into the prompt, some scale
    positions by them.
    """
    frames = [Image.new("RGB", (64, 64))] * max(2, layout.min_frames)
    made = []
    for rate in (1.0, ASSUMED_FPS):
        media = _media(layout, [[frames]], [[Medium("video", frames, rate)]])
        try:
            made.append(
                processor(
                    text=[layout.plain_prompt(processor, 0, 1, "")], return_tensors="pt", **media
                )
            )
        # one that does not take this prompt says nothing of rates; the video itself will be refused
        except Exception:
            return
    slow, fast = made
    shows = [name for name in slow if name in RATE_SHOWS]
    if any(
        not torch.equal(torch.as_tensor(slow[name]), torch.as_tensor(fast[name])) for name in shows
    ):
        warnings.warn(  # without the sample's id, so that Python shows it once
            "a video without its frame rate, which this processor hands to the model: "
            f"{ASSUMED_FPS:g} frames a second are assumed, as in transformers. Say "
            "Sample(video=frames, meta={'fps': 2.0}), or 'fps' in the message.",
            stacklevel=5,
        )


def _size(picture: Any) -> str:
    if isinstance(picture, Image.Image):
        return f"{picture.width} × {picture.height}"
    return f"{len(picture)} frames"


def _refused(error: Exception, pictures: Sequence[Sequence[Any]]) -> CorelensError:
    sizes = [list(map(_size, row)) for row in pictures]
    return CorelensError(
        f"the processor refused the batch: {type(error).__name__}: {error}\n  its pictures: "
        f"{sizes[:8]}",
        "pictures within the processor's limits, as many as the prompt has places for, and samples "
        "that go together",
        "prepare the samples one by one to find the one that fails; resize a picture of extreme "
        "shape",
    )


def _expand(text: str, changes: Sequence[dict[str, Any]]) -> str:
    """The text that was tokenised: each placeholder replaced by what the processor put there."""
    done, end = [], 0
    for change in changes:
        start, stop = change["span"]
        done += [text[end:start], change["replacement"]]
        end = stop
    return "".join([*done, text[end:]])


def _append_answer(
    processor: Any, layout: Layout, tokens: SampleTokens, expanded: str, answer: str, special: bool
) -> None:
    """Append the answer's tokens: as tokenised with the prompt, unless a token would straddle the
    two."""
    tokenizer = processor.tokenizer
    joint = tokenizer(expanded + answer, add_special_tokens=special)["input_ids"]
    ids = joint[tokens.prompt :]
    straddles = joint[: tokens.prompt] != tokens.ids
    if straddles or not ids or (special and ids[-1] == tokenizer.eos_token_id):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    tokens.ids = tokens.ids + ids
    for name, values in tokens.types.items():
        of_answer = layout.answer_type_id if name == "token_type_ids" else 0
        if name == CROSS_MASK:  # an answer sees the pictures that the last row sees
            of_answer = values[-1]
        tokens.types[name] = values + [of_answer] * len(ids)
