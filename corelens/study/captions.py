"""Questions that take a long answer, over the pictures of `refer`: what a KV budget can be judged by."""

from corelens.inputs import Sample
from corelens.regions import Box

QUESTION = "List every object."  # the bundled models were trained to answer it, see demo/batches.py


def captioned(sample: Sample) -> Sample:
    """The same picture, all its objects from left to right as the answer, a region with its text for each."""
    objects = sorted(sample.meta["objects"], key=lambda o: (o["box"][0] + o["box"][2], o["box"][1] + o["box"][3]))
    names = [f"{o['colour']} {o['kind']} {o['digit']}" for o in objects]
    regions = [Box(*o["box"], text=name) for o, name in zip(objects, names, strict=True)]
    return Sample(images=sample.images, question=QUESTION, answer=", ".join(names) + ".", regions=regions, id=sample.id)
