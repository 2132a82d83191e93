"""A Sample: one question about pictures or a video, with its answer and the region of its
evidence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.sounds import is_sound
from corelens.tokens.regions import Region, Regions, is_corners


@dataclass
class Sample:
    """One question about one or several pictures or a video.

    Args:
        images: the pictures, in the order in which the prompt shows them: PIL images, paths, or
            uint8 arrays; one alone needs no list.
        question: the user's words, without template, options or instructions.
        answer: the gold answer, as the model should write it.
        regions: where the evidence is, in pixels of the original picture; several mean their union,
            one needs no list. Four numbers x0, y0, x1, y1 are a Box.
        choices: options of a multiple-choice question, appended to the question as "A. …".
        id: the sample's name; stable, since results are stored under it.
        video: the frames of one video instead of `images`.
        messages: a chat in the format of transformers' chat templates, instead of `images` and
            `question` (the question is then the text of the last user message, unless `question`
            names a part of it). What a part says of its picture is used or refused: see
            `corelens.inputs.media`.
        meta: anything else that is worth keeping, for instance what kind of question it is; "fps"
            is the frame rate of `video`, which some models write into the prompt (a warning says
            so, and that 24 are assumed without it).
        audio: sounds, in the order of the prompt: (waveform, sampling rate) each, or the path of a
            WAV file; one alone needs no list. Regions in them are Spans, in seconds.
    """

    images: list[Any] | Any = field(default_factory=list)
    question: str | None = None
    answer: str | None = None
    regions: list[Any] | Any = field(default_factory=list)
    choices: list[str] | None = None
    id: str = ""
    video: Sequence[Any] | np.ndarray | None = None
    messages: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    audio: list[Any] | Any = field(default_factory=list)

    def __post_init__(self) -> None:
        """One picture or one region stands for a list of one."""
        if self.images is None:
            self.images = []
        if (
            isinstance(self.images, str | Path | Image.Image)
            or getattr(self.images, "ndim", 4) == 3
        ):
            self.images = [self.images]
        if not isinstance(self.images, Sequence | np.ndarray):
            raise CorelensError(
                f"{self.label}: images of type {type(self.images).__name__}",
                "a picture or a list of pictures: PIL images, paths or uint8 arrays",
                "Sample(images=[Image.open('street.jpg')], …)",
            )
        if not isinstance(self.question, str | None):
            raise CorelensError(
                f"{self.label}: the question {self.question!r}",
                "a text",
                "Sample(question='What digit is on the red circle?', …)",
            )
        if is_sound(self.audio):
            self.audio = [self.audio]

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; regions are read when they are put in, whenever that is."""
        super().__setattr__(name, self._read(value) if name == "regions" else value)

    def _read(self, regions: Any) -> Regions:
        """One region or several, as a list of them."""
        if regions is None:
            return Regions()
        if isinstance(regions, Region) or is_corners(regions):
            return Regions([regions])
        if not isinstance(regions, Iterable):
            raise CorelensError(
                f"{self.label}: regions={regions!r}",
                "Boxes, Masks or a Tube",
                "Sample(regions=[Box(x0, y0, x1, y1)], …)",
            )
        return Regions(regions)

    @property
    def label(self) -> str:
        """What messages call it: "sample 'refer-1-0003'", or by its question if it has no id."""
        if self.id:
            return f"sample {self.id!r}"
        return f"the sample that asks {self.question!r}" if self.question else "a sample without id"

    def plot(self) -> Any:
        """A matplotlib figure: the pictures with the regions outlined, question and answer."""
        from corelens.viz.sample import sample_figure

        return sample_figure(self)

    def _repr_html_(self) -> str:
        from corelens.viz.sample import sample_html

        return sample_html(self)


def as_sample(value: Any) -> Sample:
    """The value, if it is a Sample.

    Raises:
        CorelensError: it is something else, for instance a row of a data set, or prepared inputs.
    """
    if hasattr(value, "token_maps"):
        raise CorelensError(
            f"{str(value)[:60]} in place of a sample",
            "a Sample: its question and its regions are read",
            "give the samples that these inputs were prepared from: inputs.samples",
        )
    if not isinstance(value, Sample):
        shown = ", ".join(map(str, value)) if isinstance(value, Mapping) else str(value)
        raise CorelensError(
            f"a {type(value).__name__} in place of a sample: {shown[:60]}",
            "a Sample",
            "make one of each row: (cl.Sample(images=[row['image']], question=row['question'], …) "
            "for row in rows)",
        )
    return value
