"""Counterfactual twins: the same question about a changed picture, with the same token grid.

swap      two regions change their content
replace   a region gets the content of another picture's region
blur      a region is blurred until it cannot be read
noise     a region becomes uniform noise
mask      a region becomes the picture's mean colour
text      another question of as many tokens

The picture's size never changes, so every token of the twin covers what it covered before.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from corelens.errors import CorelensError
from corelens.inputs.pictures import read_picture, read_video
from corelens.inputs.prepare import Sample
from corelens.interventions.pairs import check_pair
from corelens.model.hooked import HookedMLLM
from corelens.tokens.regions import Box, Mask, Region, Shape, Span, Tube

KINDS = ("swap", "replace", "blur", "noise", "mask", "text")
Area = tuple[int, int, int, int]  # x0, y0, x1, y1 in whole pixels
Paint = Callable[[Image.Image, Area], Image.Image]  # the new content of an area of a picture


def counterfactual(
    sample: Sample,
    kind: str,
    *,
    other: Any = None,
    region: int | Region = 0,
    answer: str | None = None,
    seed: int = 0,
    model: HookedMLLM | None = None,
) -> Sample:
    """A copy of a sample with one change: in its picture, or in its question.

    Args:
        sample: a sample with a region (not needed for "text").
        kind: one of KINDS, see the top of this file.
        other: for "swap" the other region: a region, or the number of one of the sample's; for
            "replace" another Sample (its first region is taken), or a picture (all of it); for
            "text" the other question.
        region: which region is changed: the number of one of the sample's, or any region.
        answer: the twin's answer; by default that of `other` where it is a Sample, else None: the
            question has no known answer any more ("text" and unread changes included).
        seed: of the noise.
        model: a HookedMLLM: check with it that the twin has the same token grid.

    Returns:
        A new sample, whose id says what was done; its pictures are PIL images.

    Errors: no region; an `other` that is missing or not needed; for `model`, twins of other lengths
    or grids.
    """
    if kind not in KINDS:
        raise CorelensError(
            f"the counterfactual {kind!r}", f"one of {', '.join(KINDS)}", "choose one"
        )
    if (kind in ("swap", "replace", "text")) != (other is not None):
        raise CorelensError(
            f"counterfactual(…, {kind!r}) {'without' if other is None else 'with'} other=",
            "a region to swap with, a sample or picture to replace by, another question; nothing "
            "for blur, noise, mask",
            "add or drop other=",
        )
    if kind != "text" and sample.audio and (isinstance(region, Span) or not sample.images):
        raise CorelensError(
            f"{sample.label}: the counterfactual {kind!r} of a sound",
            "a picture or a video",
            "make the twin's sound yourself, as long as the first: replace(sample, audio=[…])",
        )
    if kind == "text" and sample.messages is not None:
        raise CorelensError(
            f"{sample.label} with messages",
            "a sample with a question",
            "write the twin's messages by hand",
        )
    if kind == "text":
        twin = replace(sample, question=_question(other), answer=answer, id=f"{sample.id}:text")
    else:
        twin = _painted(sample, kind, other, _region(sample, region), seed)
        known = (
            answer if answer is not None else other.answer if isinstance(other, Sample) else None
        )
        twin = replace(twin, answer=known, id=f"{sample.id}:{kind}")
    if model is not None:
        check_pair(model.prepare(sample), model.prepare(twin))
    return twin


def counterfactual_pairs(
    samples: Sequence[Sample],
    kind_or_twins: str | Sequence[Sample],
    *,
    model: HookedMLLM | None = None,
    **options: Any,
) -> list[tuple[Sample, Sample]]:
    """Pairs (clean sample, corrupted twin) whose tokens stand at the same positions.

    Args:
        samples: the clean ones.
        kind_or_twins: a kind of counterfactual, made of each; or the corrupted ones themselves, in
            the same order.
        model: a HookedMLLM: then lengths and token grids are compared too, not only the pictures'
            sizes.
        options: handed to `counterfactual`; one that is a list with an entry a sample is handed out
            in turn.

    Errors: pictures of other sizes or numbers; with `model`, twins of other lengths or grids, and
    where they part.
    """
    if isinstance(kind_or_twins, str):
        twins = []
        for number, sample in enumerate(samples):
            own = {
                k: v[number] if isinstance(v, list) and len(v) == len(samples) else v
                for k, v in options.items()
            }
            twins.append(counterfactual(sample, kind_or_twins, **own))
    else:
        twins = list(kind_or_twins)
    if len(twins) != len(samples):
        raise CorelensError(
            f"{len(samples)} samples and {len(twins)} twins", "one twin a sample", "match them"
        )
    for sample, twin in zip(samples, twins, strict=True):
        sizes, twin_sizes = _sizes(sample), _sizes(twin)
        if sizes != twin_sizes:
            raise CorelensError(
                f"{sample.label} with pictures of {sizes} and its twin, {twin.label}, with "
                f"{twin_sizes}",
                "pictures of the same sizes, in the same order: else their token grids differ",
                "resize, crop or pad the twin's pictures first",
            )
        if model is not None:
            check_pair(model.prepare(sample), model.prepare(twin))
    return list(zip(samples, twins, strict=True))


# --- inside


def _question(other: Any) -> str:
    question = other.question if isinstance(other, Sample) else other
    if not isinstance(question, str) or not question:
        raise CorelensError(f"the question {question!r}", "another question as text", "other='…'")
    return question


def _region(sample: Sample, region: Any) -> Shape:
    if isinstance(region, Box | Mask | Tube):
        return region
    if not isinstance(region, int):
        raise CorelensError(
            f"a {type(region).__name__} as a region",
            "a Box, Mask or Tube, or the number of a region of the sample",
            "for instance other=Box(x0, y0, x1, y1)",
        )
    if not 0 <= region < len(sample.regions):
        raise CorelensError(
            f"region {region} of {sample.label}, which has {len(sample.regions)}",
            "a region of the sample, or a Box, Mask or Tube",
            "counterfactual(…, region=Box(x0, y0, x1, y1))",
        )
    return sample.regions[region]


def _sizes(sample: Sample) -> list[tuple[int, ...]]:
    """(width, height) of each image, and (frames, width, height) of a video."""
    images: list[tuple[int, ...]] = [
        read_picture(image, f"{sample.label}").size for image in sample.images
    ]
    if sample.video is None:
        return images
    frames = read_video(sample.video, f"{sample.label}")
    return [*images, (len(frames), *frames[0].size)]


def _painted(sample: Sample, kind: str, other: Any, region: Shape, seed: int) -> Sample:
    generator = np.random.default_rng(seed)
    if kind == "swap":
        return _swapped(sample, region, _region(sample, other))
    if kind == "replace":
        paint = _stretched(_content(other))
    elif kind == "blur":

        def paint(picture: Image.Image, area: Area) -> Image.Image:
            part = picture.crop(area)
            return part.filter(ImageFilter.GaussianBlur(max(part.size) / 4))

    elif kind == "noise":

        def paint(picture: Image.Image, area: Area) -> Image.Image:
            shape = (area[3] - area[1], area[2] - area[0], 3)
            return Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))

    else:

        def paint(picture: Image.Image, area: Area) -> Image.Image:
            mean = np.asarray(picture).reshape(-1, 3).mean(0).round().astype(int)
            return Image.new("RGB", (area[2] - area[0], area[3] - area[1]), tuple(mean.tolist()))

    return _edit(sample, region, paint)


def _edit(sample: Sample, region: Shape, paint: Paint) -> Sample:
    """The sample with this region painted over, in its image or in every frame of its tube."""
    where = f"{sample.label}"
    if isinstance(region, Tube):
        frames = read_video(sample.video, where)
        boxes = {frame: box for frame, box in region.boxes.items() if frame < len(frames)}
        done = {frame: _over(frames[frame], box, paint) for frame, box in boxes.items()}
        return replace(
            sample, video=[done.get(number, frame) for number, frame in enumerate(frames)]
        )
    images = [read_picture(image, where) for image in sample.images]
    if not 0 <= region.image < len(images):
        raise CorelensError(
            f"{where}: a region on image {region.image} of {len(images)}",
            "a picture of the sample",
            "count from 0",
        )
    region.check(*images[region.image].size)
    images[region.image] = _over(images[region.image], region, paint)
    return replace(sample, images=images)


def _over(picture: Image.Image, region: Box | Mask, paint: Paint) -> Image.Image:
    area = _area(region, picture.size)
    result, content = picture.copy(), paint(picture, area)
    if isinstance(region, Mask):
        only = Image.fromarray(
            (region.mask[area[1] : area[3], area[0] : area[2]] * 255).astype(np.uint8)
        )
        result.paste(content, area[:2], only)
    else:
        result.paste(content, area[:2])
    return result


def _area(region: Box | Mask, size: tuple[int, int]) -> Area:
    """The whole pixels that a region touches."""
    x0, y0, x1, y1 = region.bounds
    return (
        max(0, int(np.floor(x0))),
        max(0, int(np.floor(y0))),
        min(size[0], int(np.ceil(x1))),
        min(size[1], int(np.ceil(y1))),
    )


def _swapped(sample: Sample, first: Shape, second: Shape) -> Sample:
    if isinstance(first, Tube) or isinstance(second, Tube):
        raise CorelensError(
            "a swap of tubes", "two regions of images", "swap frames by hand: Sample(video=…)"
        )
    images = [read_picture(image, f"{sample.label}") for image in sample.images]
    for region in (first, second):
        if not 0 <= region.image < len(images):
            raise CorelensError(
                f"a region on image {region.image} of {len(images)}",
                "a picture of the sample",
                "count from 0",
            )
        region.check(*images[region.image].size)
    areas = [_area(region, images[region.image].size) for region in (first, second)]
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = areas
    if first.image == second.image and ax0 < bx1 and bx0 < ax1 and ay0 < by1 and by0 < ay1:
        raise CorelensError(
            f"a swap of {areas[0]} and {areas[1]}",
            "two regions that do not overlap",
            "choose others",
        )
    contents = [
        images[region.image].crop(area) for region, area in zip((first, second), areas, strict=True)
    ]
    for region, content in ((first, contents[1]), (second, contents[0])):
        images[region.image] = _over(images[region.image], region, _stretched(content))
    return replace(sample, images=images)


def _stretched(content: Image.Image) -> Paint:
    """Paints this picture, scaled to the area."""

    def paint(picture: Image.Image, area: Area) -> Image.Image:
        return content.resize((area[2] - area[0], area[3] - area[1]), Image.Resampling.BICUBIC)

    return paint


def _content(other: Any) -> Image.Image:
    """The picture that replaces a region: the first region of another sample, or a whole
    picture."""
    if not isinstance(other, Sample):
        return read_picture(other, "other")
    region = _region(other, 0)
    if isinstance(region, Tube):
        frame, box = next(iter(sorted(region.boxes.items())))
        return (picture := read_video(other.video, "other")[frame]).crop(_area(box, picture.size))
    picture = read_picture(other.images[region.image], "other")
    return picture.crop(_area(region, picture.size))
