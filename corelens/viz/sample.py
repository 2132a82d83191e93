"""One sample as a person sees it: its pictures with the regions outlined, its question and its
answer."""

from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from corelens.inputs.pictures import read_picture, read_video
from corelens.tokens.regions import Span, Tube
from corelens.viz import page, style
from corelens.viz.heat import attention_image

MOST_FRAMES = 6


def shown(sample: Any) -> list[tuple[str, Image.Image]]:
    """(name, picture with its regions outlined) of every image, and of a video some frames."""
    pictures = []
    for number, picture in enumerate(sample.images or _in_chat(sample)):
        image = read_picture(picture, f"{sample.label}, image {number}")
        regions = [
            r for r in sample.regions if not isinstance(r, Span | Tube) and r.image == number
        ]
        pictures.append((f"image {number}", attention_image(image, None, regions)))
    if sample.video is not None:
        frames = read_video(sample.video, f"{sample.label}")
        step = -(-len(frames) // MOST_FRAMES)
        tubes = [region for region in sample.regions if isinstance(region, Tube)]
        pictures += [
            (f"frame {first}", attention_image(frames[first], None, tubes, first))
            for first in range(0, len(frames), step)
        ]
    return pictures


def _in_chat(sample: Any) -> list[Any]:
    images = []
    for message in sample.messages or []:
        for part in message["content"]:
            if isinstance(part, dict) and part.get("type") == "image" and "image" in part:
                images.append(part["image"])
    return images


def sample_figure(sample: Any) -> Figure:
    """The pictures side by side; question and answer above."""
    pictures = shown(sample)
    wide = sum(image.width / image.height for _, image in pictures) or 1.0
    height = min(2.6, 12 / wide)
    with style.axes(None, max(3.6, wide * height), height + 0.55) as first:
        figure = style.figure_of(first)
        first.remove()
        ratios = [image.width / image.height for _, image in pictures]
        if pictures:
            for ax, (name, image) in zip(
                figure.subplots(1, len(pictures), squeeze=False, width_ratios=ratios)[0],
                pictures,
                strict=True,
            ):
                ax.imshow(image, interpolation="antialiased")
                ax.set_axis_off()
                if len(pictures) > 1:
                    ax.set_title(name, fontsize=8.5)
        figure.suptitle(
            question_and_answer(sample), x=0.01, ha="left", fontsize=9.5, parse_math=False
        )
    return figure


def question_and_answer(sample: Any) -> str:
    """Question, options and answer in one line."""
    options = "".join(
        f"   {chr(65 + i)}. {option}" for i, option in enumerate(sample.choices or [])
    )
    gold = f"   →  {sample.answer}" if sample.answer is not None else ""
    return f"{sample.question or 'a chat'}{options}{gold}"


def sample_html(sample: Any) -> Markup:
    """The same for a notebook."""
    picture = Markup('<img alt="{}" src="{}" style="height:220px;margin:0 6px 6px 0">')
    images = [picture.format(name, page.data_uri(image)) for name, image in shown(sample)]
    return Markup("<div>{}</div><p>{} <code>{}</code></p>").format(
        Markup("").join(images), question_and_answer(sample), sample.id
    )
