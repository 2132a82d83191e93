"""What a bundled model cannot know: it was trained on drawn scenes alone, and says so of a
photograph."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM

FLAT = 0.5
"""The share of pixels that are as their right neighbour. Measured on 8 scenes a world: 0.92 to
0.98, saved as JPEG 0.62; Matplotlib's sample photograph: 0.06."""


class DemoMLLM(HookedMLLM):
    """A bundled model. The first picture that is no drawn scene is answered with a warning, the
    others without."""

    warned = False

    def prepare(self, samples: Sample | Sequence[Sample], **options: Any) -> Inputs:
        """As HookedMLLM's; warns once of a picture that such a model was never shown the like
        of."""
        inputs = super().prepare(samples, **options)
        if not self.warned and any(
            is_foreign(picture)
            for sample, pictures in zip(inputs.samples, inputs.pictures, strict=True)
            if "world" not in sample.meta
            for picture in pictures
        ):
            self.warned = True
            warnings.warn(
                "a bundled demo model only knows drawn scenes (cl.synthetic), and this picture is none: what it "
                "answers and where its heads look means nothing here. For photographs use a real model: "
                "HookedMLLM.from_pretrained(…), or --model on the command line.",
                stacklevel=2,
            )
        return inputs


def is_foreign(picture: Any) -> bool:
    """Whether an image, or the first frame of a video, lacks the flat colours of everything that
    CoreLens draws."""
    image: Image.Image = picture[0] if isinstance(picture, list) else picture
    pixels = np.asarray(image)
    return image.width > 1 and float((pixels[:, 1:] == pixels[:, :-1]).all(-1).mean()) < FLAT
