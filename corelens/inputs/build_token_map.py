"""Builds a sample's TokenMap: its placeholder tokens are matched with the cells of its pictures, as
the family's layout gives them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.processing import SampleTokens
from corelens.inputs.sounds import Sound
from corelens.layouts import Cells, Layout
from corelens.tokens.cells import Picture, covered_tokens
from corelens.tokens.regions import Span
from corelens.tokens.sounds import SoundTokens, positions_of, tokens_of_sound
from corelens.tokens.token_map import TokenMap


def cells_of(
    processor: Any,
    layout: Layout,
    config: Any,
    features: dict[str, Any],
    loaded: Sequence[Sequence[Any]],
    seen: Sequence[Sequence[Any]],
) -> list[list[Cells] | CorelensError]:
    """For each sample the cells of its pictures in the order of the prompt, or the error if the
    family's geometry is unknown.

    Args:
        features: what the processor returned for the whole batch.
        loaded: the original pictures; cells are in their pixels.
        seen: these pictures at the sizes that the processor got.
    """
    image = video = 0  # how many came before, in the whole batch
    result: list[list[Cells] | CorelensError] = []
    for originals, pictures in zip(loaded, seen, strict=True):
        cells: list[Cells] = []
        failure: CorelensError | None = None
        for original, picture in zip(originals, pictures, strict=True):
            try:
                if isinstance(picture, Image.Image):
                    cell = layout.image_cells(processor, config, features, image, picture.size)
                else:
                    cell = layout.video_cells(
                        processor, config, features, video, picture[0].size, len(picture)
                    )
                cells.append(_in_original(cell, _size(original), _size(picture)))
            except CorelensError as error:
                failure = failure or error
            # After an error too: the next picture has the next number.
            if isinstance(picture, Image.Image):
                image += 1
            else:
                video += 1
        result.append(failure or cells)
    return result


def _in_original(cell: Cells, original: tuple[int, int], seen: tuple[int, int]) -> Cells:
    """Cells in pixels of the original picture, which was resized before the processor saw it."""
    if original == seen:
        return cell
    scale = torch.tensor([original[0] / seen[0], original[1] / seen[1]] * 2, dtype=cell.box.dtype)
    return replace(cell, box=cell.box * scale, shrunk=None)


def _size(picture: Any) -> tuple[int, int]:
    return (picture if isinstance(picture, Image.Image) else picture[0]).size


def build_token_map(
    layout: Layout,
    config: Any,
    sample: Any,
    tokens: SampleTokens,
    pictures: list[Any],
    cells: list[Cells] | CorelensError,
    region_weights: Literal["touch", "fraction"],
    audio: "AudioTokens",
) -> TokenMap:
    """The positions of one sample's pictures, sounds, regions, question and answer among its
    unpadded tokens."""
    ids = torch.tensor(tokens.ids)
    placeholder = torch.isin(ids, torch.tensor(layout.placeholders(config))).nonzero()[:, 0]
    if pictures and not len(placeholder) and max(layout.placeholders(config)) >= 0:
        raise CorelensError(
            f"{sample.label} with {len(pictures)} pictures, and no image token in its prompt",
            "a chat template that writes a placeholder for each picture",
            "look at processor.apply_chat_template(…, tokenize=False)",
        )
    if len(placeholder) and placeholder[-1] >= tokens.prompt:
        raise CorelensError(
            f"{sample.label}: image tokens in the answer {sample.answer!r}",
            "words",
            "take them out of the answer",
        )
    visual, located, covered = placeholder, None, []
    missing: dict[str, CorelensError] = {}
    if isinstance(cells, CorelensError):
        missing = {"images": cells, "region": cells}
    else:
        located = _fill_placeholders(layout, config, ids, pictures, cells, sample)
        if located:  # without placeholders that are no patch
            visual = torch.cat([picture.positions for picture in located]).sort().values
        located.sort(key=lambda picture: picture.frames is not None)
        if isinstance(audio.sounds, CorelensError):
            missing |= {"sounds": audio.sounds}
        if "sounds" in missing and any(isinstance(region, Span) for region in sample.regions):
            missing["region"] = missing["sounds"]
        else:
            sounds = [] if isinstance(audio.sounds, CorelensError) else audio.sounds
            covered = covered_tokens(located, sample.regions, region_weights, sample.label, sounds)
        _warn_shrunk(pictures, cells)
    parts = {}
    if isinstance(tokens.question, CorelensError):
        missing["question"] = tokens.question
    elif tokens.question is not None:
        parts["question"] = torch.tensor(tokens.question, dtype=torch.long)
    if len(tokens.ids) > tokens.prompt:
        parts["answer"] = torch.arange(tokens.prompt, len(tokens.ids))
    return TokenMap(
        real=torch.ones(len(ids), dtype=torch.bool),
        placeholder=placeholder,
        visual=visual,
        last=torch.tensor([tokens.prompt - 1]),
        pictures=located,
        parts=parts,
        covered=covered,
        missing=missing,
        id=sample.id,
        audio=audio.positions,
        sounds=None if isinstance(audio.sounds, CorelensError) else audio.sounds,
    )


@dataclass(frozen=True)
class AudioTokens:
    """The positions of all audio tokens of one sample, and each sound's tokens with their seconds,
    or the error if these are not known."""

    positions: Tensor
    sounds: list[SoundTokens] | CorelensError


def audio_tokens_of(
    processor: Any,
    layout: Layout,
    config: Any,
    sounds: Sequence[Sound],
    tokens: SampleTokens,
    label: str,
) -> AudioTokens:
    """The audio tokens of one sample, among its unpadded tokens.

    Errors: no audio token for them, or another number of them than these sounds have.
    """
    audio = (torch.tensor(tokens.ids) == layout.audio_placeholder(config)).nonzero()[:, 0]
    if not sounds:
        return AudioTokens(audio[:0], [])
    if not len(audio):
        raise CorelensError(
            f"{label} with {len(sounds)} sounds, and no audio token in its prompt",
            "a chat template that writes a placeholder for each sound",
            "look at processor.apply_chat_template(…, tokenize=False)",
        )
    try:
        seconds = [layout.sound_seconds(processor, config, len(s.waveform)) for s in sounds]
    except CorelensError as error:
        return AudioTokens(audio, error)
    lengths = [len(part) for part in seconds]
    if sum(lengths) != len(audio):
        raise CorelensError(
            f"{label}: {len(audio)} audio tokens in the prompt, {lengths} expected of its sounds",
            "as many as a sound of this length has by itself",
            "prepare sounds one a sample; if that does not help, please report it",
        )
    located = [
        tokens_of_sound(positions, part, sound.seconds)
        for positions, part, sound in zip(audio.split(lengths), seconds, sounds, strict=True)
    ]
    return AudioTokens(positions_of(located), located)


def _fill_placeholders(
    layout: Layout, config: Any, ids: Tensor, pictures: list[Any], cells: list[Cells], sample: Any
) -> list[Picture]:
    """The placeholders of each picture, in the order of the prompt. (A family may use one token id
    for images and videos.)"""
    image_id, video_id = layout.placeholders(config)
    free = {token: (ids == token).nonzero()[:, 0].tolist() for token in (image_id, video_id)}
    total, located = sum(map(len, free.values())), []
    for picture, cell in zip(pictures, cells, strict=True):
        queue = free[image_id if isinstance(picture, Image.Image) else video_id]
        positions = torch.tensor(queue[: len(cell.visual)], dtype=torch.long)
        del queue[: len(cell.visual)]
        if len(positions) == len(cell.visual):
            frames = cell.frames[cell.visual] if cell.frames is not None else None
            views = cell.views[cell.visual] if cell.views is not None else None
            located.append(Picture(positions[cell.visual], cell.box[cell.visual], frames, views))
    left = sum(len(queue) for queue in free.values())
    if left or len(located) < len(pictures):
        raise CorelensError(
            f"{sample.label}: {total} image tokens in the prompt, "
            f"{[len(cell.visual) for cell in cells]} expected by {type(layout).__name__}",
            "a processor whose geometry the layout describes",
            "use the model's own processor; if it is, the layout is wrong for its options: please "
            "report it",
        )
    return located


def _warn_shrunk(pictures: list[Any], cells: list[Cells]) -> None:
    for picture, cell in zip(pictures, cells, strict=True):
        if cell.shrunk is not None:
            width, height = _size(picture)
            warnings.warn(  # without the sample's id, so that Python shows it once a size
                f"a picture of {width} × {height} pixels is beyond the processor's limit and was "
                f"shrunk to {cell.shrunk[0]} × {cell.shrunk[1]}; small evidence may be lost. Crop "
                "the picture, or raise the limit where the processor has one "
                "(processor.image_processor.size).",
                stacklevel=5,
            )
