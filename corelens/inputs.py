"""What goes in: a Sample is one question about pictures; Inputs is the batch a model runs on."""

from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from corelens.errors import CorelensError
from corelens.regions import Region


@dataclass
class Sample:
    """One question about one or several pictures or a video.

    Args:
        images: the pictures, in the order in which the prompt shows them.
        question: the user's words, without template, options or instructions.
        answer: the gold answer, as the model should write it.
        regions: where the evidence is, in pixels of the original picture; several mean their union.
        choices: options of a multiple-choice question, appended to the question as "A. …".
        id: the sample's name; stable, since results are stored under it.
        video: the frames of one video instead of `images`.
        messages: a chat in the format of transformers' chat templates, instead of `images` and `question`
            (the question is then the text of the last user message, unless `question` names a part of it).
        meta: anything else that is worth keeping, for instance what kind of question it is.
    """

    images: list[Image.Image] = field(default_factory=list)
    question: str | None = None
    answer: str | None = None
    regions: list[Region] = field(default_factory=list)
    choices: list[str] | None = None
    id: str = ""
    video: list[Image.Image] | None = None
    messages: list[dict[str, Any]] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
