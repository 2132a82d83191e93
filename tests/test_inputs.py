"""Samples to batches: the question found exactly, answers appended, batches like single rows, and
what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs, Sample, prepare
from corelens.inputs.tensors import check_has_media, from_tensors
from corelens.layouts import layout_for
from corelens.tokens.regions import Box, Mask, Tube
from corelens.tokens.token_map import TokenMap
from helpers.families import FAMILIES, tiny

QUESTION = "What digit is on the red circle?"


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


FRAMES = [picture(64, 64, seed) for seed in range(4)]


def ready(family: str, samples, **options) -> Inputs:
    model, processor = tiny(family)
    return prepare(samples, processor, layout_for(model.config), model.config, **options)


def read(family: str, inputs: Inputs, positions: torch.Tensor, row: int = 0) -> str:
    return tiny(family)[1].tokenizer.decode(inputs.tensors["input_ids"][row, positions])


# --- the question


@pytest.mark.parametrize(
    "text", [QUESTION, "Où est l'œuf — 日本語 🙂?", "a", '{{ 1 }} <b> 100% \\n "x"', "is"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_question_is_found(family, text):
    """Its tokens cover its characters; tokens may stick out at its ends only."""
    inputs = ready(family, Sample(images=[picture(), picture(60, 90)], question=text))
    question = inputs.token_maps[0].question
    read_text = read(family, inputs, question)
    assert text in read_text and len(read_text) <= len(text) + 2
    assert text not in read(family, inputs, question[1:]) and text not in read(
        family, inputs, question[:-1]
    )
    assert torch.equal(question, torch.arange(int(question[0]), int(question[-1]) + 1))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_the_question_is_told_from_the_same_words_elsewhere(family):
    def text(words):
        return {"type": "text", "text": words}

    messages = [
        {"role": "system", "content": [text(f"{QUESTION} is asked often.")]},
        {"role": "user", "content": [{"type": "image", "image": picture()}, text(QUESTION)]},
        {"role": "assistant", "content": [text(f"{QUESTION} 7.")]},
        {"role": "user", "content": [text(QUESTION)]},
    ]
    # its template has roles of its own; a system turn renders like any other here
    if family == "gemma3":
        messages[0]["role"] = "user"
    inputs = ready(family, Sample(messages=messages, choices=[QUESTION, "none"]))
    tm = inputs.token_maps[0]
    before = read(family, inputs, torch.arange(tm.start, int(tm.question[0])))
    after = read(family, inputs, torch.arange(int(tm.question[-1]) + 1, tm.stop))
    assert QUESTION in read(family, inputs, tm.question)
    assert before.count(QUESTION) == 3 and after.count(QUESTION) == 1
    assert f"\nA. {QUESTION}\nB. none" in after


def test_a_question_that_names_a_part_of_the_turn():
    instruction = {"type": "text", "text": "Answer in one word: "}
    image = {"type": "image", "image": picture()}
    whole = {
        "role": "user",
        "content": [image, {"type": "text", "text": f"Look. {QUESTION} Be brief."}],
    }
    parts = {"role": "user", "content": [image, instruction, {"type": "text", "text": QUESTION}]}
    for message in (whole, parts, {"role": "user", "content": f"Look. {QUESTION} Be brief."}):
        inputs = ready("qwen3_vl", Sample(messages=[message], question=QUESTION))
        assert read("qwen3_vl", inputs, inputs.token_maps[0].question).strip() == QUESTION
    with pytest.raises(CorelensError, match="0 times"):
        ready("qwen3_vl", Sample(messages=[whole], question="Which digit?"))
    with pytest.raises(CorelensError, match="2 times"):
        ready("qwen3_vl", Sample(messages=[whole], question="e "))


def test_all_text_of_the_last_turn_is_the_question_of_messages():
    content = [
        {"type": "text", "text": "Here: "},
        {"type": "image", "image": picture()},
        {"type": "text", "text": "Which?"},
    ]
    inputs = ready(
        "qwen3_vl", Sample(messages=[{"role": "user", "content": content}], choices=["x", "y"])
    )
    tm = inputs.token_maps[0]
    read_text = read("qwen3_vl", inputs, tm.question)
    assert read_text.startswith("Here:") and read_text.endswith("Which?")
    assert tm.question[0] < tm.visual[0] < tm.question[-1]


def test_white_space_that_the_template_strips():
    """Gemma's template trims text; the rows are those of the words."""
    inputs = ready("gemma3", Sample(images=[picture()], question=f"  {QUESTION}\n\n"))
    assert read("gemma3", inputs, inputs.token_maps[0].question).strip() == QUESTION


def test_without_a_question():
    tm = ready("qwen3_vl", Sample(images=[picture()], id="x")).token_maps[0]
    with pytest.raises(CorelensError, match="sample 'x' without question"):
        _ = tm.question


# --- the row


@pytest.mark.parametrize("family", FAMILIES)
def test_as_the_processor_itself_would(family):
    """The same tensors as the ordinary path: apply_chat_template(tokenize=True), and so BOS once
    where there is one."""
    _, processor = tiny(family)
    image = picture(100, 70)
    inputs = ready(family, Sample(images=[image], question=QUESTION))
    if processor.chat_template is None:
        plain = processor(text=f"<image>{QUESTION}", images=[image], return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
        plain = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    plain = {name: value for name, value in plain.items() if name not in ("labels", "num_crops")}
    assert set(plain) == set(inputs.tensors)
    for name, value in plain.items():
        assert torch.equal(value, inputs.tensors[name]), name
    bos = processor.tokenizer.bos_token_id
    assert bos is None or (inputs.tensors["input_ids"] == bos).sum() == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer(family):
    sample = Sample(images=[picture()], question=QUESTION, answer="a blue star")
    without, inputs = ready(family, sample), ready(family, sample, answer=True)
    tm, prompt = inputs.token_maps[0], without.length
    assert torch.equal(inputs.tensors["input_ids"][:, :prompt], without.tensors["input_ids"])
    assert read(family, inputs, tm.answer).strip() == "a blue star"
    assert tm.answer.tolist() == list(range(prompt, inputs.length))
    assert tm.last.tolist() == without.token_maps[0].last.tolist() == [prompt - 1]
    assert tm.positions("answer", rows=True).tolist() == list(range(prompt - 1, inputs.length - 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_forced_answer_is_predicted_as_in_generation(family):
    """The prompt's rows do not see the answer, and its rows give what decoding step by step
    gives."""
    model, processor = tiny(family)
    sample = Sample([picture()], QUESTION, "a blue star")
    prompt, inputs = ready(family, sample), ready(family, sample, answer=True)
    tm = inputs.token_maps[0]
    special = {
        *processor.tokenizer.all_special_ids,
        *layout_for(model.config).placeholders(model.config),
    }
    never, count = sorted(special - {-1}), len(tm.answer)
    with torch.no_grad():
        options = {
            "max_new_tokens": count,
            "min_new_tokens": count,
            "do_sample": False,
            "suppress_tokens": never,
        }
        new = model.generate(**prompt.tensors, **options)[0, -count:]
        inputs.tensors["input_ids"][0, tm.answer] = new
        logits, before = (model(**made.tensors).logits[0] for made in (inputs, prompt))
    assert torch.allclose(logits[: prompt.length], before, atol=1e-5)
    rows = logits[tm.positions("answer", rows=True)]
    rows[:, never] = -torch.inf
    assert rows.argmax(-1).tolist() == new.tolist()


def test_images_and_a_video_in_one_chat():
    frames = [picture(64, 64, seed) for seed in range(4)]
    content = [
        {"type": "video", "video": frames},
        {"type": "image"},
        {"type": "text", "text": "Which?"},
    ]
    regions = [Tube({3: Box(0, 0, 10, 10)}), Box(0, 0, 10, 10)]
    sample = Sample([picture()], messages=[{"role": "user", "content": content}], regions=regions)
    tm = ready("qwen3_vl", sample).token_maps[0]
    image, video = tm.images  # images come first, whatever stands first in the prompt
    assert video.max() < image.min() and tm.cell(int(image[0]))[0] == 0
    assert set(tm.regions[0].tolist()) < set(video.tolist()) and set(tm.regions[1].tolist()) < set(
        image.tolist()
    )


def test_to_and_len():
    inputs = ready("qwen3_vl", [Sample([picture()], QUESTION), Sample([picture()], "Is it?")])
    half = inputs.to("cpu", dtype=torch.bfloat16)
    assert len(half) == 2 and half.length == inputs.length == inputs.tensors["input_ids"].shape[1]
    assert (
        half.tensors["pixel_values"].dtype == torch.bfloat16
        and half.tensors["input_ids"].dtype == torch.long
    )
    assert inputs.tensors["pixel_values"].dtype == torch.float32


def test_region_weights():
    sample = Sample([picture(128, 96)], QUESTION, regions=[Box(0, 0, 48, 32)])
    tm = ready("qwen3_vl", sample, region_weights="fraction").token_maps[0]
    assert tm.region_weights[0].tolist() == [1, 0.5]


def test_paths_arrays_and_modes(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    grey = image.convert("L")
    images = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        np.asarray(image),
        image.convert("RGBA"),
        grey,
        np.asarray(grey),
    ]
    tensors = [
        ready("qwen3_vl", Sample([image], QUESTION)).tensors["pixel_values"] for image in images
    ]
    for image in tensors[:4]:
        assert torch.equal(image, tensors[0])
    assert torch.equal(tensors[4], tensors[5])


def test_a_file_is_turned_upright(tmp_path):
    image = picture(96, 64)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    inputs = ready(
        "qwen3_vl", Sample([tmp_path / "turned.png"], QUESTION, regions=[Box(0, 90, 60, 96)])
    )
    assert inputs.pictures[0][0].size == (64, 96)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next", "internvl"])
def test_show(family):
    sample = Sample(
        [picture(), picture(60, 90)],
        QUESTION,
        regions=[Box(5, 5, 30, 30), Mask(np.ones((90, 60), bool), 1)],
    )
    figure = ready(family, sample).show()
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    assert (
        sum("image 0" in title for title in titles) >= 1
        and sum("image 1" in title for title in titles) >= 1
    )


def test_show_a_video():
    sample = Sample(
        video=[picture(64, 64, s) for s in range(5)],
        question="Which?",
        regions=[Tube({1: Box(0, 0, 9, 9)})],
    )
    assert len([ax for ax in ready("qwen3_vl", sample).show().axes if ax.axison]) == 5


# --- tensors made by hand


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [True, False])
def test_visual_means_the_same_for_tensors_made_by_hand(family, options):
    """Patches, without newlines and separators: with the processor's options, or with the config's
    alone."""
    model, processor = tiny(family)
    layout = layout_for(model.config)
    batches = [[Sample([picture(300, 90)], QUESTION)]]
    batches += [
        [Sample([picture(40, 200), picture(64, 64)], QUESTION), Sample([picture()], QUESTION)]
    ]
    if getattr(processor, "video_processor", None) is not None and family.startswith("llava"):
        batches += [[Sample(video=[picture(60, 60, k) for k in range(4)], question=QUESTION)]]
    for samples in batches:
        made = prepare(samples, processor, layout, model.config)
        inputs = from_tensors(made.tensors, layout, model.config, processor if options else None)
        for tm, known in zip(inputs.token_maps, made.token_maps, strict=True):
            for name in ("visual", "text", "all", "last"):
                assert torch.equal(tm.positions(name), known.positions(name)), name
            assert torch.equal(tm.placeholder, known.placeholder)
    if "image_sizes" in made.tensors:
        with pytest.raises(CorelensError, match="image_sizes"):
            rest = {name: x for name, x in made.tensors.items() if name != "image_sizes"}
            from_tensors(rest, layout, model.config, processor)


def test_from_tensors():
    model, _ = tiny("qwen3_vl")
    made = ready("qwen3_vl", [Sample([picture()], QUESTION), Sample([picture(64, 64)], "Is it?")])
    inputs = from_tensors(made.tensors, layout_for(model.config), model.config)
    for tm, known in zip(inputs.token_maps, made.token_maps, strict=True):
        for name in ("visual", "last", "text", "all"):
            assert torch.equal(tm.positions(name), known.positions(name))
        for name in ("region", "question", "answer", "image:0"):
            with pytest.raises(CorelensError, match="inputs made of tensors"):
                tm.positions(name)
    with pytest.raises(CorelensError):
        inputs.show()
    with pytest.raises(CorelensError, match="input_ids"):
        from_tensors({"pixel_values": torch.zeros(1)}, layout_for(model.config), model.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_image_tokens_without_an_image_are_refused(family):
    model, _ = tiny(family)
    layout = layout_for(model.config)
    tensors = ready(family, Sample([picture()], QUESTION)).tensors
    check_has_media(tensors, layout, model.config)
    text = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(CorelensError, match="image tokens in input_ids and no image"):
        check_has_media(text, layout, model.config)
    with pytest.raises(CorelensError, match="image tokens"):
        from_tensors(text, layout, model.config)
    check_has_media({"input_ids": torch.full((1, 4), 20)}, layout, model.config)
    check_has_media({**text, "inputs_embeds": torch.zeros(1)}, layout, model.config)


# --- refusals


def turn(*content, role: str = "user"):
    return {"role": role, "content": list(content)}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            Sample([picture()], QUESTION, regions=[Box(100, 60, 140, 70)], id="x"),
            "sample 'x': .*outside its picture of 120 × 80",
        ),
        (
            Sample([picture()], QUESTION, regions=[Box(0, 0, 9, 9, image=1)]),
            "on image 1; the sample has 1 images",
        ),
        (Sample([picture()], QUESTION, regions=[Box(0, 0, 9, 9, image=-1)]), "on image -1"),
        (Sample([picture()], QUESTION, regions=[Tube({0: Box(0, 0, 9, 9)})]), "Tube on video 0"),
        (Sample(video=FRAMES, question=QUESTION, regions=[Box(0, 0, 9, 9)]), "Box on image 0"),
        (
            Sample(video=FRAMES, question=QUESTION, regions=[Tube({4: Box(0, 0, 9, 9)})]),
            "video of 4 frames",
        ),
        (
            Sample([picture()], QUESTION, regions=[Mask(np.ones((120, 80), bool))]),
            "80 × 120 pixels on a picture",
        ),
        (Sample(["nowhere.png"], QUESTION), "there is no such file: .nowhere.png"),
        (Sample(["http://example.org/a.png"], QUESTION), "is the address"),
        (Sample([np.zeros((5, 5))], QUESTION), "float64"),
        (Sample([picture(4001, 10)], QUESTION), "refused the batch.*aspect ratio"),
        (Sample(video=[picture(64, 64), picture(32, 64)], question=QUESTION), "frames of sizes"),
        (Sample(video=[], question=QUESTION), "a list of frames"),
        (
            Sample([picture()], "<|image_pad|>?"),
            "its text holds .<.image_pad.>.*replaces by a picture",
        ),
        (
            Sample([picture()], QUESTION, messages=[turn({"type": "text", "text": "a"})]),
            "2 more|1 more pictures",
        ),
        (Sample(messages=[turn({"type": "image"})]), "no image left"),
        (Sample(messages=[turn(role="assistant")]), "end with the assistant"),
        (Sample(messages=[turn(role="system")]), "without a user's turn"),
        (Sample([picture()], QUESTION, choices=["c"] * 27), "27 choices"),
        (Sample([picture()], QUESTION, "<|video_pad|>"), "image tokens in the answer"),
    ],
)
def test_refused_samples(sample, message):
    with pytest.raises(CorelensError, match=message):
        ready("qwen3_vl", sample, answer=sample.answer is not None)


def test_a_broken_file(tmp_path):
    whole = tmp_path / "whole.png"
    picture().save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("cut.png", "text.png"):
        with pytest.raises(CorelensError, match="sample 'x', image 1 cannot be read"):
            ready("qwen3_vl", Sample([picture(), tmp_path / name], QUESTION, id="x"))


def test_a_region_that_is_cropped_away():
    with pytest.raises(CorelensError, match=r"sample 'x': Box .* covers no visual token"):
        ready("llava", Sample([picture(300, 100)], QUESTION, regions=[Box(0, 0, 20, 20)], id="x"))


def test_a_picture_beyond_the_limit():
    """Qwen's limit here is 256 tokens of 32 × 32 pixels: the message says what became of the
    picture."""
    with pytest.warns(UserWarning, match="800 × 600 pixels is beyond .* shrunk to 576 × 416"):
        ready("qwen3_vl", Sample([picture(800, 600)], QUESTION))


@pytest.mark.parametrize("family", ["llava", "gemma3", "paligemma"])
def test_a_video_for_a_family_that_takes_none(family):
    with pytest.raises(CorelensError, match="takes none"):
        ready(family, Sample(video=FRAMES, question=QUESTION))


def test_other_refusals():
    model, processor = tiny("qwen3_vl")
    layout = layout_for(model.config)
    with pytest.raises(CorelensError, match="without a processor"):
        prepare(Sample([picture()], QUESTION), None, layout, model.config)
    with pytest.raises(CorelensError, match="to prepare"):
        prepare([], processor, layout, model.config)
    with pytest.raises(CorelensError, match="sample 'x' without an answer"):
        ready("qwen3_vl", Sample([picture()], QUESTION, id="x"), answer=True)
    with pytest.raises(CorelensError, match="without a chat template"):
        ready("paligemma", Sample(messages=[turn(), turn()]))


def test_a_question_before_its_image():
    content = [{"type": "text", "text": QUESTION}, {"type": "image", "image": picture()}]
    tm = ready(
        "qwen3_vl", Sample(messages=[turn(*content)], regions=[Box(0, 0, 20, 20)], id="x")
    ).token_maps[0]
    assert isinstance(tm, TokenMap) and tm.question.max() < tm.visual.min()
    with pytest.raises(
        CorelensError, match=r"sample 'x': the question rows .* before the evidence"
    ):
        tm.evidence_rows("question")
    assert len(tm.evidence_rows("last")) == 1
