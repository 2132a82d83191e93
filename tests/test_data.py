"""The synthetic worlds: determinism, exact regions, difficulty, errors."""

import numpy as np
import pytest

from corelens.data.synthetic import synthetic, worlds
from corelens.data.synthetic.refer import COLOURS, MINIMUM
from corelens.errors import CorelensError


def same(a, b) -> bool:
    pictures = np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0]))
    return pictures and (a.question, a.answer, a.regions, a.id) == (
        b.question,
        b.answer,
        b.regions,
        b.id,
    )


def test_same_seed_gives_the_same_samples_whatever_n():
    first, again, longer = (
        synthetic("refer", 3, seed=5),
        synthetic("refer", 3, seed=5),
        synthetic("refer", 6, seed=5),
    )
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert all(same(a, b) for a, b in zip(first, longer, strict=False))
    assert not same(first[0], first[1])
    assert len({sample.id for sample in longer}) == 6


def test_seeds_and_splits_differ():
    pictures = [
        np.asarray(synthetic("refer", 1, seed=seed, split=split, sides=(256, 256))[0].images[0])
        for seed in (0, 1)
        for split in ("test", "train", "validation")
    ]
    assert all(not np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_default_scenes_are_of_the_published_difficulty():
    sizes = set()
    for sample in synthetic("refer", 40, seed=2):
        objects, asked = sample.meta["objects"], sample.meta["objects"][sample.meta["asked"]]
        names = [(o["colour"], o["kind"]) for o in objects]
        assert len(objects) >= MINIMUM["objects"] and len(set(names)) == len(names)
        assert any(
            (o["colour"] == asked["colour"]) != (o["kind"] == asked["kind"]) for o in objects
        )
        assert sample.question == f"What digit is on the {asked['colour']} {asked['kind']}?"
        assert sample.answer == str(asked["digit"]) and sample.meta["published"]
        assert min(sample.images[0].size) >= MINIMUM["side"]
        assert all(side % 32 == 0 for side in sample.images[0].size)
        sizes.add(sample.images[0].size)
    assert len(sizes) > 4
    assert not synthetic("refer", 1, objects=3)[0].meta["published"]


def test_few_colours_make_twins():
    for sample in synthetic("refer", 10, colours=2):
        assert len({o["colour"] for o in sample.meta["objects"]}) <= 2


def test_question_order_and_answers_are_balanced():
    samples = synthetic("refer", 300, seed=3)
    assert max(np.bincount([int(s.answer) for s in samples])) < 60
    assert max(np.bincount([s.meta["asked"] for s in samples], minlength=6)) < 170


@pytest.mark.parametrize("jitter", [0, 8])
def test_region_is_where_the_shape_is_and_nowhere_else(jitter):
    for sample in synthetic("refer", 20, seed=4, jitter=jitter):
        (box,) = sample.regions
        box.check(*sample.images[0].size)
        assert box.text == sample.answer
        asked = sample.meta["objects"][sample.meta["asked"]]
        pixels = np.asarray(sample.images[0]).astype(int)
        near = np.abs(pixels - COLOURS[asked["colour"]]).max(-1) <= 14
        inside = np.zeros_like(near)
        inside[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
        assert near[inside].mean() > 0.25
        ink = (pixels.max(-1) < 40) | (pixels.min(-1) > 225)  # the digit itself, black or white
        assert (ink & inside).sum() > 20
        for other in sample.meta["objects"]:
            x0, y0, x1, y1 = (int(x) for x in other["box"])
            if other is not asked:
                assert not inside[(y0 + y1) // 2, (x0 + x1) // 2]
        tight = inside & near  # the box is tight: the shape's colour reaches all four of its edges
        rows, columns = np.flatnonzero(tight.any(1)), np.flatnonzero(tight.any(0))
        edges = (
            columns[0] - box.x0,
            rows[0] - box.y0,
            box.x1 - 1 - columns[-1],
            box.y1 - 1 - rows[-1],
        )
        assert max(edges) <= 2


def test_centres_lie_on_the_patch_grid_unless_jittered():
    def centres(**options):
        boxes = [
            o["box"]
            for s in synthetic("refer", 5, **options)
            for o in s.meta["objects"]
            if o["kind"] == "circle"
        ]
        return [((x0 + x1) / 2 % 16, (y0 + y1) / 2 % 16) for x0, y0, x1, y1 in boxes]

    def off(x):
        return min(x, 16 - x)

    assert all(off(x) <= 1 and off(y) <= 1 for x, y in centres())
    assert any(off(x) > 3 for x, _ in centres(jitter=8))


@pytest.mark.parametrize(
    "options",
    [
        {"objects": 40, "sides": (256, 256)},
        {"objects": 49},
        {"objects": 0},
        {"sides": (32, 32)},
        {"sides": (320, 256)},
        {"split": "exam"},
        {"objects": 7, "colours": 1},
        {"colours": 9},
        {"colour": "red"},
    ],
)
def test_impossible_scenes_and_options_say_what_to_do(options):
    with pytest.raises(CorelensError, match="to do"):
        synthetic("refer", 1, **options)


def test_unknown_world_names_the_known_ones():
    with pytest.raises(CorelensError, match="refer"):
        synthetic("reefer", 1)
    assert "refer" in worlds()
    with pytest.raises(CorelensError):
        synthetic("refer", 1, seed=-1)
