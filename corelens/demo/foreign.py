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
"""The least share of pixels that equal their right neighbour. Measured on 3 scenes of each world
but `emoji`: 0.94 to 0.98, saved as JPEG 0.51 to 0.81. Matplotlib's sample photograph: 0.06; the
photographs of `emoji`: 0.02 to 0.33, its scenes: up to 0.22."""
EDGES = 0.03
"""The least share of sharp edges among the pixels that differ from their right neighbour. Measured
on the same scenes: 0.76 to 0.93, saved as JPEG 0.07 to 0.28. Flat near-white pictures with the
noise and the slow gradient of a photograph: 0.00."""
SHARP = 24  # of 255: a step between neighbours that is an edge


class DemoMLLM(HookedMLLM):
    """A bundled model. The first picture that is no drawn scene is answered with a warning, the
    others without."""

    warned = False
    worlds: tuple[str, ...] = ()
    """Those that it was trained on: their scenes are known, whatever was done to them."""

    def prepare(self, samples: Sample | Sequence[Sample], **options: Any) -> Inputs:
        """As HookedMLLM's; warns once of a picture that such a model was never shown the like
        of."""
        inputs = super().prepare(samples, **options)
        if not self.warned and self._any_foreign(inputs):
            self.warned = True
            worlds = f" of {', '.join(self.worlds)}" if self.worlds else ""
            warnings.warn(
                f"a bundled demo model only knows drawn scenes{worlds} (cl.synthetic), and this "
                "picture is none: what it answers and where its heads look means nothing here. For "
                "photographs use a real model: HookedMLLM.from_pretrained(…), or --model on the "
                "command line.",
                stacklevel=2,
            )
        return inputs

    def _any_foreign(self, inputs: Inputs) -> bool:
        known = (*self.worlds, "noise")  # (noise: that of `model.verify`)
        for sample, pictures in zip(inputs.samples, inputs.pictures, strict=True):
            if sample.meta.get("world") not in known and any(map(is_foreign, pictures)):
                return True
        return False


def is_foreign(picture: Any) -> bool:
    """Whether an image, or the first frame of a video, lacks what everything drawn has: flat
    colours (`FLAT`) and sharp edges between them (`EDGES`)."""
    image: Image.Image = picture[0] if isinstance(picture, list) else picture
    if image.width < 2:
        return False
    pixels = np.asarray(image.convert("RGB")).astype(np.int16)
    steps = np.abs(pixels[:, 1:] - pixels[:, :-1]).max(-1)
    differ = np.count_nonzero(steps)
    flat = 1 - differ / steps.size
    return bool(flat < FLAT or differ == 0 or (steps > SHARP).sum() < EDGES * differ)
