"""Boxes, masks and tubes: what they cover of a cell, and what they refuse."""

import numpy as np
import pytest

from corelens.errors import CorelensError
from corelens.tokens.regions import Box, Mask, Tube


def painted(width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def test_a_box_covers_a_fraction_of_a_cell():
    assert Box(0, 0, 10, 10).covered((0, 0, 10, 10)) == 1
    assert Box(0, 0, 5, 10).covered((0, 0, 10, 10)) == 0.5
    assert Box(2, 3, 4, 5).covered((0, 0, 10, 10)) == pytest.approx(0.04)
    assert Box(0, 0, 10, 10).covered((10, 0, 20, 10)) == 0  # it ends where the cell begins


def test_a_mask_covers_what_the_box_of_its_pixels_covers():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x0, y0 = rng.integers(0, 20, 2).tolist()
        box = x0, y0, x0 + int(rng.integers(1, 10)), y0 + int(rng.integers(1, 10))
        corner, side = rng.uniform(0, 25, 2), rng.uniform(0.5, 5, 2)
        cell = (*corner.tolist(), *(corner + side).tolist())
        assert Mask(painted(30, 30, box)).covered(cell) == pytest.approx(Box(*box).covered(cell))


def test_xywh():
    assert Box.from_xywh(3, 4, 10, 20, image=1, text="7") == Box(3, 4, 13, 24, 1, "7")


def test_bounds():
    assert Box(1, 2, 3, 4).bounds == (1, 2, 3, 4)
    assert Mask(painted(9, 9, (2, 3, 5, 7))).bounds == (2, 3, 5, 7)


def test_a_tube_is_one_box_a_frame():
    tube = Tube({2: Box(0, 0, 10, 10), 3: Box(5, 0, 10, 10)})
    cell = (0, 0, 10, 10)
    assert [tube.covered(cell, frame) for frame in (1, 2, 3)] == [0, 1, 0.5]
    assert tube.covered(cell) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(5, 0, 5, 10), "is empty"),
        (lambda: Box(5, 9, 8, 3), "is empty"),
        (lambda: Mask(np.zeros((4, 4), dtype=bool)), "without a single True pixel"),
        (lambda: Mask(np.ones((4, 4, 3), dtype=bool)), "boolean array"),
        (lambda: Mask(np.ones((4, 4))), "mask > 0.5"),
        (lambda: Tube({}), "without frames"),
        (
            lambda: Box(0.1, 0.2, 0.5, 1).check(100, 200),
            r"fractions of the picture: Box\(10, 40, 50, 200\)",
        ),
        (lambda: Box(0, 0, 12, 10).check(10, 10), "outside its picture of 10 × 10"),
        (lambda: Box(-3, 0, 5, 10).check(10, 10), "outside its picture"),
        (
            lambda: Mask(painted(10, 8, (0, 0, 1, 1))).check(8, 10),
            "10 × 8 pixels on a picture of 8 × 10",
        ),
        (
            lambda: Tube({0: Box(0, 0, 5, 5), 1: Box(0, 0, 50, 5)}).check(10, 10),
            "outside its picture",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(CorelensError, match=message):
        make()


def test_rounding_at_the_edge_is_forgiven():
    Box(-0.5, 0, 10.7, 10).check(10, 10)
