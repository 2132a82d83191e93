"""What teaches demo models to read anywhere and in every world: dense labels, documents, and the
optimizer."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from corelens.data.synthetic.doc import KEYS, draw_document
from corelens.data.synthetic.drawing import DIGITS, LETTERS
from corelens.data.synthetic.refer import COLOURS, KINDS, stream
from corelens.data.synthetic.refer_hard import FORMS, SIZES, questions, size_of
from corelens.data.synthetic.refer_hard import draw_scene as draw_hard
from corelens.data.synthetic.video import draw_scene as draw_clip
from corelens.inputs.prepare import Sample, prepare
from corelens.layouts import layout_for
from training.batches import DOC, HARD, Plan, draw_batch, picture_tokens, tokenize
from training.build import build_model, build_processor
from training.dense import IGNORED, LABELS, clip_labels, figure_labels, page_labels, sheet
from training.families import family_of
from training.fast import fast_training
from training.optimizer import Optimizer
from training.recipes import LEVELS, RECIPES, Check, Recipe, Slice, learning_rate, plan_step
from training.train import train_demo

NAME = "qwen3vl-m"
NONE = list(LABELS.values())


@pytest.fixture(scope="module")
def processor():
    return build_processor(NAME)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(NAME, processor).eval()


def grid(labels, cells):
    """[tokens, labels] → [rows, columns, labels]."""
    columns = len(cells.box[:, 0].unique())
    return labels.reshape(-1, columns, labels.shape[-1])


def test_tokens_of_a_line_know_its_key_and_value():
    (page,), _ = draw_document(np.random.default_rng(3), 288, 256, 1, 4)
    _, cells = picture_tokens(NAME, 288, 256)
    labels = grid(page_labels(page, cells), cells)
    assert (np.delete(labels, (3, 4, 5, 8, 9), -1) == IGNORED).all()
    for line in page.lines:
        middle = (line.box.y0 + line.box.y1) / 2
        row, columns = int(middle // 32), range(int(line.box.x0 // 32) + 1, int(line.box.x1 // 32))
        expected = {tuple(labels[row, column, 3:6].tolist()) for column in columns}
        assert (KEYS.index(line.key), int(line.value[0]), int(line.value[1])) in expected
    labelled = {tuple(token) for token in labels[..., 3:6].reshape(-1, 3).tolist()} - {
        tuple(NONE[3:6])
    }
    assert labelled <= {(KEYS.index(x.key), int(x.value[0]), int(x.value[1])) for x in page.lines}


def test_a_clip_is_labelled_where_its_shapes_are_and_while_they_carry_a_digit():
    scene, _ = draw_clip(np.random.default_rng(5), 224, 224, 4, 3, span=(1, 2))
    _, cells = picture_tokens(NAME, 224, 224)
    pairs = clip_labels(scene, cells).reshape(2, 7, 7, len(LABELS))
    for pair, labels in enumerate(pairs):
        assert (labels[..., 3:] == IGNORED).all()
        for actor in scene.actors:
            a, b = actor.at(2 * pair), actor.at(2 * pair + 1)
            token = labels[int((a.y + b.y) / 2 // 32), int((a.x + b.x) / 2 // 32)]
            assert token[2] == int(a.symbol or b.symbol or 10)
    assert (pairs[..., 2] == 10).any() and (pairs[..., 2] < 10).any()


def test_a_token_knows_its_place_and_the_letter_or_digit_and_the_size_of_its_shape():
    scene, _ = draw_hard(np.random.default_rng(4), 320, 352, 9)
    _, cells = picture_tokens(NAME, 320, 352)
    labels = grid(figure_labels(scene.figures, cells), cells)
    assert (labels[..., 3:6] == IGNORED).all()
    for figure in scene.figures:
        colour, kind, digit, *_, letter, size, column, row = labels[
            int(figure.y // 32), int(figure.x // 32)
        ]
        assert (column, row) == (
            int((figure.x // 32 + 0.5) / 10 * 8),
            int((figure.y // 32 + 0.5) / 11 * 8),
        )
        assert (list(COLOURS)[colour], KINDS[kind]) == (figure.colour, figure.kind)
        assert (DIGITS + " ")[digit].strip() + (LETTERS + " ")[letter].strip() == figure.symbol
        assert list(SIZES)[size] == size_of(figure)
    assert {10, 14, 2} <= {*labels[..., 2].flat, *labels[..., 6].flat, *labels[..., 7].flat}


def test_training_asks_refer_hard_in_every_form_and_lists_it_in_any_order(processor):
    asked, listed = (
        draw_batch(Plan(NAME, form, 0, 2, 6, 8, (320, 320), questions=6, world="refer-hard"))
        for form in ("questions", "caption")
    )
    text = processor.tokenizer.decode(asked["input_ids"].flatten())
    assert all(
        words in text for words in (" left of the ", " the small ", " letter is ", " symbol is ")
    )
    for row in range(6):
        own = stream("train", HARD, 0, 2, row)
        word = str(own.choice(["symbol", "symbol", "digit", "letter"]))
        scene, _ = draw_hard(own, *asked["images"].shape[2:0:-1], 8, word, FORMS[row % 3])
        answers = {query.question: query.answer for query in questions(scene)}
        spoken = processor.tokenizer.decode(asked["input_ids"][row]).split("<|im_start|>user\n")[1:]
        for turn in spoken:
            question, answer = (
                part.split("<|im_end|>")[0] for part in turn.split("<|im_start|>assistant\n")
            )
            assert answers[question.rpartition(">")[2]] == answer
        caption = processor.tokenizer.decode(
            listed["labels"][row][listed["labels"][row] != IGNORED]
        )
        names = [f"{size_of(f)} {f.colour} {f.kind} {f.symbol}" for f in scene.figures]
        assert sorted(caption.partition(".")[0].split(", ")) == sorted(names)
        assert listed["answers"][row].sum() == len(names)
        assert asked["answers"][row].sum() == len(spoken) >= 4


def test_training_asks_refer_hard_in_the_forms_that_a_slice_names(processor):
    plan = Plan(NAME, "questions", 0, 2, 6, 4, (192, 224), world="refer-hard", forms=("relation",))
    batch = draw_batch(Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    turns = processor.tokenizer.decode(batch["input_ids"].flatten()).split("<|im_start|>user\n")[1:]
    assert len(turns) > 6 and all(
        re.search(" (left of|right of|above|below) the ", turn) for turn in turns
    )


@pytest.mark.parametrize("jitter", [0, 8])
def test_a_sheet_s_symbols_stand_where_its_labels_say(jitter):
    _, cells = picture_tokens(NAME, 192, 160)
    image, labels = sheet(np.random.default_rng(2), 192, 160, jitter, cells)
    assert image.size == (192, 160) and (np.delete(labels, (2, 6, 8, 9), 1) == IGNORED).all()
    digits, letters = labels[:, 2].reshape(5, 6), labels[:, 6].reshape(5, 6)
    has_symbol = (digits < 10) | (letters < 14)
    assert 6 <= has_symbol.sum() <= 30 and (digits < 10).any() and (letters < 14).any()
    assert not ((digits < 10) & (letters < 14)).any()
    paper = np.asarray(image)[0, 0] if jitter == 0 else None
    # on the grid every symbol stands on its own token, and empty tokens are bare
    if paper is not None:
        bare = (np.asarray(image) == paper).all(-1).reshape(5, 32, 6, 32).all((1, 3))
        assert (bare == ~has_symbol).all()


def test_every_world_s_batches_are_what_the_model_takes(processor, model):
    recipe = RECIPES[NAME]
    progress, drawn = {"name": NAME, "seed": 0, "level": max(LEVELS), "skipped": 0}, {}
    for step in [*range(20), *range(recipe.stage_a + 950, recipe.stage_a + 990)]:
        plan = plan_step(step, progress, recipe)
        drawn.setdefault((plan.world, plan.form), plan)
    climbing = plan_step(recipe.stage_a + 950, progress | {"level": 3}, recipe)
    assert (climbing.world, climbing.jitter, climbing.batch) == (
        "refer",
        8,
        32,
    ) and climbing.objects <= 3
    forms = {("sheet", "dense")} | {
        (w, f) for w in ("refer", "doc", "video") for f in ("dense", "caption", "questions")
    }
    assert drawn.keys() == forms
    for (world, form), plan in drawn.items():
        batch = draw_batch(Plan(**{**plan.to_json(), "batch": 2, "sides": (224, 224)}))
        images = torch.from_numpy(batch["images"])
        with torch.no_grad(), fast_training(model):
            if form == "dense":
                assert (
                    family_of(model).features(model, images).shape[0]
                    == batch["labels"][..., 0].size
                )
                assert (batch["labels"] != IGNORED).any() and (batch["labels"] <= NONE).all()
            else:
                inputs = family_of(model).inputs(
                    model, torch.from_numpy(batch["input_ids"]), images
                )
                hidden = model.model(**inputs, use_cache=False).last_hidden_state
                assert hidden.isfinite().all() and hidden.shape[:2] == batch["input_ids"].shape
                assert batch["answers"].sum(1).min() >= (2 if world == "doc" else 1)


def test_documents_in_training_are_what_a_user_s_sample_becomes(processor, model):
    plan = Plan(
        NAME,
        "questions",
        seed=0,
        step=1,
        batch=2,
        objects=5,
        sides=(224, 224),
        world="doc",
        pages=2,
    )
    batch = draw_batch(plan)
    text = processor.tokenizer.decode(batch["input_ids"][0])
    question = text.split("<|vision_end|>")[-1].split("<|im_end|>")[0]
    pages = [Image.fromarray(page) for page in batch["images"][:2]]
    sample = Sample(question=question, answer="", images=pages)
    real = prepare([sample], processor, layout_for(model.config), model.config).tensors
    length = real["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == real["input_ids"][0].tolist()
    ids = torch.from_numpy(batch["input_ids"])
    with torch.no_grad():
        slow = model(**real).logits
        with fast_training(model):
            inputs = family_of(model).inputs(model, ids, torch.from_numpy(batch["images"]))
            quick = model(**inputs, use_cache=False).logits
    assert (slow[0] - quick[0, :length]).abs().max() < 1e-5


def test_lists_of_a_page_are_in_any_order(processor):
    plan = Plan(NAME, "caption", seed=0, step=1, batch=8, objects=4, sides=(224, 256), world="doc")
    batch, orders = draw_batch(plan), []
    for row, labels in enumerate(batch["labels"]):
        spoken = processor.tokenizer.decode(labels[labels != IGNORED])
        own = stream("train", DOC, plan.seed, plan.step, row)
        (page,), _ = draw_document(own, *batch["images"].shape[2:0:-1], 1, 4)
        places = [
            spoken.index(f"{line.key} {line.value}")
            for line in sorted(page.lines, key=lambda x: x.y)
        ]
        orders.append(tuple(np.argsort(places)))
    assert len(set(orders)) > 3


def test_dense_labels_in_stage_b_train_the_tower_and_leave_probes_and_decoder(tmp_path):
    mix = (Slice(1.0, 2, (224, 224), (6, 6), dense=True, world="doc"),)
    recipe = Recipe(
        start="qwen3vl-s", stage_a=0, stage_b=2, check_every=1, mix=mix, checks=(Check(0, {}),)
    )
    before = load_file(
        train_demo("qwen3vl-s", out=tmp_path, recipe=recipe, stop_after=1) / "state.safetensors"
    )
    after = load_file(train_demo("qwen3vl-s", out=tmp_path, recipe=recipe) / "state.safetensors")
    changed = {
        key
        for key in before
        if key.startswith("weight/") and not torch.equal(before[key], after[key])
    }
    assert changed and all(key.startswith("weight/model.model.visual.") for key in changed)


@pytest.mark.parametrize("rests", [0, 1, None])
def test_one_s_own_tower_may_rest_from_a_step_of_stage_b_on(tmp_path, rests):
    recipe = Recipe(stage_a=1, stage_b=2, batch=2, check_every=4, check_scenes=0, rests=rests)

    def until(step):
        return load_file(
            train_demo("qwen3vl-s", out=tmp_path, recipe=recipe, stop_after=step)
            / "state.safetensors"
        )

    states = [until(step) for step in (1, 2, 3)]
    for before, after, sees in zip(states, states[1:], (rests != 0, rests is None), strict=False):
        changed = {
            key
            for key in before
            if key.startswith("weight/") and not torch.equal(before[key], after[key])
        }
        assert any(".language_model." in key for key in changed)
        assert any(".visual." in key for key in changed) == sees
    whole = load_file(
        train_demo("qwen3vl-s", out=tmp_path / "whole", recipe=recipe) / "state.safetensors"
    )
    assert all(torch.equal(whole[key], weight) for key, weight in states[-1].items())


@pytest.mark.parametrize("name", ["qwen3vl-m", "qwen3vl-l"])
def test_mixes_follow_one_another(name):
    recipe, worlds = RECIPES[name], {"refer", "refer-hard", "doc", "video"}

    def slices_of(step):
        return [
            part
            for part in recipe.mix
            if part.joins <= step and (step < part.leaves or not part.leaves)
        ]

    turn, *again = [part.joins for part in recipe.mix if part.forms == ("relation",)]
    more = {"qwen3vl-m": [3000, 3600], "qwen3vl-l": [3700]}[name]  # steps: relations alone again
    assert again == [turn + step for step in more]
    assert {part.world for part in slices_of(turn)} == worlds
    before = slices_of(turn - 1)
    assert not set(before) & set(slices_of(turn))
    if name == "qwen3vl-m":  # all of its tower's part has dense labels, and nothing else has
        assert {part.dense for part in before} == {True} and recipe.rests == turn == 9900
        assert {part.world for part in before} == {*worlds, "sheet"} and before == slices_of(
            6900
        ) != slices_of(6899)
    else:
        assert {part.world for part in before} == worlds - {"refer-hard"}
    # training may go on for longer
    for step in (recipe.stage_b - 1, recipe.stage_b, 10 * recipe.stage_b):
        assert {part.world for part in slices_of(step)} == worlds
        assert [part.joins for part in slices_of(step) if part.forms == ("relation",)] == again[-1:]


def test_dense_labels_of_a_mix_are_of_as_much_as_fits():
    part = Slice(1.0, 2, (128, 192), (6, 6), dense=True, jitter=8)
    recipe = Recipe(start="qwen3vl-s", stage_a=0, mix=(part,), twins=1.0)
    plans = [
        plan_step(step, {"name": NAME, "seed": 0, "level": 2, "skipped": 0}, recipe)
        for step in range(5)
    ]
    assert {(plan.objects, plan.colours) for plan in plans} == {(6, len(COLOURS))}


def test_the_rate_starts_again_within_stage_b():
    recipe = Recipe(stage_a=200, stage_b=1000, warmup=10, floor=0.1, rate=1e-3, anew=((600, 2e-4),))
    rates = [learning_rate(step, recipe) for step in range(recipe.steps)]
    for begin, end, peak in ((0, 200, 1e-3), (200, 800, 1e-3), (800, 1200, 2e-4)):
        part = rates[begin:end]
        assert part[0] == pytest.approx(peak / 10) and max(part) == pytest.approx(peak, rel=0.01)
        assert part[-1] == pytest.approx(peak / 10, rel=0.01)


def test_answers_of_two_digits_are_both_to_be_predicted(processor):
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "47"},
    ]
    batch = tokenize(processor, [chat], {})
    assert processor.tokenizer.decode(batch["input_ids"][batch["answers"]]) == "47"


def test_muon_moves_matrices_along_the_nearest_orthogonal_matrix():
    """Of filters too, as if they were flat; embeddings, biases and the spared are AdamW's."""
    torch.manual_seed(0)
    parts = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 4),
            "linear": nn.Linear(6, 5),
            "table": nn.Embedding(7, 4),
            "probe": nn.Linear(5, 3),
        }
    )
    start = {name: weight.detach().clone() for name, weight in parts.named_parameters()}
    optimizer = Optimizer(parts, muon=5.0, spared=parts["probe"])
    for weight in parts.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step(rate=1e-2, clip=1e9)
    for name, weight in parts.named_parameters():
        matrix = name in ("conv.weight", "linear.weight")
        # without weight decay
        change = weight.detach() - start[name] * (1 - 0.01 * (5e-2 if matrix else 1e-2))
        if matrix:
            flat = change.flatten(1)
            reach = torch.linalg.svdvals(flat / (5e-2 * 0.2 * max(flat.shape) ** 0.5))
            # Newton and Schulz come near 1, not closer
            assert ((reach > 0.6) & (reach < 1.3)).all(), name
        else:
            assert torch.allclose(change.abs(), torch.full_like(change, 1e-2), rtol=1e-3), name
    kinds = {
        key.split("/")[0]
        for key in optimizer.moments()
        if key.endswith(("conv.weight", "linear.weight"))
    }
    assert kinds == {"momentum_buffer"} and all(
        weight.grad is None for weight in parts.parameters()
    )
