"""Distribution shifts: the same samples with other pictures or other words.

A model that was trained on one world's style is asked about the same scenes drawn or worded
otherwise: what is lost is lost to the style alone, sample by sample. Regions stay exact: where
pixels move, they move with them.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from corelens.data.synthetic.emoji import PHOTOGRAPHS, photograph
from corelens.data.synthetic.refer import COLOURS, KINDS
from corelens.errors import CorelensError, did_you_mean
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

Shift = Callable[[Sample, np.random.Generator], Sample]
_STREAM = 1_000_011  # in the entropy of the random stream
_QUESTION = re.compile(r"(What|Which) (?P<word>\w+) (?P<verb>is) (?P<place>[^?]+)\?$")
_INSTRUCTIONS = (
    "Answer with one word.",
    "Look at the whole picture before you answer.",
    "Do not explain your answer.",
    "Take your time, and be exact.",
    "If several objects are alike, use the one that the question names.",
)


def shifted(samples: Sequence[Sample], shift: str, seed: int = 0) -> list[Sample]:
    """The same samples under a distribution shift.

    Args:
        samples: with one picture each for the shifts of pictures; of a world whose question reads
            "What … is …?" for the shifts of words.
        shift: a name in `SHIFTS`. Of pictures: "noise" (normal, σ = 25 of 255), "jpeg" (quality
            15), "blur" (radius 1.5 px), "dark" (half as bright), "grey" (a third of the colour),
            "turned" (by 10 degrees either way; boxes become those around the turned ones), "small"
            (at three quarters of the size, on a grey margin), "photograph" and "paper" (what lies
            outside the objects' boxes, which `meta["objects"]` names, is a photograph or nearly
            white). Of words: "which" ("Which digit is on …?"), "statement" ("The digit on … is"),
            "instruction" (one to three sentences between question and answer), "sentence" (the
            answer is a sentence), "question-first" (the question stands before its picture),
            "named" (yes or no: does the picture show the object? Half of those asked for are
            absent; an absent one has no region).
        seed: of what is drawn; sample i does not depend on how many there are.

    Raises:
        CorelensError: for an unknown shift, or a sample that it cannot change.
    """
    if shift not in SHIFTS:
        raise CorelensError(
            f"shift {shift!r}",
            f"one of {', '.join(SHIFTS)}",
            did_you_mean(shift, list(SHIFTS), "name one of these"),
        )
    number = list(SHIFTS).index(shift)
    return [
        SHIFTS[shift](sample, np.random.default_rng((_STREAM, number, seed, i)))
        for i, sample in enumerate(samples)
    ]


# --- pictures


def _picture(sample: Sample) -> np.ndarray:
    if len(sample.images) != 1 or sample.video is not None:
        raise CorelensError(
            f"{sample.label} with {len(sample.images)} pictures",
            "one picture",
            "shift the words, or samples of one picture each",
        )
    image = sample.images[0]
    if not isinstance(image, Image.Image | np.ndarray):
        image = Image.open(image)
    return np.asarray(Image.fromarray(image) if isinstance(image, np.ndarray) else image)


def _with_pixels(sample: Sample, pixels: np.ndarray) -> Sample:
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    return replace(sample, images=[image])


def _noise(sample: Sample, rng: np.random.Generator) -> Sample:
    pixels = _picture(sample)
    return _with_pixels(sample, pixels + rng.normal(0, 25, pixels.shape))


def _jpeg(sample: Sample, rng: np.random.Generator) -> Sample:
    data = io.BytesIO()
    Image.fromarray(_picture(sample)).save(data, "JPEG", quality=15)
    return replace(sample, images=[Image.open(data).convert("RGB")])


def _blur(sample: Sample, rng: np.random.Generator) -> Sample:
    image = Image.fromarray(_picture(sample)).filter(ImageFilter.GaussianBlur(1.5))
    return replace(sample, images=[image])


def _dark(sample: Sample, rng: np.random.Generator) -> Sample:
    return _with_pixels(sample, _picture(sample) * 0.5)


def _grey(sample: Sample, rng: np.random.Generator) -> Sample:
    pixels = _picture(sample).astype(float)
    luma = (pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
    return _with_pixels(sample, luma + (pixels - luma) / 3)


def _turned(sample: Sample, rng: np.random.Generator) -> Sample:
    degrees = 10.0 if rng.random() < 0.5 else -10.0
    image = Image.fromarray(_picture(sample))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
    radians, (width, height) = np.deg2rad(degrees), image.size
    # A picture's y axis points down: a turn to the left has this matrix about the middle.
    turn = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
    middle = np.array([width, height]) / 2

    def moved(box: Box) -> Box:
        corners = np.array([[x, y] for x in (box.x0, box.x1) for y in (box.y0, box.y1)])
        corners = (corners - middle) @ turn.T + middle
        x0, y0 = np.maximum(corners.min(0), 0)
        x1, y1 = np.minimum(corners.max(0), image.size)
        return replace(box, x0=float(x0), y0=float(y0), x1=float(x1), y1=float(y1))

    return _with_boxes(replace(sample, images=[turned]), moved)


def _small(sample: Sample, rng: np.random.Generator) -> Sample:
    image, scale = Image.fromarray(_picture(sample)), 0.75
    size = (round(image.width * scale), round(image.height * scale))
    left, top = (image.width - size[0]) // 2, (image.height - size[1]) // 2
    page = Image.new("RGB", image.size, (128, 128, 128))
    page.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
    across, down = size[0] / image.width, size[1] / image.height

    def moved(box: Box) -> Box:
        return replace(
            box,
            x0=left + box.x0 * across,
            x1=left + box.x1 * across,
            y0=top + box.y0 * down,
            y1=top + box.y1 * down,
        )

    return _with_boxes(replace(sample, images=[page]), moved)


def _with_boxes(sample: Sample, moved: Callable[[Box], Box]) -> Sample:
    if not all(isinstance(region, Box) for region in sample.regions):
        raise CorelensError(
            f"{sample.label} with regions that are no boxes", "boxes", "choose another shift"
        )
    return replace(sample, regions=[moved(region) for region in sample.regions])


def _photograph(sample: Sample, rng: np.random.Generator) -> Sample:
    height, width = _picture(sample).shape[:2]
    name = PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))]
    return _behind(sample, np.asarray(photograph(name).resize((width, height))))


def _paper(sample: Sample, rng: np.random.Generator) -> Sample:
    pixels = _picture(sample)
    return _behind(sample, 240 + rng.normal(0, 4, pixels.shape))


def _behind(sample: Sample, ground: np.ndarray) -> Sample:
    """Another background: all but the objects' boxes is replaced."""
    objects = sample.meta.get("objects")
    if not objects or not all("box" in thing for thing in objects):
        raise CorelensError(
            f"{sample.label}, which does not say where its objects are",
            'meta["objects"] with a "box" each',
            "choose another shift",
        )
    pixels, changed = _picture(sample), np.array(ground, float)
    for thing in objects:
        x0, y0, x1, y1 = (round(edge) for edge in thing["box"])
        changed[y0:y1, x0:x1] = pixels[y0:y1, x0:x1]
    return _with_pixels(sample, changed)


# --- words


def _parts(sample: Sample) -> re.Match[str]:
    match = _QUESTION.match(str(sample.question))
    if match is None or sample.messages is not None:
        raise CorelensError(
            f"{sample.label}, question {sample.question!r}",
            "a question that reads 'What … is …?', not in messages",
            "choose a shift of pictures, or the world refer",
        )
    return match


def _which(sample: Sample, rng: np.random.Generator) -> Sample:
    words = _parts(sample)
    return replace(sample, question=f"Which {words['word']} is {words['place']}?")


def _statement(sample: Sample, rng: np.random.Generator) -> Sample:
    words = _parts(sample)
    return replace(sample, question=f"The {words['word']} {words['place']} is")


def _instruction(sample: Sample, rng: np.random.Generator) -> Sample:
    count = int(rng.integers(1, 4))
    order = rng.permutation(len(_INSTRUCTIONS))[:count]
    text = " ".join([str(sample.question), *(_INSTRUCTIONS[i] for i in order)])
    content = [{"type": "image"} for _ in sample.images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return replace(sample, messages=[message])


def _sentence(sample: Sample, rng: np.random.Generator) -> Sample:
    words = _parts(sample)
    answer = f"The {words['word']} {words['place']} is {sample.answer}."
    return replace(sample, answer=answer)


def _question_first(sample: Sample, rng: np.random.Generator) -> Sample:
    text = {"type": "text", "text": str(sample.question)}
    content = [text, *({"type": "image"} for _ in sample.images)]
    return replace(sample, messages=[{"role": "user", "content": content}])


def _named(sample: Sample, rng: np.random.Generator) -> Sample:
    objects = sample.meta.get("objects") or []
    shown = [(str(thing.get("colour")), str(thing.get("kind"))) for thing in objects]
    if not shown or not set(shown) <= {(c, k) for c in COLOURS for k in KINDS}:
        raise CorelensError(
            f"{sample.label}, which does not say what its objects are",
            'meta["objects"] with a "colour" and a "kind" each',
            "use the world refer",
        )
    if rng.random() < 0.5:
        colour, kind = shown[int(sample.meta["asked"])]
        return replace(sample, question=f"Is there a {colour} {kind}?", answer="yes")
    colours, kinds = zip(*shown, strict=True)
    # absent as a pair, but each word fits some object: both have to be looked for together
    absent = [(c, k) for c in set(colours) for k in set(kinds) if (c, k) not in shown]
    if not absent:  # a single object, for instance: one of the two words fits it
        near = [(c, k) for c in COLOURS for k in KINDS if c in colours or k in kinds]
        absent = [pair for pair in near if pair not in shown]
    colour, kind = sorted(absent)[int(rng.integers(len(absent)))]
    return replace(sample, question=f"Is there a {colour} {kind}?", answer="no", regions=[])


PICTURES: dict[str, Shift] = {
    "noise": _noise,
    "jpeg": _jpeg,
    "blur": _blur,
    "dark": _dark,
    "grey": _grey,
    "turned": _turned,
    "small": _small,
    "photograph": _photograph,
    "paper": _paper,
}
WORDS: dict[str, Shift] = {
    "which": _which,
    "statement": _statement,
    "instruction": _instruction,
    "sentence": _sentence,
    "question-first": _question_first,
    "named": _named,
}
SHIFTS: dict[str, Shift] = PICTURES | WORDS
"""By name: those of pictures, then those of words."""
