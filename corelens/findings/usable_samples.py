"""Samples whose pictures can be read: the others are counted and listed, and too many of them end
the study."""

import os
from collections.abc import Sequence

from corelens.errors import CorelensError
from corelens.inputs.pictures import Later, read_picture
from corelens.inputs.prepare import Sample
from corelens.runs.provenance import images_and_frames

MOST = 0.01


def usable_samples(world: str, samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """(the samples whose files can all be read, what is wrong with the others).

    Raises:
        CorelensError: 1% or more of the samples cannot be read.
    """
    good, wrong = [], []
    for sample in samples:
        try:
            for picture in images_and_frames(sample):
                if isinstance(picture, str | os.PathLike | Later):
                    read_picture(picture, f"{sample.label}")
            good.append(sample)
        except CorelensError as error:
            wrong.append(error.given)
    if wrong and len(wrong) >= MOST * len(samples):
        raise CorelensError(
            f"{world!r}: pictures of {len(wrong)} of {len(samples)} samples cannot be read: "
            f"{'; '.join(wrong[:3])}" + (" …" if len(wrong) > 3 else ""),
            f"fewer than {MOST:.0%} (these are left out, counted and listed)",
            "check the folder of the pictures",
        )
    return good, wrong
