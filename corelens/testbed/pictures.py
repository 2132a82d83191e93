"""Pictures for the hand-built models: a board of 4 × 4 cells, a digit in each, one cell framed red
and one blue."""

from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample
from corelens.tokens.regions import Box

SIDE, CELL = 4, 16  # cells a side, pixels a cell; a cell is one visual token
CELLS = SIDE * SIDE
FRAMES = {"none": (96, 96, 96), "marked": (255, 0, 0), "distractor": (0, 64, 255)}
QUESTION = "Which digit is marked?"

# 3 × 5 pixels each, row by row
GLYPHS = (
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001011001111",
    "101101111001001",
    "111100111001111",
    "100100111101111",
    "111001010010010",
    "111101010101111",
    "111101111001001",
)


@cache
def cell(digit: int, frame: str) -> UInt8[np.ndarray, "16 16 3"]:
    """One cell: a white digit on black in a frame of two pixels. Digit and frame share no pixel."""
    picture = np.zeros((CELL, CELL, 3), dtype=np.uint8)
    glyph = np.array([int(bit) for bit in GLYPHS[digit]], dtype=np.uint8).reshape(5, 3) * 255
    picture[3:13, 5:11] = np.kron(glyph, np.ones((2, 2), dtype=np.uint8))[..., None]
    for edge in (np.s_[:2], np.s_[-2:]):
        picture[edge] = picture[:, edge] = FRAMES[frame]
    return picture


def board(digits: list[int], marked: int, distractor: int | None = None) -> Image.Image:
    """The whole picture: `digits` cell by cell, row by row; which cell is framed red, and which
    blue."""
    picture = np.zeros((SIDE * CELL, SIDE * CELL, 3), dtype=np.uint8)
    for number, digit in enumerate(digits):
        y, x = CELL * (number // SIDE), CELL * (number % SIDE)
        frame = "marked" if number == marked else "distractor" if number == distractor else "none"
        picture[y : y + CELL, x : x + CELL] = cell(digit, frame)
    return Image.fromarray(picture)


def box(number: int) -> Box:
    """The region of one cell, in pixels."""
    y, x = CELL * (number // SIDE), CELL * (number % SIDE)
    return Box(x, y, x + CELL, y + CELL)


def samples(n: int, seed: int = 0, moved: bool = False) -> list[Sample]:
    """Boards with the question which digit is marked.

    Args:
        n: how many.
        seed: the same seed gives the same boards.
        moved: the twins of the same boards, in which the red frame stands around another cell, with
            another digit.

    Returns:
        Samples whose region is the red cell; `meta` says which cell is "marked" and which
        "distractor" (blue), and where the red frame of the other twin stands ("other").
    """
    if n < 0 or seed < 0:
        raise CorelensError(
            f"n={n}, seed={seed}",
            "whole numbers from 0",
            "ask for a number and seed that are not negative",
        )
    boards = []
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        digits = rng.permutation(np.arange(CELLS) % 10).tolist()
        first, distractor, *rest = rng.permutation(CELLS).tolist()
        second = next(cell for cell in rest if digits[cell] != digits[first])
        marked, other = (second, first) if moved else (first, second)
        boards.append(
            Sample(
                images=[board(digits, marked, distractor)],
                question=QUESTION,
                answer=str(digits[marked]),
                regions=[box(marked)],
                id=f"board-{seed}-{number}{':moved' if moved else ''}",
                meta={"marked": marked, "distractor": distractor, "other": other, "digits": digits},
            )
        )
    return boards
