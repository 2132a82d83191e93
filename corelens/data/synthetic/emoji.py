"""World `emoji`: everyday things on photographs, each with a digit on the tag below it.

"What digit is under the banana?" Things are turned and of many sizes, digits in several fonts; the
whole picture is noisy and went through JPEG. The pictures lie in the package, with their licences:
glyphs of Noto Color Emoji, and photographs that scikit-image bundles; the fonts are those of
matplotlib.

What a model can do without looking: all digits of a scene differ, so a guess is right once in ten
times.
"""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from corelens.data.synthetic.drawing import DIGITS, Number, Query, draw_number, smallest
from corelens.data.synthetic.refer import draw_size, stream
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample
from corelens.tokens.regions import Box

_WORDS = """
apple banana cherries grapes lemon strawberry carrot mushroom bread cheese pizza cake
dog cat pig frog lion panda rabbit penguin fish octopus turtle snail
bee butterfly tree cactus sunflower rose car bus bicycle boat rocket umbrella
clock key hammer scissors book guitar drum bell ball crown shoe camera
"""
NAMES = tuple(_WORDS.split())
"""In the order of the sheet, row by row."""
PHOTOGRAPHS = ("brick", "chelsea", "coffee", "grass", "gravel", "hubble")
FONTS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "cmr10")
MINIMUM = {"objects": 4, "side": 256}
"""The documented minimum of difficulty: below it no number is published. (256 px a side are 64
visual tokens of 32.)"""
QUESTION = "What digit is under the {name}?"

_PICTURES = Path(__file__).parent / "pictures"
_WORLD = 1_000_007  # in the entropy of the random stream
_SHEET, _GLYPH = 8, 72  # glyphs a row, pixels a side
_SIDES = (44, 60)  # pixels, of a thing
_TAG = (30, 24)  # pixels, width and height
_TURNS = (-25.0, 25.0)  # degrees
_GAP = 2  # pixels between things
_DARTS, _TRIES = 128, 100


def emoji(
    n: int,
    seed: int = 0,
    *,
    objects: Number = (4, 6),
    sides: tuple[int, int] = (256, 320),
    quality: Number = (50, 95),
    noise: float = 6.0,
    turn: int = 0,
    split: str = "test",
) -> list[Sample]:
    """`n` samples: a scene, "What digit is under the banana?", "7", and the box around the banana
    and its tag.

    Args:
        n: how many.
        seed: sample i of a seed is always the same scene, whatever `n`.
        objects: things in a scene, 1 to 10, or (fewest, most). Published numbers need 4 or more.
        sides: smallest and largest side of the picture in pixels; width and height are drawn apart,
            in steps of 32. Published numbers need 256 or more.
        quality: of JPEG, 1 to 100, or (lowest, highest).
        noise: the largest standard deviation of the pixels' noise, of 255; each picture has its
            own.
        turn: the asked digit counted on by so many (digits that stand elsewhere in the scene are
            passed over, where any are left); all else stays as it is (to the pixel before JPEG,
            which spreads a change over its block).
        split: "test" (everyone's), "train" or "validation"; see `refer`.

    Raises:
        CorelensError: for a scene that is impossible (more objects than fit), and where a picture
            or font is missing.
    """
    samples = []
    for i in range(n):
        rng = stream(split, _WORLD, seed, i)
        width, height = draw_size(rng, sides)
        count = draw_number(rng, objects, "objects", 1, 10)
        level = draw_number(rng, quality, "quality", 1, 100)
        things = [NAMES[k] for k in rng.permutation(len(NAMES))[:count]]
        digits = [DIGITS[k] for k in rng.permutation(10)[:count]]
        asked = int(rng.integers(count))
        if turn:
            digits[asked] = _counted_on(digits, asked, turn)
        image, boxes = _paint(rng, width, height, things, digits, noise)
        box = boxes[asked]
        region = Box(box.x0, box.y0, box.x1, box.y1, text=digits[asked])
        query = Query(QUESTION.format(name=things[asked]), digits[asked], [region], "digit", asked)
        parts = zip(things, digits, boxes, strict=True)
        sample = query.sample(
            "emoji",
            f"emoji-{seed}-{i:04d}",
            split=split,
            published=smallest(objects) >= MINIMUM["objects"] and sides[0] >= MINIMUM["side"],
            objects=[
                {"name": name, "symbol": digit, "box": box.bounds} for name, digit, box in parts
            ],
        )
        sample.images = [_squeezed(image, level)]
        samples.append(sample)
    return samples


def photograph(name: str) -> Image.Image:
    """One of PHOTOGRAPHS, RGB."""
    return _picture(f"{name}.jpg", "RGB")


# --- inside


def _counted_on(digits: list[str], asked: int, turn: int) -> str:
    begin = DIGITS.index(digits[asked])
    others = DIGITS[begin + 1 :] + DIGITS[:begin]
    free = [digit for digit in others if digit not in digits] or list(others)
    return free[(turn - 1) % len(free)]


def _paint(
    rng: np.random.Generator,
    width: int,
    height: int,
    things: list[str],
    digits: list[str],
    noise: float,
) -> tuple[Image.Image, list[Box]]:
    """The picture, and the box around each thing and its tag."""
    image = _ground(rng, width, height)
    draw = ImageDraw.Draw(image)
    sizes = [int(x) for x in rng.integers(_SIDES[0], _SIDES[1] + 1, len(things))]
    boxes = _places(rng, sizes, width, height)
    for name, digit, side, box in zip(things, digits, sizes, boxes, strict=True):
        glyph = _glyph(name).rotate(
            float(rng.uniform(*_TURNS)), Image.Resampling.BICUBIC, expand=True
        )
        glyph.thumbnail((side, side), Image.Resampling.LANCZOS)
        left, top = int(box.x0), int(box.y0)
        image.paste(
            glyph, (left + (side - glyph.width) // 2, top + (side - glyph.height) // 2), glyph
        )
        middle, upper = left + side // 2, top + side
        tag = (middle - _TAG[0] // 2, upper, middle + _TAG[0] // 2 - 1, upper + _TAG[1] - 1)
        draw.rounded_rectangle(
            tag, 5, fill=tuple(int(v) for v in rng.integers(225, 256, 3)), outline=(60, 60, 60)
        )
        font = _font(FONTS[int(rng.integers(len(FONTS)))], int(rng.integers(19, 24)))
        draw.text((middle, upper + _TAG[1] / 2), digit, fill=(10, 10, 10), font=font, anchor="mm")
    grain = rng.normal(0, rng.uniform(0, noise), (height, width, 3)) if noise else 0
    return Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)), boxes


def _places(rng: np.random.Generator, sizes: list[int], width: int, height: int) -> list[Box]:
    """A box for each thing and its tag, none over another."""
    for _ in range(_TRIES):
        boxes: list[Box] = []
        for side in sizes:
            high = side + _TAG[1]
            if side > width or high > height:
                break
            darts = rng.integers((0, 0), (width - side + 1, height - high + 1), (_DARTS, 2))
            free = np.ones(_DARTS, bool)
            for box in boxes:
                beside = (darts[:, 0] >= box.x1 + _GAP) | (darts[:, 0] + side + _GAP <= box.x0)
                free &= (
                    beside | (darts[:, 1] >= box.y1 + _GAP) | (darts[:, 1] + high + _GAP <= box.y0)
                )
            if not free.any():
                break
            x, y = darts[int(free.argmax())]
            boxes.append(Box(float(x), float(y), float(x + side), float(y + high)))
        if len(boxes) == len(sizes):
            return boxes
    raise CorelensError(
        f"{len(sizes)} objects in a picture of {width} × {height} pixels",
        f"a scene that can be drawn: things of up to {_SIDES[1] + _TAG[1]} px that do not overlap",
        "ask for fewer objects or for larger sides",
    )


def _ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A part of a photograph, scaled to the picture, and paler, so that things stand out."""
    whole = photograph(PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))])
    scale = float(rng.uniform(0.5, 1.0)) * min(whole.width / width, whole.height / height)
    wide, high = int(width * scale), int(height * scale)
    left = int(rng.integers(whole.width - wide + 1))
    top = int(rng.integers(whole.height - high + 1))
    part = whole.crop((left, top, left + wide, top + high)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    return Image.blend(
        part, Image.new("RGB", part.size, (200, 200, 200)), float(rng.uniform(0.2, 0.5))
    )


def _squeezed(image: Image.Image, quality: int) -> Image.Image:
    """The picture after JPEG."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data).convert("RGB")


def _glyph(name: str) -> Image.Image:
    row, column = divmod(NAMES.index(name), _SHEET)
    place = (column * _GLYPH, row * _GLYPH, (column + 1) * _GLYPH, (row + 1) * _GLYPH)
    return _picture("emoji.png", "RGBA").crop(place)


@lru_cache(maxsize=16)
def _picture(name: str, mode: str) -> Image.Image:
    try:
        return Image.open(_PICTURES / name).convert(mode)
    except OSError as error:
        raise CorelensError(
            f"the picture {name} of the world emoji ({error})",
            "all pictures of the package",
            "install corelens again",
        ) from error


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    file = Path(get_data_path(), "fonts", "ttf", f"{name}.ttf")
    try:
        return ImageFont.truetype(file, size)
    except OSError as error:
        raise CorelensError(
            f"the font {file} ({error})",
            "the fonts that matplotlib brings",
            "pip install --force-reinstall matplotlib",
        ) from error
