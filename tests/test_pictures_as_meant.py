"""What goes in is what its author saw: pictures, videos, what chats say of them, and words that
stay words."""

import io
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import corelens as cl
from corelens.demo.foreign import is_foreign
from corelens.errors import CorelensError
from corelens.inputs.pictures import Later, read_mask, read_picture
from corelens.inputs.prepare import Inputs, Sample, prepare
from corelens.inputs.reserved_words import reserved
from corelens.layouts import layout_for
from corelens.tokens.positions import check_where
from corelens.tokens.regions import Box, Mask, Tube
from helpers.families import FAMILIES, tiny

QUESTION = "What digit is on the red circle?"


def noise(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


FRAMES = [noise(64, 64, seed) for seed in range(6)]


def ready(family: str, samples, **options) -> Inputs:
    model, processor = tiny(family)
    return prepare(samples, processor, layout_for(model.config), model.config, **options)


def chat(*parts) -> Sample:
    return Sample(messages=[{"role": "user", "content": list(parts)}], id="x")


def times(inputs: Inputs, family: str = "qwen3_vl") -> list[float]:
    """The times that the processor wrote into the prompt, in seconds."""
    text = tiny(family)[1].tokenizer.decode(inputs.tensors["input_ids"][0])
    return [float(word.split(" seconds>")[0]) for word in text.split("<") if " seconds>" in word]


# --- pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_photo_is_turned_as_its_file_is(tmp_path, orientation):
    """The README's own example: Image.open(…) and the path are one picture, and a box covers the
    same pixels."""
    pixels = noise(96, 64)
    exif = pixels.getexif()
    exif[0x0112] = orientation
    path = tmp_path / "street.png"
    pixels.save(path, exif=exif)
    by_path, opened = (
        ready("qwen3_vl", Sample([opened], QUESTION, regions=[Box(0, 0, 20, 20)]))
        for opened in (path, Image.open(path))
    )
    assert opened.pictures[0][0].size == ((96, 64) if orientation < 5 else (64, 96))
    assert torch.equal(by_path.tensors["pixel_values"], opened.tensors["pixel_values"])
    assert by_path.token_maps[0].region.tolist() == opened.token_maps[0].region.tolist()


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    right = np.round(ramp / 257).astype(int)
    for picture in (tmp_path / "a.png", tmp_path / "a.tiff", Image.open(tmp_path / "a.png"), ramp):
        read = np.asarray(read_picture(picture, "it")).astype(int)
        assert abs(read[..., 0] - right).max() == 0 and (read[..., 0] == read[..., 2]).all()


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_of_unknown_range_are_refused(tmp_path, mode):
    image = Image.new(mode, (8, 8), 1)
    image.save(tmp_path / "a.tiff")
    for picture in (image, tmp_path / "a.tiff"):
        with pytest.raises(
            CorelensError,
            match="it: a picture of (32-bit integers|floating-point).*\n.*8 or 16 bits",
        ):
            read_picture(picture, "it")


def test_what_is_transparent_lies_on_white(tmp_path):
    """Black strokes on nothing are black on white, not black on black."""
    drawn = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawn.putpixel((3, 3), (0, 0, 0, 255))
    drawn.putpixel((4, 4), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((3, 3), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    for picture in (drawn, np.asarray(drawn), drawn.convert("LA")):
        read = read_picture(picture, "it")
        assert [read.getpixel(pixel) for pixel in ((0, 0), (3, 3))] == [(255, 255, 255), (0, 0, 0)]
        assert read.getpixel((4, 4)) == (127, 127, 127)
    read = read_picture(tmp_path / "p.png", "it")
    assert [read.getpixel(pixel) for pixel in ((0, 0), (3, 3))] == [(255, 255, 255), (255, 0, 0)]


def test_bombs_and_broken_masks(tmp_path, monkeypatch):
    Image.new("1", (60, 60), 1).save(tmp_path / "large.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:60])
    assert read_mask(tmp_path / "large.png", "it").all()
    with pytest.raises(CorelensError, match="it cannot be read"):
        read_mask(tmp_path / "cut.png", "it")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_picture, read_mask):
        with pytest.raises(CorelensError, match="it cannot be read.*\n.*at most 2,000 pixels"):
            read(tmp_path / "large.png", "it")


def test_a_mask_of_another_size_is_refused_before_it_is_looked_at():
    """30,000 × 30,000 pixels, of which nothing is copied: the array behind it is one row."""
    mask = np.broadcast_to(np.ones(30_000, bool), (30_000, 30_000))
    with pytest.raises(
        CorelensError, match="a mask of 30000 × 30000 pixels on a picture of 120 × 80"
    ):
        ready("qwen3_vl", Sample([noise()], QUESTION, regions=[Mask(mask)]))


def test_an_annotation_counts_in_the_picture_as_stored():
    stored = noise(96, 64)
    stored.getexif()[0x0112] = 6
    assert Later("f", "row 1", lambda: stored).read().size == (64, 96)
    assert Later("f", "row 1", lambda: stored, (64, 96)).read().size == (64, 96)
    assert Later("f", "row 1", lambda: stored, (96, 64)).read().size == (96, 64)
    with pytest.raises(CorelensError, match="96 × 64 pixels"):
        Later("f", "row 1", lambda: stored, (10, 10)).read()


# --- what a chat says


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ({"fps": 1.0}, [0.5, 2.5, 4.5]),
        ({"sample_fps": 2}, [0.2, 1.2, 2.2]),
        ({"fps": 10, "frames_indices": [0, 10, 20, 30, 40, 50]}, [0.5, 2.5, 4.5]),
        ({"raw_fps": 10, "fps": 1, "frames_indices": np.arange(0, 60, 10)}, [0.5, 2.5, 4.5]),
        (
            {"video_metadata": {"fps": 10, "frames_indices": [0, 10, 20, 30, 40, 50]}},
            [0.5, 2.5, 4.5],
        ),
        ({"fps": 1.0, "text": None, "max_pixels": None}, [0.5, 2.5, 4.5]),
    ],
)
def test_the_rate_in_a_message(said, right):
    inputs = ready("qwen3_vl", chat({"type": "video", "video": FRAMES, **said}))
    assert times(inputs) == pytest.approx(right, abs=0.06)


def test_two_videos_of_different_rates_in_one_chat():
    parts = [{"type": "video", "video": FRAMES, "fps": rate} for rate in (1.0, 0.5)]
    assert times(ready("qwen3_vl", chat(*parts))) == [0.5, 2.5, 4.5, 1.0, 5.0, 9.0]


def test_the_rate_scales_positions_where_a_family_does_so():
    slow, fast = (
        ready("qwen2_5_vl", chat({"type": "video", "video": FRAMES, "fps": f})) for f in (1.0, 4.0)
    )
    grids = [
        torch.as_tensor(inputs_.tensors["second_per_grid_ts"]).item() for inputs_ in (slow, fast)
    ]
    assert grids == [2.0, 0.5]


@pytest.mark.parametrize(
    "family", ["qwen3_vl", "qwen2_5_vl", "smolvlm", "llava_onevision", "internvl"]
)
def test_a_rate_that_matters_and_is_not_said_is_a_warning(family):
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        ready(family, Sample(video=FRAMES, question=QUESTION))
        without = [
            warning for warning in raised if "without its frame rate" in str(warning.message)
        ]
        raised.clear()
        ready(family, Sample(video=FRAMES, question=QUESTION, meta={"fps": 2.0}))
        with_rate = [
            warning for warning in raised if "without its frame rate" in str(warning.message)
        ]
    assert len(without) == (family not in ("llava_onevision", "internvl")) and not with_rate


def test_pixel_limits_in_a_message():
    picture = noise(300, 300)
    wide, narrow = (
        ready("qwen3_vl", chat({"type": "image", "image": picture, **more}))
        for more in ({}, {"max_pixels": 128 * 128})
    )
    assert (
        narrow.tensors["image_grid_thw"].prod() * 16 * 16
        <= 128 * 128
        < wide.tensors["image_grid_thw"].prod() * 256
    )
    assert len(narrow.token_maps[0].visual) == 16
    limited = {"type": "image", "image": picture, "max_pixels": 128**2}
    with pytest.raises(CorelensError, match="which has no such limits"):
        ready("llava", chat(limited))
    with pytest.raises(CorelensError, match="min_pixels=9000 and max_pixels=8000 of one image"):
        ready("qwen3_vl", chat(limited | {"min_pixels": 9000, "max_pixels": 8000}))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_each_picture_of_a_batch_has_its_own_pixel_limits(family):
    """In one chat and over the samples of a batch, each is what the processor makes of it alone."""
    factor = 2 * tiny(family)[1].image_processor.patch_size
    parts = [
        {"type": "image", "image": noise(300, 200, seed=1), "max_pixels": (4 * factor) ** 2},
        {"type": "image", "image": noise(200, 300, seed=2)},
        {"type": "image", "image": noise(40, 50, seed=3), "min_pixels": (6 * factor) ** 2},
        {
            "type": "image",
            "image": noise(90, 99, seed=4),
            "resized_height": 64,
            "resized_width": 99,
        },
    ]
    alone = [ready(family, chat(part)) for part in parts]
    together = [ready(family, chat(*parts)), ready(family, [chat(part) for part in parts])]
    for inputs in together:
        for name in ("pixel_values", "image_grid_thw"):
            expected = torch.cat([one.tensors[name] for one in alone])
            assert torch.equal(inputs.tensors[name], expected)
    images = tiny(family)[1].image_processor
    size = dict(images.size) | {"longest_edge": (4 * factor) ** 2}
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    by_hand = images(images=[parts[0]["image"]], size=size, return_tensors="pt")
    assert torch.equal(alone[0].tensors["pixel_values"], by_hand["pixel_values"])
    for row, (of_batch, single) in enumerate(zip(together[1].token_maps, alone, strict=True)):
        picture, own = of_batch.pictures[0], single.token_maps[0].pictures[0]
        assert torch.equal(picture.box, own.box), row
        tokens = together[1].tensors["input_ids"][row, of_batch.real]
        assert torch.equal(tokens, single.tensors["input_ids"][0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_pixel_limits_of_a_video_count_for_each_frame(family):
    """Videos with limits, without, and images stand in one batch, each as it is alone."""
    factor = 2 * tiny(family)[1].image_processor.patch_size
    frames = [noise(8 * factor, 4 * factor, seed) for seed in range(6)]
    limited = {"type": "video", "video": frames, "fps": 1.0, "max_pixels": 8 * factor**2}
    parts = [
        limited,
        {"type": "video", "video": FRAMES, "fps": 2.0},
        {"type": "image", "image": noise()},
    ]
    alone = [ready(family, chat(part)) for part in parts]
    steps, rows, columns = alone[0].tensors["video_grid_thw"][0].tolist()
    assert (steps, rows, columns) == (3, 4, 8)  # 2 × 4 tokens a step
    resized = [f.resize((4 * factor, 2 * factor), Image.Resampling.BICUBIC) for f in frames]
    processor = tiny(family)[1].video_processor
    by_hand = processor(
        videos=[np.stack([np.asarray(frame) for frame in resized])], do_resize=False,
        do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(alone[0].tensors["pixel_values_videos"], by_hand["pixel_values_videos"])
    inputs = ready(family, [chat(part) for part in parts])
    for name in ("pixel_values_videos", "video_grid_thw"):
        expected = torch.cat([one.tensors[name] for one in alone[:2]])
        assert torch.equal(inputs.tensors[name], expected)
    assert torch.equal(inputs.tensors["pixel_values"], alone[2].tensors["pixel_values"])
    tube = Sample(messages=chat(limited).messages, regions=[Tube({0: Box(0, 0, factor, factor)})])
    token_map = ready(family, tube).token_maps[0]
    assert len(token_map.region) == 1 and token_map.cell(int(token_map.region[0]))[1:] == (
        0, 0, 2 * factor, 2 * factor
    )  # fmt: skip


@pytest.mark.parametrize(
    "family", ["qwen3_vl", "internvl", "llava", "llava_next", "gemma3", "idefics3"]
)
def test_a_size_in_a_message_and_regions_in_the_original(family):
    """The processor sees the resized picture, cells and regions stay in pixels of the original."""
    picture, size = noise(400, 200), {"resized_height": 128, "resized_width": 192}
    inputs = ready(family, chat({"type": "image", "image": picture, **size}))
    resized = ready(
        family,
        chat({"type": "image", "image": picture.resize((192, 128), Image.Resampling.BICUBIC)}),
    )
    assert torch.equal(inputs.tensors["pixel_values"], resized.tensors["pixel_values"])
    assert inputs.pictures[0][0].size == (400, 200)
    scale = torch.tensor([400 / 192, 200 / 128] * 2)
    box, seen = (inputs_.token_maps[0].pictures[0].box for inputs_ in (inputs, resized))
    assert (
        torch.allclose(box, seen * scale.to(seen), atol=1e-3) and float(box.max()) > 290
    )  # (the border may be cropped away)


def test_two_images_of_one_chat_each_at_its_size():
    parts = [
        {
            "type": "image",
            "image": noise(100, 100),
            "resized_height": 32 * n,
            "resized_width": 64 * n,
        }
        for n in (2, 3)
    ]
    assert ready("qwen3_vl", chat(*parts)).tensors["image_grid_thw"].tolist() == [
        [1, 4, 8],
        [1, 6, 12],
    ]


def video(**options):
    return chat({"type": "video", "video": FRAMES, **options})


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (video(nframes=4), "sample 'x', video 0: its message says nframes=4, which is not used"),
        (video(total_pixels=1000), "total_pixels=1000, which is not used"),
        (video(max_pixels=-1), "max_pixels=-1"),
        (video(fps=0), "fps=0"),
        (video(fps="two"), "fps='two'"),
        (video(fps=float("nan")), "fps=nan"),
        (video(fps=1, sample_fps=2), "fps=1.0 and sample_fps=2.0"),
        (video(raw_fps=30), "raw_fps=30.0 alone"),
        (video(frames_indices=[0, 1, 2, 3, 4, 5]), "frames_indices without the frame rate"),
        (video(frames_indices=[0, 1, 2], fps=1), "3 frames_indices for 6 frames"),
        (video(frames_indices=[5, 4, 3, 2, 1, 0], fps=1), "ascending whole numbers"),
        (video(resized_height=64), "resized_width=None"),
        (Sample(video=FRAMES, question="?", meta={"fps": -1}), "meta..fps.*=-1"),
        (
            chat({"type": "image", "image": noise(), "detail": "high"}),
            "image 0: its message says detail='high'",
        ),
        (chat({"type": "image", "image": noise(), "max_pixels": 1.5}), "max_pixels=1.5"),
        (
            chat({"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}),
            "a part of type 'image_url'",
        ),
    ],
)
def test_refused_words(sample, message):
    with pytest.raises(CorelensError, match=message):
        ready("qwen3_vl", sample)


# --- words that stay words


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_typed_stays_text(family):
    """Every word that this processor or its tokenizer would take for more than its letters is
    refused by name."""
    processor = tiny(family)[1]
    words = reserved(processor)
    assert words and any(words.values()), "placeholders are among them"
    for word, place in words.items():
        for sample in (
            Sample([noise()], f"What is {word} here?", id="x"),
            Sample([noise()], QUESTION, choices=["a", word], id="x"),
        ):
            with pytest.raises(CorelensError, match="sample 'x': its text holds") as refused:
                ready(family, sample)
            assert ("pictures are put before the question" in refused.value.do) == any(
                words[other] for other in words if other in word and len(other) == len(word)
            )
        assert isinstance(place, bool)


def test_typed_in_a_chat():
    for role in ("system", "user"):
        messages = [
            {"role": role, "content": [{"type": "text", "text": "be brief<|im_end|>"}]},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ]
        with pytest.raises(
            CorelensError,
            match="its text holds '<.im_end.>', which this model's tokenizer reads as",
        ):
            ready("qwen3_vl", Sample(messages=messages))


# --- regions


@pytest.mark.parametrize(
    "regions",
    [
        (12, 4, 76, 60),
        [12, 4, 76, 60],
        [[12, 4, 76, 60]],
        [(12.0, 4.0, 76.0, 60.0)],
        np.array([12, 4, 76, 60]),
        torch.tensor([[12, 4, 76, 60]]),
        Box(12, 4, 76, 60),
    ],
    ids=lambda regions: type(regions).__name__,
)
def test_four_numbers_are_a_box(regions):
    assert Sample([noise()], QUESTION, regions=regions).regions == [Box(12, 4, 76, 60)]


def test_regions_are_read_whenever_they_are_put_in():
    sample = Sample([noise()], QUESTION)
    sample.regions = (12, 4, 76, 60)
    assert sample.regions == [Box(12, 4, 76, 60)]
    sample.regions.append([0, 0, 9, 9])
    sample.regions += [(1, 1, 9, 9)]
    sample.regions.extend([(2, 2, 9, 9)])
    sample.regions.insert(0, (3, 3, 9, 9))
    sample.regions[1] = [4, 4, 9, 9]
    sample.regions[2:3] = [(5, 5, 9, 9)]
    assert sample.regions == [Box(n, n, 9, 9) for n in (3, 4, 5, 1, 2)]
    assert len(ready("qwen3_vl", sample).token_maps[0].regions) == 5
    copied = pickle.loads(pickle.dumps(sample))
    assert copied.regions == sample.regions == replace(sample, answer="7").regions
    for put in (
        lambda: setattr(sample, "regions", ["left"]),
        lambda: setattr(sample, "regions", 7),
        lambda: sample.regions.append({"box": [1, 2, 3, 4]}),
        lambda: sample.regions.__setitem__(0, (1, 2, 3)),
    ):
        with pytest.raises(CorelensError, match="region"):
            put()
    assert len(sample.regions) == 5


def test_regions_that_are_none():
    assert Sample([noise()], QUESTION, regions=None).regions == []
    for regions, message in (
        (["left"], "the region 'left', a str"),
        ([(1, 2, 3)], "the region"),
        ([{"box": [1, 2, 3, 4]}], "a dict"),
        ([np.ones((4, 4), bool)], "the region"),
        ([("a", 1, 2, 3)], "the region"),
        ((76, 4, 12, 60), "is empty"),
    ):
        with pytest.raises(CorelensError, match=message):
            Sample([noise()], QUESTION, regions=regions)


def test_a_tube_lies_in_its_own_frames():
    with pytest.raises(CorelensError, match="a tube in video 0, with a box on image 7 in frame 0"):
        Tube({0: Box(0, 0, 9, 9, image=7)})
    assert Tube({0: Box(0, 0, 9, 9, image=1)}, image=1).boxes[0].image == 1
    assert Tube({0: (0, 0, 9, 9)}).boxes == {0: Box(0, 0, 9, 9)}
    for boxes, message in (
        ({True: Box(0, 0, 9, 9)}, "the frame True"),
        ({}, "a tube without frames"),
    ):
        with pytest.raises(CorelensError, match=message):
            Tube(boxes)
    for wrong in (
        lambda: Box(0, 0, float("inf"), 9),
        lambda: Box(float("nan"), 0, 9, 9),
        lambda: Box(0, 0, 9, 9, image=True),
    ):
        with pytest.raises(CorelensError):
            wrong()


def test_pictures_after_one_of_unknown_geometry_are_still_their_own():
    """A sample whose video has no geometry here must not hand its image's place to the next
    sample's region."""
    model, processor = tiny("qwen3_vl")
    layout = layout_for(model.config)

    class WithoutVideos(type(layout)):
        def video_cells(self, *_):
            raise CorelensError("a video", "images", "leave it out")

    mixed = chat(
        {"type": "video", "video": FRAMES, "fps": 1}, {"type": "image", "image": noise(64, 64)}
    )
    region = Box(0, 0, 200, 64)
    other = Sample([noise(256, 64)], QUESTION, regions=[region])
    batch = prepare([mixed, other], processor, WithoutVideos(), model.config)
    alone = prepare(other, processor, layout, model.config)
    first = batch.length - alone.length
    assert (batch.token_maps[1].region - first).tolist() == alone.token_maps[0].region.tolist()


# --- names of views and positions


@pytest.mark.parametrize(
    "family", ["internvl", "idefics3", "smolvlm", "llava_next", "llava_onevision"]
)
def test_thumbnail_and_tiles_are_names(family):
    """The thumbnail covers the picture, tiles cover their parts of it, and together they are all
    visual tokens."""
    width, height = 333, 517
    tm = ready(family, Sample([noise(width, height)], QUESTION)).token_maps[0]
    views = tm.pictures[0].views
    tiles = sorted(set(views.tolist()) - {-1})
    assert len(tiles) > 1 and -1 in views.tolist()
    thumbnail = tm.positions("thumbnail")
    cells = torch.tensor([tm.cell(int(position))[1:] for position in thumbnail])
    assert (
        cells[:, :2].min() <= 1
        and cells[:, 2].max() > 0.9 * width
        and cells[:, 3].max() > 0.9 * height
    )
    parts = [tm.positions(f"tile:{tile}") for tile in tiles]
    assert sorted(torch.cat([thumbnail, *parts]).tolist()) == tm.visual.tolist()
    assert torch.equal(
        tm.positions(f"tile:{tiles[0]}+tile:{tiles[1]}"), torch.cat(parts[:2]).sort().values
    )
    middles = [torch.tensor([tm.cell(int(position))[1:] for position in part]) for part in parts]
    boxes = [(c[:, 0].min(), c[:, 1].min(), c[:, 2].max(), c[:, 3].max()) for c in middles]
    # tiles lie beside one another, but for a pooled token on their common edge
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            across = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(
                0, min(a[3], b[3]) - max(a[1], b[1])
            )
            assert across < 0.25 * width * height / len(tiles)
    with pytest.raises(CorelensError, match="'tile:99' of a sample.*\n.*thumbnail, tile:0"):
        tm.positions("tile:99")


def test_pan_and_scan_has_a_thumbnail():
    options = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 40,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    tm = ready("gemma3", Sample([noise(400, 100)], QUESTION), images_kwargs=options).token_maps[0]
    assert len(tm.positions("thumbnail")) == len(tm.positions("tile:0")) > 0
    assert tm.cell(int(tm.positions("tile:0")[0]))[1:3] == (0.0, 0.0)


def test_a_family_without_views():
    tm = ready("qwen3_vl", Sample([noise()], QUESTION)).token_maps[0]
    with pytest.raises(
        CorelensError, match="'thumbnail' of a sample.*\n.*shows a picture in several views"
    ):
        tm.positions("thumbnail")


def test_an_edge_edit_by_the_name_of_a_view():
    model, processor = tiny("internvl")
    hooked = cl.HookedMLLM(model, processor)
    inputs = hooked.prepare(Sample([noise(333, 517)], QUESTION))
    tm = inputs.token_maps[0]
    with torch.no_grad():
        by_name = hooked.run_with_hooks(
            inputs, fwd_hooks=cl.knockout(None, rows="last", columns="thumbnail")
        )
        by_number = hooked.run_with_hooks(
            inputs, fwd_hooks=cl.knockout(None, rows="last", columns=tm.positions("thumbnail"))
        )
        assert torch.equal(by_name, by_number) and not torch.equal(by_name, hooked(inputs))


@pytest.mark.parametrize(
    "make",
    [
        lambda where: cl.knockout(None, rows=where),
        lambda where: cl.knockout(None, columns=where),
        lambda where: cl.edge_bias([(0, 0)], rows=where, value=1.0),
        lambda where: cl.ablate([(0, 0)], positions=where),
        lambda where: cl.patch("hook_embed", {"hook_embed": torch.zeros(1)}, positions=where),
        lambda where: cl.record_ram(rows=where),
        lambda where: cl.metric("ram", rows=where),
    ],
)
def test_words_are_checked_when_the_hook_is_made(make):
    with pytest.raises(CorelensError, match="did you mean 'question'"):
        make("last+questoin")
    make("question+last")


def test_positions_that_are_none():
    for where in (
        torch.tensor([0.5]),
        torch.tensor([True, False]),
        -1,
        [3, -1],
        "image:x",
        "tile",
        "thumbnail:1",
    ):
        with pytest.raises(CorelensError, match="positions"):
            check_where(where)
    for where in (
        3,
        [3, 4],
        [],
        torch.tensor([[3, -1]]),
        "image:1",
        "tile:0",
        "thumbnail",
        "frame:3+last",
    ):
        check_where(where)


# --- runners


@pytest.fixture(scope="module")
def cropping():
    """A model whose processor crops the border away, three samples that it can see, and one whose
    region it cannot."""
    model, processor = tiny("llava")
    samples = [
        Sample([noise(300, 100)], QUESTION, "7", [box], id=f"sample-{number}")
        for number, box in enumerate(
            [Box(140, 40, 160, 60), Box(0, 0, 20, 20), Box(130, 40, 150, 60), Box(145, 9, 150, 60)]
        )
    ]
    return cl.HookedMLLM(model, processor), samples


def test_a_runner_skips_what_a_crop_removes(cropping, tmp_path):
    model, samples = cropping
    good = [samples[0], *samples[2:]]
    with pytest.raises(CorelensError, match="sample 'sample-1'.*covers no visual token"):
        model.prepare(samples)
    with pytest.raises(CorelensError, match="sample-1"):
        cl.score_heads(model, samples)
    with pytest.warns(
        UserWarning, match=r"1 of 4 samples are left out \(sample-1\).*covers no visual token"
    ):
        scores = cl.score_heads(model, samples, on_error="skip", out=tmp_path / "run")["ram"]
    assert scores.meta["samples"] == [sample.id for sample in good] and list(
        scores.meta["skipped"]
    ) == ["sample-1"]
    assert np.array_equal(scores.per_sample, cl.score_heads(model, good)["ram"].per_sample)
    with pytest.raises(CorelensError, match="sample-1"):
        cl.evaluate(model, samples)
    with pytest.warns(UserWarning, match="1 of 4 samples are left out"):
        evaluation = cl.evaluate(model, samples, on_error="skip")
    assert [answer.id for answer in evaluation.per_sample] == [sample.id for sample in good]
    assert list(evaluation.meta["skipped"]) == ["sample-1"]


def test_samples_are_prepared_once_though_wrong_ones_are_skipped(cropping, tmp_path, monkeypatch):
    """Only a batch in which a sample is wrong is looked at sample by sample; a resumed run skips the
    same."""
    model, samples = cropping
    prepared, real = [], model.prepare

    def counting(batch, **options):
        batch = [batch] if isinstance(batch, Sample) else batch
        prepared.extend(sample.id for sample in batch)
        return real(batch, **options)

    monkeypatch.setattr(model, "prepare", counting)
    good = [samples[0], *samples[2:]]
    for run in (cl.score_heads, cl.evaluate):
        run(model, good, batch_size=2, on_error="skip")
        assert sorted(prepared) == [sample.id for sample in good]
        prepared.clear()
        with pytest.warns(UserWarning, match="1 of 4 samples are left out"):
            run(model, samples, batch_size=2, on_error="skip")
        assert {id: prepared.count(id) for id in set(prepared)} == {
            "sample-0": 3, "sample-1": 2, "sample-2": 1, "sample-3": 1
        }  # fmt: skip
        prepared.clear()
    options = {"batch_size": 2, "on_error": "skip", "out": tmp_path}
    for again in (False, True):
        prepared.clear()
        with pytest.warns(UserWarning, match=r"1 of 4 samples are left out \(sample-1\)"):
            scores = cl.score_heads(model, samples, **options)["ram"]
        assert not again or not prepared  # the folder keeps the reason, too
        assert scores.meta["samples"] == [sample.id for sample in good]
    lacking = [samples[0], Sample(samples[0].images, QUESTION, "7", id="bare")]
    with pytest.warns(UserWarning, match=r"left out \(bare\).*without a region"):
        assert cl.score_heads(model, lacking, on_error="skip")["ram"].meta["samples"] == [
            "sample-0"
        ]


def test_a_runner_with_nothing_left(cropping):
    model, samples = cropping
    with pytest.raises(
        CorelensError, match="1 samples, none of which can be used; sample 'sample-1'"
    ):
        cl.score_heads(model, samples[1:2], on_error="skip")


# --- folders, worlds, demo models


def test_paths_that_leave_the_folder(tmp_path):
    noise().save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    noise().save(folder / "own.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png"):
        line = f'{{"images": ["{name}"], "question": "?", "regions": [{{"mask": "own.png"}}]}}'
        (folder / "samples.jsonl").write_text(line)
        with pytest.raises(
            CorelensError, match="line 1, field 'images.0.': .*secret.png', which leaves the folder"
        ):
            cl.data.load_samples(folder)
        with pytest.raises(CorelensError, match="leaves the folder"):
            cl.data.load_data(folder)
    (folder / "samples.jsonl").write_text('{"images": ["../secret.png"], "question": "?"}')
    assert (
        len(cl.data.load_samples(folder, outside=True))
        == len(cl.data.load_data(f"{folder}:outside=true"))
        == 1
    )
    (folder / "samples.jsonl").write_text(
        '{"images": ["own.png"], "question": "?", "regions": [{"mask": "../secret.png"}]}'
    )
    with pytest.raises(CorelensError, match="field 'regions.0..mask'.*leaves the folder"):
        cl.data.load_samples(folder)


def test_a_turned_photo_is_saved_as_it_is_seen(tmp_path):
    pixels = noise(96, 64)
    exif = pixels.getexif()
    exif[0x0112] = 6
    pixels.save(tmp_path / "a.png", exif=exif)
    sample = Sample([Image.open(tmp_path / "a.png")], QUESTION, regions=[Box(0, 80, 60, 96)])
    cl.data.save_samples([sample], tmp_path / "kept")
    assert read_picture(cl.data.load_samples(tmp_path / "kept")[0].images[0], "").size == (64, 96)


@pytest.mark.parametrize("world", ["refer", "refer-hard", "doc", "video"])
def test_samples_have_ids_by_themselves(world):
    assert [sample.id for sample in cl.synthetic(world, n=2, seed=1)] == [
        f"{world}-1-0000",
        f"{world}-1-0001",
    ]


def test_a_demo_model_says_once_that_it_knows_drawn_scenes_only(tmp_path):
    model = cl.load_demo("qwen3vl-s")
    scene = cl.synthetic("refer", n=1, seed=1)[0]
    scene.images[0].save(tmp_path / "scene.jpg", quality=90)
    grain = Image.fromarray(
        np.random.default_rng(0).normal(128, 9, (256, 256, 3)).clip(0, 255).astype(np.uint8)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(
            [scene, Sample(scene.images, QUESTION), Sample(tmp_path / "scene.jpg", QUESTION)]
        )
    with pytest.warns(UserWarning, match="only knows drawn scenes of refer"):
        model.prepare(Sample(grain, QUESTION))
    model.warned = False
    with pytest.warns(UserWarning, match="only knows drawn scenes of refer"):
        model.prepare(cl.synthetic("emoji", n=1, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.prepare(Sample(grain, QUESTION))


def test_a_photograph_is_told_from_what_is_drawn():
    from matplotlib import cbook

    assert is_foreign(Image.open(cbook.get_sample_data("grace_hopper.jpg")))
    for world in ("refer", "refer-hard", "compare", "hop", "doc"):
        for quality in (None, 75, 95):
            assert not any(
                is_foreign(saved(read_picture(page, ""), quality))
                for s in cl.synthetic(world, 3, seed=2)
                for page in s.images
            )
    assert all(is_foreign(s.images[0]) for s in cl.synthetic("emoji", 4, seed=2))


@pytest.mark.parametrize(
    ("white", "gradient", "grain", "quality"),
    [(245, 12, 1, 90), (252, 6, 0.3, 75), (240, 14, 0, 95), (254, 3, 1, 90), (255, 0, 0, None)],
)
def test_a_flat_near_white_photograph_is_none_that_is_drawn(white, gradient, grain, quality):
    """Most of its pixels equal their neighbours, as in a drawn scene; but nothing in it has an
    edge."""
    slope = gradient * np.linspace(0, 1, 400)[None, :, None]
    noise = np.random.default_rng(0).normal(0, grain, (300, 400, 3))
    paper = Image.fromarray((white + slope + noise).clip(0, 255).round().astype(np.uint8))
    pixels = np.asarray(saved(paper, quality))
    assert (pixels[:, 1:] == pixels[:, :-1]).all(-1).mean() > 0.8
    assert is_foreign(saved(paper, quality))


def saved(picture, quality):
    """The picture as it comes back from a JPEG file; itself without a quality."""
    if quality is None:
        return picture
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_show_names_a_picture_that_is_not_there():
    from typer.testing import CliRunner

    from corelens.cli.app import app

    for line in (["show", "nothere.png"], ["show", "nothere.png", "What?"]):
        raised = CliRunner().invoke(app, line).exception
        assert isinstance(raised, CorelensError) and "there is no such file: 'nothere.png'" in str(
            raised
        )
