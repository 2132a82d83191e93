"""Questions that take a long answer, over the pictures of `refer`: what a KV budget can be judged
by."""

from corelens.inputs.prepare import Sample
from corelens.tokens.regions import Box, Region

# the bundled models were trained to answer it, see training/batches.py
QUESTION = "List every object."


def captioned(sample: Sample) -> Sample:
    """The same picture, all its objects from left to right as the answer, a region with its text
    for each."""
    objects = sorted(
        sample.meta["objects"], key=lambda o: (o["box"][0] + o["box"][2], o["box"][1] + o["box"][3])
    )
    names = [f"{o['colour']} {o['kind']} {o['digit']}" for o in objects]
    regions: list[Region] = []
    for shape, name in zip(objects, names, strict=True):
        x0, y0, x1, y1 = shape["box"]
        regions.append(Box(x0, y0, x1, y1, text=name))
    answer = ", ".join(names) + "."
    return Sample(
        images=sample.images,
        question=QUESTION,
        answer=answer,
        regions=regions,
        id=sample.id,
        meta={"serves": ["F8"]},
    )
