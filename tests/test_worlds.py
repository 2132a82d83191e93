"""The worlds doc, video and refer-hard: their descriptions have one answer, their pictures show
what they describe."""

import hashlib
import importlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest

import corelens as cl
from corelens.data import load_samples, save_samples
from corelens.data.synthetic import synthetic, worlds
from corelens.data.synthetic.drawing import DIGITS, LETTERS, draw_symbols
from corelens.data.synthetic.fonts import font
from corelens.data.synthetic.refer import stream
from corelens.errors import CorelensError
from helpers.families import tiny

# the package's functions hide its modules of the same name
doc, refer_hard, video = (
    importlib.import_module(f"corelens.data.synthetic.{name}")
    for name in ("doc", "refer_hard", "video")
)
NEW = ("doc", "refer-hard", "video", "compare", "hop", "emoji")
MODULES = {"doc": doc, "refer-hard": refer_hard, "video": video}


def pictures(sample):
    return [np.asarray(picture) for picture in (sample.video or sample.images)]


def options_of(sample):
    """All that a sample says, as text."""
    regions = [
        dict(region.boxes) if isinstance(region, cl.Tube) else region for region in sample.regions
    ]
    return json.dumps(
        [sample.id, sample.question, sample.answer, str(regions), sample.meta], sort_keys=True
    )


def same(a, b):
    return options_of(a) == options_of(b) and all(map(np.array_equal, pictures(a), pictures(b)))


def changed(a, b):
    """Where two pictures differ: a boolean array [height, width]."""
    return (np.asarray(a) != np.asarray(b)).any(-1)


def within(box, size):
    inside = np.zeros(size[::-1], bool)
    inside[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] = True
    return inside


# --- seeds


def test_refer_is_what_it_was():
    """Models were trained on these scenes: whatever is shared with other worlds must not change one
    of them."""
    text = "\n".join(
        options_of(sample) for sample in synthetic("refer", 20, seed=11, objects=8, jitter=8)
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "b41071a30293abf89bf6ff4a108ae6aa55ed15ab742eb32207d2fc2279c2464d"
    )


@pytest.mark.parametrize("world", NEW)
def test_same_seed_gives_the_same_samples_whatever_n(world):
    first, longer = synthetic(world, 3, seed=5), synthetic(world, 6, seed=5)
    assert all(same(a, b) for a, b in zip(first, longer, strict=False))
    assert [sample.id for sample in longer] == [f"{world}-5-{i:04d}" for i in range(6)]
    assert len({options_of(sample) for sample in longer}) == 6
    assert world in worlds()


@pytest.mark.parametrize("world", NEW)
def test_splits_and_seeds_share_no_scene(world):
    scenes = [
        json.dumps([sample.meta.get("objects"), sample.meta.get("pages")])
        for split in ("test", "train", "validation")
        for seed in range(8)
        for sample in synthetic(world, 3, seed=seed, split=split)
    ]
    assert len(set(scenes)) == len(scenes) == 72


@pytest.mark.parametrize("world", NEW)
def test_samples_survive_a_folder(world, tmp_path):
    samples = synthetic(world, 2, seed=6)
    save_samples(samples, tmp_path)
    for before, after in zip(samples, load_samples(tmp_path), strict=True):
        assert options_of(before) == options_of(after)


# --- one answer


def test_doc_has_one_answer_and_decoys():
    named = 0
    for sample in synthetic("doc", 80, seed=1):
        key, page = re.fullmatch(
            r"What is the code of (\w+)(?: on page (\d+))?\?", sample.question
        ).groups()
        asked_lines = [
            (i, line) for i, sheet in enumerate(sample.meta["pages"]) for line in sheet["lines"]
        ]
        fits = [
            (i, line)
            for i, line in asked_lines
            if line["key"] == key and page in (None, str(i + 1))
        ]
        ((where, line),), (region,) = fits, sample.regions
        assert sample.answer == line["value"] and region.text == f"{key} {line['value']}"
        assert region.image == where == sample.meta["page"] and region.bounds == line["box"]
        assert [other["value"] for _, other in asked_lines].count(sample.answer) == 1
        assert any(sheet["heading"].startswith(key) for sheet in sample.meta["pages"])
        assert (page is not None) == (sum(other["key"] == key for _, other in asked_lines) > 1)
        for sheet in sample.meta["pages"]:
            assert len({other["key"] for other in sheet["lines"]}) == len(sheet["lines"]) == 5
            boxes = [other["box"] for other in sheet["lines"]]
            assert all(a[3] <= b[1] or b[3] <= a[1] for i, a in enumerate(boxes) for b in boxes[:i])
        named += page is not None
        assert len(sample.images) == 3 and sample.meta["published"]
    assert 25 < named < 55


def test_every_line_of_a_document_can_be_asked():
    document, _ = doc.draw_document(stream("test", 3), 256, 256, pages=(2, 4), lines=(1, 6))
    questions = [
        doc.ask(document, i, j) for i, page in enumerate(document) for j in range(len(page.lines))
    ]
    assert len({query.question for query in questions}) == len(questions)
    twice = replace(document[0], lines=document[0].lines[:1] * 2)
    with pytest.raises(CorelensError, match="twice"):
        doc.ask([twice], 0, 0)


def test_video_has_one_answer_and_decoys():
    lengths = set()
    for sample in synthetic("video", 80, seed=1):
        colour, kind = re.fullmatch(
            r"What digit is shown on the (\w+) (\w+)\?", sample.question
        ).groups()
        objects = sample.meta["objects"]
        (asked,) = [o for o in objects if (o["colour"], o["kind"]) == (colour, kind)]
        others = [o for o in objects if o is not asked]
        (tube,) = sample.regions
        assert sample.answer == tube.text == asked["digit"]
        assert list(tube.boxes) == list(range(*asked["frames"]))
        assert [box.bounds for box in tube.boxes.values()] == asked["boxes"][
            slice(*asked["frames"])
        ]
        assert all(o["digit"] != asked["digit"] for o in others)
        assert any((o["colour"] == colour) != (o["kind"] == kind) for o in others)
        assert any(set(range(*o["frames"])) - set(range(*asked["frames"])) for o in others)
        assert (
            not sample.images
            and len(sample.video) == 6 == len(asked["boxes"])
            and sample.meta["published"]
        )
        lengths.add(len(tube.boxes))
    assert lengths == {2, 3}


def test_shapes_of_a_video_move_and_never_overlap():
    for number in range(10):
        scene, _ = video.draw_scene(stream("test", number), 256, 320, frames=8, speed=(4, 12))
        paths = np.array([actor.path for actor in scene.actors])  # [object, frame, 2]
        steps = np.linalg.norm(np.diff(paths, axis=1), axis=-1)
        assert steps.max() < 14 and (np.median(steps, 1) > 2.5).all()
        radii = np.array([actor.figure.radius for actor in scene.actors])
        apart = (
            np.linalg.norm(paths[:, None] - paths[None], axis=-1)
            - radii[:, None, None]
            - radii[None, :, None]
        )
        assert apart[~np.eye(len(radii), dtype=bool)].min() >= 1
        assert (paths > radii[:, None, None]).all() and (
            paths < np.array([256, 320]) - radii[:, None, None]
        ).all()


STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def solve(question, objects):
    """Indices of the objects that a question of refer-hard fits, and how near the nearest call was,
    in pixels."""
    words = r"What (?:symbol|digit|letter) is on the (?:(small|large) )?(?:(\w+) )??(\w+)"
    size, colour, kind, relation, *anchor = re.fullmatch(
        words + r"(?: (left of|right of|above|below) the (\w+) (\w+))?\?", question
    ).groups()
    fits = [
        i
        for i, o in enumerate(objects)
        if size in (None, o["size"])
        and colour in (None, o["colour"])
        and kind in ("shape", o["kind"])
    ]
    if relation is None:
        return fits, 999
    (start,) = [i for i, o in enumerate(objects) if [o["colour"], o["kind"]] == anchor]
    x, y = STEPS[relation]
    base = objects[start]
    offsets = {
        i: x * (objects[i]["x"] - base["x"]) + y * (objects[i]["y"] - base["y"])
        for i in fits
        if i != start
    }
    return [i for i, offset in offsets.items() if offset > 0], min(map(abs, offsets.values()))


def test_refer_hard_has_one_answer_and_a_distractor():
    forms, kinds, relations = [], set(), set()
    for sample in synthetic("refer-hard", 150, seed=1):
        objects, asked = sample.meta["objects"], sample.meta["asked"]
        fits, margin = solve(sample.question, objects)
        assert fits == [asked] and margin >= refer_hard.MARGIN
        assert sample.answer == objects[asked]["symbol"] == sample.regions[0].text
        assert sample.regions[0].bounds == objects[asked]["box"]
        assert [o["symbol"] for o in objects].count(sample.answer) == 1
        shorter = re.sub(
            r" (small|large)| (left of|right of|above|below) .*(?=\?)", "", sample.question
        )
        if sample.meta["form"] == "attribute":  # some other shape differs in colour or kind alone
            traits = [(o["colour"], o["kind"], o["size"]) for o in objects]
            assert any(
                sum(a == b for a, b in zip(t, traits[asked], strict=True)) == 2 for t in traits
            )
        else:  # without the size or the relation the question is ambiguous
            assert len(solve(shorter, objects)[0]) > 1 and shorter != sample.question
        assert 6 <= len(objects) <= 12 and sample.meta["published"]
        forms.append(sample.meta["form"])
        kinds.add(sample.answer.isdigit())
        relations |= set(re.findall("left|right|above|below", sample.question))
    assert min(map(forms.count, refer_hard.FORMS)) > 30
    assert kinds == {True, False} and len(relations) == 4


def test_relations_keep_their_cone():
    for sample in synthetic("refer-hard", 40, seed=2, forms=["relation"]):
        asked, anchor = (sample.meta["objects"][sample.meta[name]] for name in ("asked", "anchor"))
        along, aside = abs(asked["x"] - anchor["x"]), abs(asked["y"] - anchor["y"])
        if re.search("above|below", sample.question):
            along, aside = aside, along
        assert along >= max(refer_hard.MARGIN, aside)


@pytest.mark.parametrize("word", ["digit", "letter"])
def test_refer_hard_asks_for_the_symbols_it_draws(word):
    for sample in synthetic("refer-hard", 5, symbols=word):
        assert sample.question.startswith(f"What {word} ") and sample.answer in (
            DIGITS if word == "digit" else LETTERS
        )


def test_symbols_differ_while_there_are_enough():
    marks = draw_symbols(np.random.default_rng(0), DIGITS, 25)
    assert len(set(marks[:10])) == 10 and max(map(marks.count, DIGITS)) == 3


# --- the picture shows it, and shows it there only


def test_region_of_doc_holds_the_line_and_nothing_else_does():
    for number in range(12):
        document, (page, line) = doc.draw_document(stream("test", number), 256, 288)
        sheet, (region,) = document[page], doc.ask(document, page, line).regions
        picture, inside = doc.paint(sheet), within(region, (256, 288))
        # without the value; without the line
        for blank in ({"value": ""}, {"key": "", "value": ""}):
            page_lines = tuple(
                replace(x, **blank) if i == line else x for i, x in enumerate(sheet.lines)
            )
            ink = changed(picture, doc.paint(replace(sheet, lines=page_lines)))
            assert ink.sum() > 30 and not (ink & ~inside).any()
        # the region is tight around the line
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert max(rows[0] - region.y0, region.y1 - 1 - rows[-1]) <= 5
        assert max(columns[0] - region.x0, region.x1 - 1 - columns[-1]) <= 5
        region.check(*picture.size)


def test_region_of_refer_hard_holds_the_symbol_and_nothing_else_does():
    for number in range(12):
        scene, query = refer_hard.draw_scene(stream("test", number), 320, 352)
        figures = tuple(
            replace(f, symbol="") if i == query.asked else f for i, f in enumerate(scene.figures)
        )
        ink = changed(refer_hard.paint(scene), refer_hard.paint(replace(scene, figures=figures)))
        assert ink.sum() > 20 and not (ink & ~within(query.regions[0], (320, 352))).any()
        bare = np.asarray(refer_hard.paint(replace(scene, figures=figures)))
        # the symbol lies on its shape, all of it
        assert (bare[ink] == figures[query.asked].tint).all()


def test_tube_of_video_holds_the_digit_in_all_its_frames_and_nothing_else_does():
    for number in range(8):
        scene, asked = video.draw_scene(stream("test", number), 256, 256)
        tube = video.ask(scene, asked).regions[0]
        actor = scene.actors[asked]
        bare = replace(actor, figure=replace(actor.figure, symbol=""))
        actors = tuple(bare if i == asked else other for i, other in enumerate(scene.actors))
        frames = zip(video.paint(scene), video.paint(replace(scene, actors=actors)), strict=True)
        for number, (before, after) in enumerate(frames):
            ink = changed(before, after)
            assert (ink.sum() > 20) == (number in tube.boxes)
            if number in tube.boxes:
                assert not (ink & ~within(tube.boxes[number], (256, 256))).any()


# --- difficulty


@pytest.mark.parametrize(
    ("world", "options"),
    [
        ("doc", {"pages": 1}),
        ("doc", {"lines": 3}),
        ("doc", {"sides": (224, 224)}),
        ("doc", {"digits": 1}),
        ("doc", {"named": 0.0}),
        ("video", {"frames": 3}),
        ("video", {"objects": (1, 5)}),
        ("video", {"sides": (192, 256)}),
        ("video", {"speed": (0, 0)}),
        ("refer-hard", {"objects": 4}),
        ("refer-hard", {"sides": (288, 320)}),
    ],
)
def test_below_the_minimum_nothing_is_published(world, options):
    for sample in synthetic(world, 3, **options):
        assert sample.meta["published"] is False and sample.regions


def test_easy_settings_for_training_exist():
    assert synthetic("doc", 1, pages=1, lines=1)[0].question.endswith("?")
    assert synthetic("video", 1, frames=2, objects=1)[0].regions[0].boxes
    assert len(synthetic("doc", 1, lines=6, sides=(256, 256))[0].meta["pages"][0]["lines"]) == 6


def test_long_settings_give_thousands_of_visual_tokens():
    tokens = {world: [] for world in MODULES}
    for number in range(3):
        rng = stream("test", number)
        for world, module in MODULES.items():
            options = dict(module.LONG)
            width, height = (side // 32 for side in (options.pop("sides")[0],) * 2)
            draw = doc.draw_document if world == "doc" else module.draw_scene
            scene, _ = draw(rng, 32 * width, 32 * height, **options)
            count = len(scene) if world == "doc" else scene.frames // 2 if world == "video" else 1
            tokens[world].append(count * width * height)
    assert (
        min(tokens["doc"]) >= 4800
        and min(tokens["video"]) >= 4096
        and min(tokens["refer-hard"]) >= 2304
    )


@pytest.mark.parametrize(
    ("world", "options"),
    [
        ("doc", {"pages": 0}),
        ("doc", {"pages": 41}),
        ("doc", {"lines": 11}),
        ("doc", {"lines": (4, 2)}),
        ("doc", {"lines": 10, "sides": (256, 256)}),
        ("doc", {"sides": (64, 64)}),
        ("doc", {"sides": (96, 256)}),
        ("doc", {"digits": 5}),
        ("doc", {"named": 1.5}),
        ("doc", {"fonts": (24, 16)}),
        ("doc", {"split": "exam"}),
        ("doc", {"page": 2}),
        ("video", {"frames": 1}),
        ("video", {"frames": 257}),
        ("video", {"objects": 49}),
        ("video", {"objects": 30, "sides": (256, 256)}),
        ("video", {"span": (6, 6)}),
        ("video", {"span": (0, 2)}),
        ("video", {"speed": (5, 2)}),
        ("refer-hard", {"objects": 3}),
        ("refer-hard", {"objects": 65}),
        ("refer-hard", {"objects": 50, "sides": (320, 320)}),
        ("refer-hard", {"sides": (64, 64)}),
        ("refer-hard", {"symbols": "emoji"}),
        ("refer-hard", {"forms": []}),
        ("refer-hard", {"forms": "size"}),
        ("refer-hard", {"forms": ["size", "mood"]}),
    ],
)
def test_impossible_scenes_and_options_say_what_to_do(world, options):
    with pytest.raises(CorelensError, match="to do"):
        synthetic(world, 1, **options)


def test_a_missing_font_is_named(monkeypatch):
    monkeypatch.setattr("PIL.ImageFont.load_default", lambda size: object())
    with pytest.raises(CorelensError, match="FreeType"):
        font(77)


# --- through a model


@pytest.mark.parametrize("world", NEW)
def test_regions_become_tokens_of_a_model(world):
    model = cl.HookedMLLM(*tiny("qwen3_vl"))
    options = {"frames": 4, "objects": 4} if world == "video" else {}
    samples = synthetic(
        world, 2, seed=3, sides=(320, 320) if world == "refer-hard" else (256, 256), **options
    )
    for sample, tm in zip(samples, model.prepare(samples, answer=True).token_maps, strict=True):
        assert len(tm.regions) == len(sample.regions) and len(tm.question) and len(tm.answer)
        for positions, region in zip(tm.regions, sample.regions, strict=True):
            assert 1 <= len(positions) < len(tm.visual) / 4
            for position in positions.tolist():
                image, *cell = tm.cell(position)
                if world == "video":
                    assert any(
                        region.covered(tuple(cell), frame) > 0 for frame in tm.frames(position)
                    )
                else:
                    assert image == region.image and region.covered(tuple(cell)) > 0


# --- options that training and controls need


@pytest.mark.parametrize("world", ["refer", "refer-hard", "video", "doc"])
def test_a_turned_symbol_is_all_that_changes(world):
    for a, b in zip(synthetic(world, 3, seed=4), synthetic(world, 3, seed=4, turn=3), strict=True):
        assert a.answer != b.answer and (a.question, a.id) == (b.question, b.id)
        if world == "doc":
            values = [line["value"] for page in b.meta["pages"] for line in page["lines"]]
            assert values.count(b.answer) == 1 and a.answer not in values
        elif world == "refer-hard":
            symbols = [shape["symbol"] for shape in b.meta["objects"]]
            assert (
                symbols.count(b.answer) == 1
                and symbols[b.meta["asked"]] == b.answer == b.regions[0].text
            )
        else:
            assert int(b.answer) == (int(a.answer) + 3) % 10
        for i, (old, new) in enumerate(zip(a.video or a.images, b.video or b.images, strict=True)):
            region = a.regions[0]
            box = region.boxes.get(i) if world == "video" else region if region.image == i else None
            where = np.argwhere((np.asarray(old) != np.asarray(new)).any(-1))
            assert bool(len(where)) == (box is not None)
            if box is not None:
                assert (where >= (box.y0, box.x0)).all() and (where < (box.y1, box.x1)).all()


@pytest.mark.parametrize("objects", [8, 10, 14])
def test_a_turned_symbol_is_another_one_even_where_few_are_left(objects):
    options = {"objects": objects, "symbols": "digit", "sides": (416, 448), "seed": 3}
    for turn in (1, 2, 3):
        for a, b in zip(
            synthetic("refer-hard", 4, **options),
            synthetic("refer-hard", 4, turn=turn, **options),
            strict=True,
        ):
            assert a.answer != b.answer and b.answer in "0123456789"
            symbols = [shape["symbol"] for shape in b.meta["objects"]]
            assert symbols.count(b.answer) == 1 or set("0123456789") == {
                shape["symbol"] for shape in a.meta["objects"]
            }


def test_a_video_on_a_grid_keeps_to_it():
    centres = [
        [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in shape["boxes"]]
        for sample in synthetic("video", 6, seed=2, grid=16, speed=(8, 12))
        for shape in sample.meta["objects"]
        if shape["kind"] in ("circle", "square", "diamond", "hexagon")
    ]
    assert all(
        abs(x / 16 - round(x / 16)) < 0.1 for path in centres for point in path for x in point
    )
    assert any(len(set(path)) > 1 for path in centres)
