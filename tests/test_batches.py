"""Batches: each row is what the sample alone would be, maps and logits, or the batch is refused
with a reason."""

import numpy as np
import pytest
import torch

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample, prepare
from corelens.layouts import layout_for
from corelens.tokens.regions import Box
from helpers.families import FAMILIES, tiny

NAMES = ("visual", "question", "last", "answer", "region", "text", "all")


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def ready(family: str, samples, **options) -> Inputs:
    model, processor = tiny(family)
    return prepare(samples, processor, layout_for(model.config), model.config, **options)


def check_rows(
    family: str, samples: list[Sample], side: str = "left", names: tuple[str, ...] = NAMES
) -> None:
    model, _ = tiny(family)
    answer = samples[0].answer is not None
    batch = ready(family, samples, answer=answer, padding_side=side)
    with torch.no_grad():
        together = model(**batch.tensors).logits
    for row, sample in enumerate(samples):
        single = ready(family, sample, answer=answer)
        alone, tm = single.token_maps[0], batch.token_maps[row]
        shift = batch.length - alone.length if side == "left" else 0
        assert (tm.start, tm.stop, tm.length) == (shift, shift + alone.length, batch.length)
        for name in names:
            assert torch.equal(tm.positions(name), alone.positions(name) + shift), name
        for position in alone.visual.tolist()[::7]:
            assert tm.cell(position + shift) == alone.cell(position)
            assert tm.frames(position + shift) == alone.frames(position)
        assert torch.equal(batch.tensors["input_ids"][row, tm.all], single.tensors["input_ids"][0])
        with torch.no_grad():
            alone = model(**single.tensors).logits[0]
        assert torch.allclose(together[row, tm.all], alone, atol=2e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_sizes_and_numbers_of_images(family, side):
    two, box = [noise(64, 128, 2), noise(90, 60, 3)], Box(5, 5, 40, 40, image=1)
    samples = [
        Sample(
            [noise(100, 90, 1)],
            "What digit is on the red circle?",
            "7",
            [Box(20, 20, 50, 50)],
            id="a",
        ),
        Sample(two, "Is it?", "yes", [box], choices=["yes", "no"], id="b"),
    ]
    check_rows(family, samples, side)


IMAGE, TEXT = Sample([noise(100, 70)], "Is it?"), Sample(question="What is 3 + 4?")
FRAMES = [noise(64, 64, seed) for seed in range(4)]
VIDEO, SHORT = (
    Sample(video=FRAMES, question="Which?"),
    Sample(video=FRAMES[:3], question="Which one?"),
)
MIXED = {"image and text": [IMAGE, TEXT], "text first": [TEXT, IMAGE], "text": [TEXT, TEXT]}
MIXED |= {"video and image": [VIDEO, IMAGE], "all": [IMAGE, VIDEO, TEXT], "lengths": [VIDEO, SHORT]}
REFUSED = {
    "lengths": {"llava_onevision", "internvl", "smolvlm"},
    "video and image": {"smolvlm"},
    "all": {"smolvlm"},
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_kinds(family, kind):
    """Samples without pictures, with images and with videos in one batch, as far as the family
    takes them."""
    takes_video = getattr(tiny(family)[1], "video_processor", None) is not None
    needs_video = any(sample.video is not None for sample in MIXED[kind])
    needs_image = family == "paligemma" and "text" in kind
    if family in REFUSED.get(kind, ()) or (needs_video and not takes_video) or needs_image:
        with pytest.raises(CorelensError):
            ready(family, MIXED[kind])
    else:
        check_rows(family, MIXED[kind], names=("visual", "question", "last", "text", "all"))
