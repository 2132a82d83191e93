"""The demo models: processor, training that resumes exactly, checkpoints that are checked, answers
that are right."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import corelens as cl
from corelens.cli.opening import check_model
from corelens.data.synthetic import synthetic
from corelens.data.synthetic.refer import COLOURS, KINDS, Scene, Shape, draw_scene
from corelens.data.synthetic.video import LONG
from corelens.demo import (
    CHECKPOINTS,
    DEFAULT,
    ELSEWHERE,
    NOT_KEPT,
    REPOSITORY,
    checkpoint,
    list_demos,
    load_demo,
    read_card,
)
from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample, prepare
from corelens.layouts import layout_for
from training.answered import answer_sheet, save_answers
from training.batches import (
    Plan,
    draw_batch,
    picture_tokens,
    question_chat,
    tokenize,
    video_pads,
)
from training.build import PRESETS, build_model, build_processor
from training.curve import training_curve
from training.dense import IGNORED, shape_labels
from training.export import _by_form, _hide_anchor, export_demo, model_card
from training.families import patches_of
from training.fast import fast_training
from training.heldout import accuracy, wilson
from training.mixes import in_turn
from training.recipes import RECIPES, Check, Recipe, Slice, as_dict, from_dict, plan_step, tuples
from training.train import train_demo

NAME = "qwen3vl-s"
HOPS = ("qwen3vl-hop-s", "qwen3vl-hop", "qwen3vl-hop-l")
EARLY = {"smol-vlm", *HOPS, "qwen3vl-q-compare", "qwen3vl-s-video"}
"""Checkpoints that answer less, or were stopped early, as their cards say; they have tests of their
own."""


@pytest.fixture(scope="module")
def processor():
    return build_processor(NAME)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(NAME, processor).eval()


def prompt(processor, samples):
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}]
        for s in samples
    ]
    texts = [
        processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    return processor(
        text=texts, images=[s.images for s in samples], return_tensors="pt", padding=True
    )


@pytest.mark.parametrize(
    "text", ["What digit is on the red circle?", "Größe — 42 点\n\n\ttab", "<|im_start|>user\n", ""]
)
def test_any_text_round_trips_and_offsets_cover_it(processor, text):
    tokenizer = processor.tokenizer
    coded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(coded["input_ids"]) == text
    covered = set()
    for start, end in coded["offset_mapping"]:
        covered |= set(range(start, end))
    assert covered == set(range(len(text)))


def test_bundled_processor_is_the_one_that_the_code_builds(processor):
    bundled = AutoProcessor.from_pretrained(checkpoint(NAME), local_files_only=True)
    assert bundled.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert bundled.tokenizer.chat_template == processor.chat_template
    for part in ("image_processor", "video_processor"):
        assert getattr(bundled, part).to_dict() == getattr(processor, part).to_dict()


def test_words_of_the_worlds_and_digits_are_single_tokens(processor):
    tokens = processor.tokenizer.tokenize("What digit is on the red circle? 17")
    assert tokens == ["What", "Ġdigit", "Ġis", "Ġon", "Ġthe", "Ġred", "Ġcircle", "?", "Ġ", "1", "7"]


def test_chat_template_takes_system_images_and_video(processor):
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "7"}]},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]},
    ]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image}{image}Which?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>\n"
        f"<|im_start|>user\n{video}When?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pictures_are_not_resized_and_videos_run(processor, model):
    sample = synthetic("refer", 1, sides=(256, 256))[0]
    inputs = prompt(processor, [sample])
    assert inputs["image_grid_thw"].tolist() == [[1, 16, 16]]
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 64
    chat = [
        {
            "role": "user",
            "content": [{"type": "video"}, {"type": "text", "text": "What digit is shown?"}],
        }
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    frames = [np.asarray(sample.images[0])] * 4
    video = processor(text=[text], videos=[frames], return_tensors="pt", do_sample_frames=False)
    with torch.inference_mode():
        assert model(**video).logits.shape[1] == video["input_ids"].shape[1]
    assert (video["input_ids"] == model.config.video_token_id).sum() == 2 * 64


def test_long_videos_are_not_shrunk(processor):
    (sample,) = synthetic("video", 1, **LONG)
    frames, (width, height) = len(sample.video), sample.video[0].size
    grid = processor(
        text=["<|video_pad|>"], videos=[np.stack(sample.video)], do_sample_frames=False
    )["video_grid_thw"]
    assert np.array(grid).tolist() == [[frames // 2, height // 16, width // 16]]


def test_training_sequences_begin_with_the_prompt_that_users_give(processor):
    samples = synthetic("refer", 1, sides=(256, 256))
    batch = draw_batch(
        Plan(NAME, "questions", seed=0, step=3, batch=2, objects=3, sides=(160, 160))
    )
    spoken = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert all(text.count("<|im_end|>") == 3 and text[0].isdigit() for text in spoken)
    assert batch["answers"].sum(1).tolist() == [3, 3]

    colour, kind = samples[0].question.rstrip("?").split()[-2:]
    scene = Scene(
        samples[0].images[0], [Shape(colour, kind, int(samples[0].answer), 64, 64, 30)], asked=0
    )
    chat = question_chat(scene, np.random.default_rng(0), 1)
    ours = tokenize(processor, [chat], picture_tokens(NAME, 256, 256)[0])["input_ids"][0].tolist()
    theirs = prompt(processor, samples)["input_ids"][0].tolist()
    assert ours[: len(theirs)] == theirs
    assert processor.tokenizer.decode(ours[len(theirs) :]) == f"{samples[0].answer}<|im_end|>\n"


def test_dense_labels_name_the_object_at_a_token():
    scene = draw_scene(np.random.default_rng(0), 192, 160, 2)
    labels = shape_labels(scene.shapes, picture_tokens(NAME, 192, 160)[1]).reshape(5, 6, -1)[
        ..., :3
    ]
    for shape in scene.shapes:
        row, column = int(shape.y - 1) // 32, int(shape.x - 1) // 32
        expected = [list(COLOURS).index(shape.colour), KINDS.index(shape.kind), shape.digit]
        assert labels[row, column].tolist() == expected
    assert (labels == [len(COLOURS), len(KINDS), 10]).all(-1).sum() >= 30 - 2 * 4


def test_fast_training_computes_what_transformers_computes(processor, model):
    samples = synthetic("refer", 2, sides=(256, 256), seed=9)
    inputs = prompt(processor, samples)
    images = torch.from_numpy(np.stack([np.asarray(s.images[0]) for s in samples]))
    assert torch.allclose(
        patches_of(images),
        inputs["pixel_values"].view(-1, 3, 2, 256)[:, :, 1].flatten(1),
        atol=1e-6,
    )
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    with torch.no_grad():
        slow = model(**inputs).logits
        with fast_training(model):
            quick = model(
                input_ids=inputs["input_ids"],
                pixel_values=patches_of(images),
                image_grid_thw=inputs["image_grid_thw"],
                position_ids=positions,
                use_cache=False,
            ).logits
        assert (slow - quick).abs().max() < 1e-5
        assert torch.equal(slow, model(**inputs).logits)


def test_fast_training_computes_what_transformers_computes_on_videos(processor, model):
    samples = synthetic("video", 2, sides=(256, 256), grid=16)
    inputs = prepare(samples[:1], processor, layout_for(model.config), model.config).tensors
    clip = torch.from_numpy(np.stack([[np.asarray(frame) for frame in samples[0].video]]))
    assert torch.allclose(patches_of(clip), inputs["pixel_values_videos"], atol=1e-6)
    ids = inputs["input_ids"]
    ours = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "video"}, {"type": "text", "text": samples[0].question}],
            }
        ],
        tokenize=False,
        add_generation_prompt=True,
    )
    for placeholder, tokens in video_pads(6, 256, 256).items():
        ours = ours.replace(placeholder, tokens)
    assert processor.tokenizer(ours)["input_ids"] == ids[0].tolist()
    grid, kinds = inputs["video_grid_thw"], inputs["mm_token_type_ids"]
    positions, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=grid)
    with torch.no_grad():
        slow = model(**inputs).logits
        with fast_training(model):
            quick = model(
                input_ids=ids,
                pixel_values_videos=patches_of(clip),
                video_grid_thw=grid,
                position_ids=positions,
            ).logits
    assert (slow - quick).abs().max() < 1e-5


def test_a_mix_adds_long_slices_later_and_draws_only_scenes_that_exist(tmp_path):
    recipe = RECIPES["qwen3vl-s-long"]
    progress = {"name": NAME, "seed": 0, "level": 2, "skipped": 0}
    early = {plan_step(step, progress, recipe).sides for step in range(60)}
    late = [plan_step(step, progress, recipe) for step in range(500, 700)]
    assert early == {part.sides for part in recipe.mix if not part.joins}
    assert {plan.sides for plan in late} == {part.sides for part in recipe.mix}
    assert all(
        plan.objects <= 6 * plan.colours and plan.objects <= plan.sides[0] ** 2 // 8000
        for plan in late
    )
    assert any(plan.colours <= 3 for plan in late) and any(plan.form == "caption" for plan in late)


def test_training_goes_on_from_a_bundled_model(tmp_path):
    mix = (
        Slice(0.5, 2, (160, 192), (1, 2), captions=0.5),
        Slice(0.5, 2, (160, 192), (2, 2), world="video", frames=(2, 4)),
    )
    checks = (
        Check(2, {"sides": (128, 160), "objects": 2}),
        Check(2, {"frames": 4, "grid": 16}, "video"),
    )
    recipe = Recipe(
        start=NAME, stage_a=0, stage_b=4, check_every=2, mix=mix, checks=checks, rate=0.0
    )
    run = train_demo(NAME, out=tmp_path, recipe=recipe)
    began, ended = (
        load_file(checkpoint(NAME) / "model.safetensors"),
        load_file(run / "best.safetensors"),
    )
    assert all(torch.equal(began[key].float(), ended[key]) for key in ended)
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    judged = [line for line in log if line["form"] == "validation"]
    assert [line["step"] for line in judged] == [2, 4] and judged[0]["accuracy"] == sum(
        judged[0]["each"]
    ) / 2


@pytest.mark.parametrize("needed", [0.0, 1.1])
def test_a_model_that_retrieves_skips_the_rest_of_the_steps_for_it(tmp_path, monkeypatch, needed):
    """Six steps, four of them at most for retrieval: two are enough where every model passes."""
    monkeypatch.setattr("training.train.RETRIEVES", needed)
    hops = Slice(1.0, 1, (256, 256), (6, 6), world="hop", forms=("kind",))
    mix = in_turn(((Slice(1.0, 1, (128, 160), (1, 1)),), 4), ((hops,), 0))
    recipe = Recipe(
        start=NAME,
        stage_a=0,
        stage_b=6,
        ahead=3,
        check_every=2,
        retrieval=4,
        first_steps=needed == 0.0,
        mix=mix,
        checks=(Check(1, {}),),
    )
    run = train_demo(NAME, out=tmp_path, recipe=recipe)
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    trained = [line for line in log if line["form"] != "validation"]
    checked = [line["step"] for line in log if line["form"] == "validation"]
    assert checked == ([2, 4] if needed == 0.0 else [2, 4, 6])
    assert trained[-1]["world"] == "hop" and trained[-1]["step"] == checked[-1]
    assert ("found" in trained[-1]) == recipe.first_steps


def test_a_recipe_survives_a_card():
    for recipe in RECIPES.values():
        assert from_dict(json.loads(json.dumps(as_dict(recipe)))) == recipe


@pytest.mark.parametrize("muon", [0.0, 5.0])
def test_training_resumes_to_the_same_weights(tmp_path, muon):
    recipe = Recipe(
        stage_a=2, stage_b=2, batch=2, last_batch=2, check_every=2, check_scenes=0, muon=muon
    )
    whole = train_demo(NAME, out=tmp_path / "whole", recipe=recipe)
    for stop in (1, 3, None):
        parts = train_demo(NAME, out=tmp_path / "parts", recipe=recipe, stop_after=stop)
    a, b = load_file(whole / "state.safetensors"), load_file(parts / "state.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    (parts / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CorelensError, match="resume=False"):
        train_demo(NAME, out=parts, recipe=recipe)


def test_export_writes_what_the_loader_accepts(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "training.export.synthetic", lambda *of, **o: drawn.append(o["seed"]) or synthetic(*of, **o)
    )
    checks = (Check(2, {}), Check(1, {"forms": ("relation",)}, "refer-hard"))
    recipe = Recipe(
        stage_a=1, stage_b=1, batch=2, last_batch=2, check_every=1, first_level=4, checks=checks
    )
    run = train_demo(NAME, out=tmp_path / "run", recipe=recipe)
    card = export_demo(run, machine="a test", n=4, root=tmp_path, test_seed=7)
    control, related = card["controls"]
    assert related["anchor_hidden"]["n"] == 4 and "anchor_hidden" not in control
    assert (
        control["n"] == 4
        and 0 <= control["blank"] <= 1
        and control["follows"] + control["stays"] <= 1
    )
    assert checkpoint(NAME, tmp_path) == tmp_path / NAME
    assert (
        json.loads(json.dumps(card)) == read_card(NAME, tmp_path) and card["training"]["steps"] == 2
    )
    page = (tmp_path / NAME / "README.md").read_text()
    assert "4 |" in page and "seed=7" in page and "](training.png)" in page
    with Image.open(tmp_path / NAME / "training.png") as picture:
        assert min(picture.size) > 300 and len(picture.getcolors() or []) > 10
    assert {row["seed"] for row in card["held_out"] if row["split"] == "test"} == {7}
    # a check's scenes, and its controls' as they are and turned
    assert set(drawn) == {7} and len(drawn) == 2 * (1 + 2)


def test_the_curve_tells_forms_apart_and_breaks_where_a_form_paused():
    log = [
        {"step": 10 * i, "form": "dense" if i < 30 else "questions", "loss": 1.0 / (1 + i)}
        for i in range(60)
    ]
    log += [line | {"step": 2000 + line["step"]} for line in log if line["form"] == "questions"]
    log += [
        {"step": s, "form": "validation", "accuracy": 0.5, "each": [0.2, 0.8][: s // 100]}
        for s in (100, 200)
    ]
    log += [{"step": 300, "form": "validation", "accuracy": 0.7}]  # of one world alone
    above, below = training_curve(log, ["refer", "doc"]).axes
    curves = [line for line in above.lines if line.get_linestyle() == "-" and len(line.get_xdata())]
    assert [line.get_label()[:5] for line in curves] == ["dense", "_chil", "quest"]
    assert [len(line.get_xdata()) for line in curves] == [30, 30, 30]
    # the median of nine falling numbers is the fifth
    assert curves[0].get_ydata()[10] == log[10]["loss"]
    accuracies = {line.get_label(): list(line.get_ydata()) for line in below.lines}
    assert accuracies == {"refer": [0.2], "doc": [0.8], "mean": [0.5, 0.5, 0.7]}


def test_a_card_tells_the_forms_of_question_apart():
    samples = synthetic("refer-hard", 30)
    forms = _by_form(samples, [sample.meta["form"] == "relation" for sample in samples])["forms"]
    assert {form: part["accuracy"] for form, part in forms.items()} == {
        "attribute": 0,
        "relation": 1,
        "size": 0,
    }
    assert sum(part["n"] for part in forms.values()) == 30
    assert not _by_form(synthetic("refer", 3), [True] * 3)
    card = read_card(NAME)
    card["held_out"][-1]["forms"] = forms
    assert f"| | of these: relation | test | {forms['relation']['n']} | 100.0 % |" in model_card(
        card
    )


def test_a_card_tells_what_is_right_without_the_anchor():
    (sample,) = synthetic("refer-hard", 1, forms=("relation",))
    x0, y0, x1, y1 = (round(side) for side in sample.meta["objects"][sample.meta["anchor"]]["box"])
    before, after = (
        np.asarray(shown.images[0]).astype(int) for shown in (sample, _hide_anchor(sample))
    )
    assert (after[y0 + 1 : y1, x0 + 1 : x1] == 128).all()
    after[y0 - 1 : y1 + 2, x0 - 1 : x1 + 2] = before[y0 - 1 : y1 + 2, x0 - 1 : x1 + 2]
    assert (after == before).all()
    card = read_card(NAME)
    assert "anchor" not in model_card(card)
    card["controls"][-1]["anchor_hidden"] = {"n": 8, "accuracy": 0.25, "ci95": [0.07, 0.59]}
    assert "25.0 % (7.0–59.0)" in model_card(card)


def test_a_tower_may_be_a_bundled_ones_stays_as_it_is_and_is_stored_once(tmp_path):
    checks = (Check(1, {"sides": (128, 160), "objects": 2}),)
    recipe = replace(
        RECIPES["qwen3vl-l"],
        stage_b=2,
        batch=2,
        ahead=1,
        first_level=4,
        check_every=2,
        checks=checks,
    )
    run = train_demo("qwen3vl-l", out=tmp_path, recipe=recipe)
    owner = checkpoint(recipe.start_tower)
    bundled = dict(load_demo(recipe.start_tower).hf.named_parameters())
    learned = load_file(run / "best.safetensors")
    tower = {name for name in bundled if name.startswith("model.visual.")}
    assert len(tower) > 50 and all(torch.equal(learned[name], bundled[name]) for name in tower)
    moved = "model.language_model.layers.0.self_attn.o_proj.weight"
    before = (
        train_demo("qwen3vl-l", out=tmp_path / "first", recipe=recipe, stop_after=1)
        / "state.safetensors"
    )
    assert not torch.equal(learned[moved], load_file(before)[f"weight/model.{moved}"])

    shutil.copytree(owner, tmp_path / "zoo" / owner.name)
    card = export_demo(run, machine="a test", n=1, root=tmp_path / "zoo")
    folder = checkpoint("qwen3vl-l", tmp_path / "zoo")
    assert (
        f"../{owner.name}/tower.safetensors" in card["sha256"]
        and not (folder / "model.safetensors").exists()
    )
    opened = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", local_files_only=True
    )
    stored = getattr(torch, card["stored_dtype"])
    for name, weight in opened.named_parameters():
        assert torch.equal(weight, learned[name].to(stored).float())
    (folder / f"../{owner.name}/tower.safetensors").unlink()
    with pytest.raises(CorelensError, match="missing"):
        checkpoint("qwen3vl-l", tmp_path / "zoo")


def test_a_tower_in_the_wheel_is_begun_with_too_and_the_model_is_stored_whole(tmp_path):
    """InternVL's files name weights otherwise than its modules do."""
    checks = (Check(1, {"sides": (256, 256), "objects": 2}),)
    shown = {"stage_b": 1, "batch": 1, "ahead": 1, "check_every": 1, "checks": checks}
    recipe = replace(RECIPES["internvl-q"], **shown, first_level=4)
    run = train_demo("internvl-q", out=tmp_path, recipe=recipe)
    bundled = dict(load_demo("internvl-q").hf.named_parameters())
    learned = load_file(run / "best.safetensors")
    tower = [name for name in bundled if "vision_tower" in name or "multi_modal" in name]
    assert len(tower) > 50
    assert all(torch.equal(learned[name], bundled[name]) for name in tower)
    export_demo(run, machine="a test", n=1, root=tmp_path / "zoo")
    assert (tmp_path / "zoo" / "internvl-q" / "model.safetensors").exists()


def test_unknown_model_and_changed_files_are_refused(tmp_path):
    with pytest.raises(CorelensError, match=NAME):
        checkpoint("qwen9")
    with pytest.raises(CorelensError, match=NAME):
        build_processor("qwen9")
    shutil.copytree(checkpoint(NAME), tmp_path / NAME)
    weights = tmp_path / NAME / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CorelensError, match="python -m training"):
        checkpoint(NAME, tmp_path)
    weights.unlink()
    with pytest.raises(CorelensError, match="missing"):
        checkpoint(NAME, tmp_path)


def options(row):
    """A card's options, as the world takes them."""
    return tuples(row.get("options", {}))


def test_the_video_model_answers_at_two_thousand_tokens():
    model = cl.load_demo("qwen3vl-s-video")
    samples = synthetic("video", 3, seed=77, frames=32, objects=4, sides=(320, 320))
    assert len(model.prepare(samples[0]).token_maps[0].visual) == 1600
    assert cl.evaluate(model, samples).accuracy >= 2 / 3
    assert all(row["accuracy"] >= 0.8 for row in read_card("qwen3vl-s-video")["held_out"])


def test_a_model_answers_questions_about_two_things():
    model, card = cl.load_demo("qwen3vl-q-compare"), read_card("qwen3vl-q-compare")
    samples = synthetic("compare", 24, seed=77, objects=6)
    assert cl.evaluate(model, samples).accuracy >= 0.6
    assert cl.evaluate(model, synthetic("refer", 12, seed=77)).accuracy >= 0.8
    tests = {row["world"]: row["accuracy"] for row in card["held_out"] if row["split"] == "test"}
    assert tests["refer"] >= 0.95 and tests["compare"] >= 0.8


@pytest.mark.parametrize("name", HOPS)
def test_a_model_goes_by_way_of_another_shape(name):
    """And guesses where that one is hidden, or shares its colour, not its kind, with the asked."""
    model, card = cl.load_demo(name), read_card(name)
    samples = synthetic("hop", 24, seed=77, forms=("kind",))
    hidden = synthetic("hop", 24, seed=77, forms=("kind",), hide=True)
    assert cl.evaluate(model, samples).accuracy >= 0.9
    assert cl.evaluate(model, hidden).accuracy <= 0.4
    assert cl.where_read(model, samples[:15], tokens=False).rows == "question"
    tests = {
        row.get("options", {}).get("forms", ["refer"])[0]: row["accuracy"]
        for row in card["held_out"]
        if row["split"] == "test"
    }
    assert tests["refer"] >= 0.95 and tests["kind"] >= 0.95 and tests["colour"] <= 0.3


@pytest.mark.parametrize("name", sorted({*list_demos()} - EARLY))
def test_bundled_model_answers_fresh_scenes(name):
    folder = checkpoint(name)
    net = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", local_files_only=True
    ).eval()
    processor, card = AutoProcessor.from_pretrained(folder, local_files_only=True), read_card(name)
    tests = [row for row in card["held_out"] if row["split"] == "test"]
    least = 0.95 if card["architecture"].startswith("Qwen") else 0.85
    assert (
        accuracy(net, processor, synthetic("refer", 12, seed=77, **options(tests[0])))
        >= least - 0.15
    )
    text = net.config.text_config
    assert (card["layers"], card["heads"]) == (text.num_hidden_layers, text.num_attention_heads)
    assert (
        tests[0]["accuracy"] >= least
        and tests[0]["n"] == 1000
        and all(row["n"] >= 60 for row in tests)
    )
    for row in tests[1:]:
        assert row["accuracy"] >= (least if row["world"] == "refer-hard" else 0.9)
        assert accuracy(net, processor, synthetic(row["world"], 4, seed=77, **options(row))) >= 0.75
    for row in card["controls"]:
        assert row["blank"] < 0.25 and row["follows"] >= least - 0.1 and row["stays"] < 0.1
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] >= card["training"]["steps"]


def test_the_answer_sheet_shows_wrong_answers_first_and_at_most_half(monkeypatch):
    shown = []
    blank = Image.new("RGB", (8, 8))
    monkeypatch.setattr(
        "training.answered.contact_sheet",
        lambda x: shown.append([f"{s.id}: {s.answer}" for s in x]) or blank,
    )
    samples = [Sample(question="?", answer="7", id=str(i)) for i in range(6)]
    answer_sheet(samples, list("777771"), shown=4)
    answer_sheet(samples, list("123456"), shown=4)
    assert shown == [
        ["5: 7, said: 1", "0: 7, right", "1: 7, right", "2: 7, right"],
        ["0: 7, said: 1", "1: 7, said: 2"],
    ]


def test_the_answer_sheet_is_of_the_card_s_test_scenes(tmp_path, monkeypatch):
    rows = [
        {"world": "refer", "split": "validation"},
        {"world": "refer", "split": "test", "seed": 7},
    ]
    monkeypatch.setattr("training.answered.read_card", lambda name: {"held_out": rows})
    shown = []
    monkeypatch.setattr(
        "training.answered.contact_sheet",
        lambda x, **o: shown.extend(x) or Image.new("RGB", (8, 8)),
    )
    (file,) = save_answers(NAME, tmp_path, n=2)
    assert file.name == f"answers-{NAME}-refer.png" and file.exists()
    assert {s.question for s in shown} == {s.question for s in synthetic("refer", 2, seed=7)}


def test_load_demo_wraps_the_readme_s_model_where_no_name_is_given():
    assert DEFAULT in list_demos() and DEFAULT in PRESETS
    wrapped = load_demo()
    assert next(wrapped.hf.parameters()).dtype == torch.float32
    assert wrapped.cfg.n_layers == read_card(DEFAULT)["layers"]


def test_models_of_the_repository_are_listed_in_a_checkout_and_named_by_the_error_elsewhere(
    tmp_path, monkeypatch
):
    assert set(ELSEWHERE) == {path.parent.name for path in REPOSITORY.glob("*/card.json")}
    assert set(ELSEWHERE) < set(list_demos()) and checkpoint("qwen3vl-m").parent == REPOSITORY
    monkeypatch.setattr("corelens.demo.REPOSITORY", tmp_path)
    assert not set(ELSEWHERE) & set(list_demos()) and DEFAULT in list_demos()
    for name in ELSEWHERE:
        for opens in (load_demo, check_model):  # in Python, and on the command line
            with pytest.raises(
                CorelensError, match="it lies in the repository, in training/models"
            ):
                opens(name)


@pytest.mark.parametrize("name", NOT_KEPT)
def test_models_that_are_not_kept_have_a_card_and_say_how_to_train_them(name):
    cards = REPOSITORY.parent / "cards"
    assert set(NOT_KEPT) == {path.stem for path in cards.glob("*.json")} and name in PRESETS
    for opens in (load_demo, check_model):
        with pytest.raises(CorelensError, match=f"python -m training {name} --export training/mod"):
            opens(name)


def test_the_wheel_stays_small():
    """20 MB of models at most, as the wheel is downloaded by everyone; the repository's further
    models, 40."""
    for root, most in ((CHECKPOINTS, 20e6), (REPOSITORY, 40e6)):
        assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < most
    assert sum(path.stat().st_size for path in (CHECKPOINTS / DEFAULT).iterdir()) < 7e6


def test_wilson_interval():
    low, high = wilson(0.95, 1000)
    assert 0.934 < low < 0.936 and 0.961 < high < 0.963
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
