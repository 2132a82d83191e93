"""What goes in: a Sample is one question about pictures; Inputs is the batch a model runs on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.build_token_map import audio_tokens_of, build_token_map, cells_of
from corelens.inputs.media import Medium
from corelens.inputs.pictures import read_picture, read_video
from corelens.inputs.processing import NOT_FOR_THE_MODEL, pad, pad_id, run_processor
from corelens.inputs.prompts import Prompt, render
from corelens.inputs.reserved_words import reserved
from corelens.inputs.sample import Sample
from corelens.inputs.sounds import Sound, read_sound
from corelens.layouts import Layout
from corelens.tokens.regions import Box, Span, Tube
from corelens.tokens.token_map import TokenMap


@dataclass(eq=False)
class Inputs:
    """One batch. `tensors` is what the Hugging Face model is called with: `hf(**inputs.tensors)`.

    Args:
        tensors: input_ids [batch, pos], attention_mask [batch, pos], pixel tensors as the processor
            gave them, …
        token_maps: one a row; their positions are on the CPU whatever device the tensors are on.
        samples: one a row; empty for tensors made by hand.
        pictures: per row the pictures as PIL images, images first, then the frames of each video as
            a list.
    """

    tensors: dict[str, Any]
    token_maps: list[TokenMap]
    samples: list[Sample] = field(default_factory=list)
    pictures: list[list[Any]] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.token_maps)

    @property
    def length(self) -> int:
        """The length of the padded rows."""
        return self.token_maps[0].length

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> "Inputs":
        """A new batch on another device; with `dtype`, its floating-point tensors in that type."""
        moved = {name: _to(value, device, dtype) for name, value in self.tensors.items()}
        return replace(self, tensors=moved)

    def show(self, row: int = 0) -> Any:
        """A matplotlib figure: each picture with its patch grid, the regions outlined, tokens
        numbered."""
        from corelens.viz.patches import show_patches

        if not self.pictures:
            raise CorelensError(
                "inputs made of tensors",
                "inputs made by prepare(sample)",
                "prepare a Sample to see it",
            )
        if not self.pictures[row]:
            raise CorelensError(
                f"row {row}, which has no picture",
                "a sample with pictures",
                "token_maps[row].time(position) says which seconds an audio token hears",
            )
        regions = [r for r in self.samples[row].regions if not isinstance(r, Span)]
        return show_patches(self.token_maps[row], self.pictures[row], regions)

    plot = show

    def __repr__(self) -> str:
        visual = ", ".join(str(len(token_map.visual)) for token_map in self.token_maps[:4])
        more = ", …" if len(self) > 4 else ""
        rows = f"{len(self)} row{'' if len(self) == 1 else 's'} of {self.length} tokens"
        return f"Inputs({rows}, visual: {visual}{more}; {', '.join(self.tensors)})"

    def _repr_html_(self) -> str:
        from corelens.viz.view import image_html

        seen = bool(self.pictures and self.pictures[0])
        shown = image_html(self.show(), "patches and positions") if seen else ""
        return f"{shown}<p>{escape(repr(self))}</p>"


def prepare(
    samples: Sample | Iterable[Sample],
    processor: Any,
    layout: Layout,
    config: Any,
    *,
    answer: bool = False,
    padding_side: Literal["left", "right"] = "left",
    region_weights: Literal["touch", "fraction"] = "touch",
    images_kwargs: Mapping[str, Any] | None = None,
) -> Inputs:
    """Make one batch of one or several samples.

    Args:
        processor: the model's own processor.
        layout: the family's layout; `layout_for(config)`.
        config: the Hugging Face model's config.
        answer: append each sample's gold answer after the generation prompt (no end-of-turn token
            after it).
        padding_side: where shorter rows are padded.
        region_weights: "touch": each token of a region counts 1; "fraction": the covered part of
            its cell.
        images_kwargs: options for the image processor, for instance {"do_pan_and_scan": True}.

    Errors: no processor; pictures that cannot be read; regions outside their picture or covering no
    token; pictures that the processor refuses; samples that do not go together in one batch; text
    that holds a placeholder or special token; a chat that says of a picture what cannot be used.
    """
    samples = [samples] if isinstance(samples, Sample) else list(samples)
    if processor is None:
        raise CorelensError(
            "a model without a processor",
            "HookedMLLM(hf_model, processor), to turn samples into tensors",
            "pass the processor, or make the tensors yourself and call model.inputs(**tensors)",
        )
    if not samples or not all(isinstance(sample, Sample) for sample in samples):
        raise CorelensError(
            f"{[type(sample).__name__ for sample in samples[:3]]} to prepare",
            "one Sample or several",
            "make a cl.Sample",
        )
    words = reserved(processor)
    prompts = [render(sample, processor, layout, words, answer) for sample in samples]
    loaded = [_load(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
    sounds = [
        [
            read_sound(sound, f"{sample.label}, audio {number}")
            for number, sound in enumerate(prompt.sounds)
        ]
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    for sample, pictures, sample_sounds in zip(samples, loaded, sounds, strict=True):
        _check_regions(sample, pictures, sample_sounds)
    resized = [_resized(prompt, pictures) for prompt, pictures in zip(prompts, loaded, strict=True)]
    features, tokens_of = run_processor(
        processor, layout, prompts, resized, dict(images_kwargs or {}), sounds
    )
    cells_of_samples = cells_of(processor, layout, config, features, loaded, resized)
    maps = []
    for sample, tokens, pictures, cells, sample_sounds in zip(
        samples, tokens_of, loaded, cells_of_samples, sounds, strict=True
    ):
        audio = audio_tokens_of(processor, layout, config, sample_sounds, tokens, sample.label)
        maps.append(
            build_token_map(layout, config, sample, tokens, pictures, cells, region_weights, audio)
        )
    length = max(len(tokens.ids) for tokens in tokens_of)
    starts = [length - len(tokens.ids) if padding_side == "left" else 0 for tokens in tokens_of]
    tensors = {
        name: value
        for name, value in features.items()
        if name not in (*NOT_FOR_THE_MODEL, "images_kwargs")
    }
    tensors |= pad(tokens_of, starts, length, pad_id(processor))
    maps = [tm.moved(start, length) for tm, start in zip(maps, starts, strict=True)]
    return Inputs(tensors, maps, samples, [_images_first(pictures) for pictures in loaded])


# --- inside


def _load(sample: Sample, prompt: Prompt) -> list[Any]:
    """The sample's pictures in the order of the prompt: an image, or a list of frames for a
    video."""
    count = {"image": -1, "video": -1}
    pictures: list[Any] = []
    for medium in prompt.media:
        count[medium.kind] += 1
        where = f"{sample.label}, {medium.kind} {count[medium.kind]}"
        pictures.append(_picture(medium, where))
    return pictures


def _picture(medium: Medium, where: str) -> Any:
    if medium.kind == "image":
        return read_picture(medium.picture, where)
    frames = read_video(medium.picture, where)
    if medium.indices is not None and len(medium.indices) != len(frames):
        raise CorelensError(
            f"{where}: {len(medium.indices)} frames_indices for {len(frames)} frames",
            "one a frame",
            "count the frames",
        )
    return frames


def _resized(prompt: Prompt, pictures: list[Any]) -> list[Any]:
    """The pictures at the sizes that the processor gets."""
    return [medium.seen(picture) for medium, picture in zip(prompt.media, pictures, strict=True)]


def _images_first(pictures: list[Any]) -> list[Any]:
    return sorted(pictures, key=lambda picture: isinstance(picture, list))


def _check_regions(sample: Sample, pictures: list[Any], sounds: list[Sound]) -> None:
    """Raise for a region that names a picture the sample lacks, or reaches outside its picture."""
    images = [picture for picture in pictures if isinstance(picture, Image.Image)]
    videos = [picture for picture in pictures if isinstance(picture, list)]
    for region in sample.regions:
        if isinstance(region, Span):
            _check_span(sample, region, sounds)
            continue
        kind: str = "video" if isinstance(region, Tube) else "image"
        among: list[Any] = videos if kind == "video" else images
        if not 0 <= region.image < len(among):
            raise CorelensError(
                f"{sample.label}: a {type(region).__name__} on {kind} {region.image}; "
                f"the sample has {len(images)} images and {len(videos)} videos",
                f"a region on one of its pictures: Tube for videos, {Box.__name__} or Mask for "
                "images",
                f"count {kind}s from 0"
                if among
                else f"give the sample its {kind}, or use the other kind of region",
            )
        picture = among[region.image]
        try:
            region.check(*(picture if isinstance(picture, Image.Image) else picture[0]).size)
        except CorelensError as error:
            raise CorelensError(
                f"{sample.label}: {error.given}", error.expected, error.do
            ) from None
        if isinstance(region, Tube) and not all(
            0 <= frame < len(picture) for frame in region.boxes
        ):
            raise CorelensError(
                f"{sample.label}: a Tube on frames {sorted(region.boxes)} of a video of "
                f"{len(picture)} frames",
                f"frames 0 to {len(picture) - 1}",
                "frames are counted in the sample's video list, not in the file it came from",
            )


def _check_span(sample: Sample, span: Span, sounds: list[Sound]) -> None:
    if not 0 <= span.audio < len(sounds):
        raise CorelensError(
            f"{sample.label}: a Span in sound {span.audio}; the sample has {len(sounds)} sounds",
            "a span in one of its sounds",
            "count sounds from 0"
            if sounds
            else "give the sample its sound: Sample(audio=[(waveform, rate)])",
        )
    try:
        span.check(sounds[span.audio].seconds)
    except CorelensError as error:
        raise CorelensError(f"{sample.label}: {error.given}", error.expected, error.do) from None


def _to(value: Any, device: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: _to(item, device, dtype) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(item, device, dtype) for item in value)
    return value
