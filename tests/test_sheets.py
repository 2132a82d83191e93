"""Contact sheets: samples side by side, every region outlined."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corelens.data.synthetic import synthetic, worlds
from corelens.data.synthetic.sheet import OUTLINE, contact_sheet
from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample
from corelens.tokens.regions import Box, Mask


def test_contact_sheets_outline_every_region():
    for world, columns in (("refer", 2), ("refer-hard", 2), ("doc", 1), ("video", 1)):
        samples = synthetic(world, 2, seed=1)
        bare = [replace(sample, regions=[]) for sample in samples]
        sheet, plain = contact_sheet(samples, columns, 128), contact_sheet(bare, columns, 128)
        assert sheet.size == plain.size
        assert (np.asarray(sheet)[(np.asarray(sheet) != np.asarray(plain)).any(-1)] == OUTLINE).all(
            -1
        ).sum() > 50


def test_contact_sheets_take_masks_and_say_what_they_need():
    mask = np.zeros((64, 64), bool)
    mask[20:40, 10:30] = True
    sample = Sample(
        images=[np.zeros((64, 64, 3), np.uint8)],
        question="Where?",
        answer="Here",
        regions=[Mask(mask)],
    )
    assert (np.asarray(contact_sheet([sample], height=64)) == OUTLINE).all(-1).any()
    assert (
        contact_sheet(
            [replace(sample, regions=[Box(0, 0, 5, 5)], question=None)] * 3, columns=2
        ).width
        > 400
    )
    for wrong in ({"samples": []}, {"samples": [sample], "columns": 0}):
        with pytest.raises(CorelensError, match="to do"):
            contact_sheet(**wrong)


@pytest.mark.parametrize("world", worlds())
def test_the_docs_have_a_sheet_of_every_world(world):
    file = Path(__file__).parents[1] / "docs" / "images" / f"{world}.png"
    assert 20_000 < file.stat().st_size < 300_000
