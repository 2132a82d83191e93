"""Demo models that cut pictures into tiles: what training makes of a picture is what the real
processor makes of it."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from corelens.data.synthetic import synthetic
from corelens.data.synthetic.refer import COLOURS, KINDS, draw_scene
from corelens.errors import CorelensError
from corelens.inputs.prepare import prepare
from corelens.layouts import layout_for
from helpers.elsewhere import DEVICE, Elsewhere, elsewhere
from training.batches import Plan, caption_chat, draw_batch, picture_tokens
from training.build import PRESETS, build_model, build_processor
from training.dense import IGNORED, LABELS, shape_labels
from training.families import family_of, views_of
from training.fast import fast_training
from training.qk_clip import QKClip
from training.recipes import RECIPES
from training.train import _dense_loss, _optimizer, _text_loss, train_demo

TILED = ("llava-ov-s", "internvl-s")


@pytest.fixture(scope="module", params=TILED)
def built(request):
    processor = build_processor(request.param)
    torch.manual_seed(0)
    return request.param, processor, build_model(request.param, processor).eval()


def pictures(samples):
    return torch.from_numpy(np.stack([np.asarray(sample.images[0]) for sample in samples]))


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (128, 128)])
def test_a_batch_is_what_the_processor_gives(built, size):
    name, processor, model = built
    width, height = size
    rng = np.random.default_rng(3)
    scenes = [draw_scene(rng, width, height, 2) for _ in range(2)]
    prompt = processor.image_token + "What digit is on the red star?"
    real = processor(
        text=[prompt] * 2, images=[[scene.image] for scene in scenes], return_tensors="pt"
    )
    images = torch.from_numpy(np.stack([np.asarray(scene.image) for scene in scenes]))
    ours = family_of(model).inputs(model, real["input_ids"], images)
    assert torch.allclose(ours["pixel_values"], real["pixel_values"], atol=1e-6)
    assert name == "internvl-s" or torch.equal(ours["image_sizes"], real["image_sizes"])
    pads, _ = picture_tokens(name, width, height)
    text = prompt.replace(processor.image_token, pads[processor.image_token])
    assert processor.tokenizer(text)["input_ids"] == real["input_ids"][0].tolist()


def test_tiles_pooling_newlines_and_thumbnail_occur():
    """64 + 8 · (8 + 1) tokens for LLaVA, all labelled but the newlines; (4 + 1) · 16 for InternVL,
    the tiles' labelled."""
    for name, tokens, seen in (("llava-ov-s", 136, 2), ("internvl-s", 80, 1)):
        pads, cells = picture_tokens(name, 256, 256)
        assert len(cells.box) == tokens and cells.visual.sum() == 64 * seen
        placeholder, text = next(iter(pads.items()))
        assert text.count(placeholder) == tokens
        boxes = cells.box[cells.visual]
        assert torch.equal(
            boxes[:, 2:] - boxes[:, :2], torch.full((64 * seen, 2), 32.0, dtype=boxes.dtype)
        )
        assert sorted(Counter(tuple(box) for box in boxes.tolist()).values()) == [seen] * 64


def test_fast_training_computes_what_transformers_computes(built):
    _, processor, model = built
    samples = synthetic("refer", 2, sides=(256, 256), seed=9)
    inputs = prepare(samples, processor, layout_for(model.config), model.config).tensors
    ours = family_of(model).inputs(model, inputs["input_ids"], pictures(samples))
    with torch.no_grad():
        slow = model(**inputs).logits
        with fast_training(model):
            quick = model(**ours, use_cache=False).logits
            features = family_of(model).features(model, pictures(samples))
        assert (slow - quick).abs().max() < 1e-5
        assert torch.equal(slow, model(**inputs).logits)
    theirs = model.model.get_image_features(
        **{k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    )
    theirs = theirs.pooler_output
    theirs = torch.cat(theirs) if isinstance(theirs, list | tuple) else theirs.flatten(0, 1)
    assert (features - theirs).abs().max() < 1e-5
    assert len(features) == (inputs["input_ids"] == processor.image_token_id).sum()


def test_labels_stand_on_the_tiles(built):
    name, _, _ = built
    scene = draw_scene(np.random.default_rng(1), 256, 256, 6)
    _, cells = picture_tokens(name, 256, 256)
    labels = shape_labels(scene.shapes, cells)
    assert ((labels == IGNORED).all(1) == ~cells.visual.numpy()).all()
    named = {
        (list(COLOURS)[c], KINDS[k], d)
        for c, k, d in labels[labels[:, 2] >= 0][:, :3].tolist()
        if d < 10
    }
    assert named == {(s.colour, s.kind, s.digit) for s in scene.shapes}


def test_captions_name_every_object_from_left_to_right_or_in_any_order():
    scene = draw_scene(np.random.default_rng(1), 256, 256, 6)
    plain, shuffled = (
        caption_chat(scene, rng)[1]["content"] for rng in (None, np.random.default_rng(0))
    )
    objects = [
        f"{s.colour} {s.kind} {s.digit}" for s in sorted(scene.shapes, key=lambda s: (s.x, s.y))
    ]
    assert plain == ", ".join(objects) + "."
    assert shuffled != plain and sorted(shuffled[:-1].split(", ")) == sorted(objects)


def test_a_training_batch_of_questions_is_what_the_model_takes(built):
    name, processor, model = built
    batch = draw_batch(
        Plan(name, "questions", seed=0, step=1, batch=2, objects=3, sides=(256, 256))
    )
    spoken = [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert all(text.count("<|im_end|>") == 3 and text[0].isdigit() for text in spoken)
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    with torch.no_grad(), fast_training(model):
        hidden = model.model(
            **family_of(model).inputs(model, tensors["input_ids"], tensors["images"])
        ).last_hidden_state
    assert hidden.shape == (*batch["input_ids"].shape, 128) and hidden.isfinite().all()


def test_dense_labels_train_the_tower_and_projector_alone(built):
    name, _, model = built
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    modules = torch.nn.ModuleDict({"model": model, "probes": torch.nn.Linear(2, 2)})
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    _optimizer(modules, RECIPES[name], step=0).step(rate=1e-3, clip=1.0)
    changed = {
        key.split(".")[1]
        for key, weight in model.named_parameters()
        if not torch.equal(weight, before[key])
    }
    assert changed == {"vision_tower", "multi_modal_projector"}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.copy_(before[key])
            weight.grad = None


def test_qk_clip_holds_logits_where_no_norm_does(built):
    name, _, model = built
    batch = draw_batch(
        Plan(name, "questions", seed=0, step=1, batch=2, objects=3, sides=(256, 256))
    )
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    attention = model.model.language_model.layers[2].self_attn
    weight_before, clip = attention.q_proj.weight.detach().clone(), QKClip(model, limit=5.0)
    largest = {}

    def logits(module, args, kwargs, out):
        q, k = (
            part(kwargs["hidden_states"]).unflatten(-1, (-1, 16)).transpose(1, 2)
            for part in (module.q_proj, module.k_proj)
        )
        largest["logit"] = (q @ k.repeat_interleave(3, 1).mT * module.scaling).abs().amax()

    handle = attention.register_forward_hook(logits, with_kwargs=True)
    try:
        with torch.no_grad():
            attention.q_proj.weight.mul_(1000)
        family = family_of(model)
        for _ in range(3):
            model.model(
                **family.inputs(model, tensors["input_ids"], tensors["images"]), use_cache=False
            )
            clip.step()
        scaled = not torch.equal(attention.q_proj.weight, weight_before * 1000)
        assert scaled == (name == "llava-ov-s")
        if scaled:  # rotations keep lengths, so the bound holds for the logits themselves
            assert 0.5 < largest["logit"] <= 5.01
    finally:
        handle.remove()
        clip.close()
        with torch.no_grad():
            attention.q_proj.weight.copy_(weight_before)
    assert not attention.q_proj._forward_hooks


@pytest.mark.parametrize("form", ["dense", "questions"])
@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("qwen3vl-s", "refer"),
        ("qwen3vl-s", "video"),
        ("llava-ov-s", "refer"),
        ("internvl-s", "refer"),
    ],
)
def test_the_losses_of_training_are_the_same_on_another_device(name, world, form):
    drawn = draw_batch(Plan(name, form, 0, 5, 2, 4, (256, 256), world=world, frames=4))
    batch = {key: torch.from_numpy(value) for key, value in drawn.items()}
    torch.manual_seed(0)
    model = build_model(name, build_processor(name))
    probes = nn.ModuleDict(
        {label: nn.Linear(model.lm_head.in_features, n + 1) for label, n in LABELS.items()}
    )
    modules = nn.ModuleDict({"model": model, "probes": probes})
    losses = _dense_loss if form == "dense" else _text_loss
    with torch.no_grad(), fast_training(model):
        expected = losses(modules, batch)[0].item()
    with elsewhere(modules), fast_training(model):
        loss, _ = losses(modules, {key: Elsewhere(value) for key, value in batch.items()})
    assert model.device == loss.device == DEVICE and loss.held.item() == pytest.approx(
        expected, rel=1e-6
    )


def test_another_device_refuses_what_mixes_the_two():
    with elsewhere(nn.Linear(2, 2)), pytest.raises(AssertionError, match="mixes devices"):
        _ = Elsewhere(torch.ones(2)) + torch.ones(2)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device, tmp_path):
    with pytest.raises(CorelensError, match=f"device='{device}'"):
        train_demo("qwen3vl-s", out=tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_pictures_that_do_not_divide_into_tiles_are_refused():
    with pytest.raises(CorelensError, match="multiples of 128"):
        views_of(torch.zeros(1, 160, 256, 3, dtype=torch.uint8), 128)


def test_presets_have_96_heads_or_more():
    # but for two small ones for questions of two steps, of 48 and 64, and a control of the second
    for name in PRESETS.keys() - {"qwen3vl-hop-s", "qwen3vl-hop", "qwen3vl-hop-control"}:
        text = PRESETS[name]["text"]
        assert text["num_hidden_layers"] * text["num_attention_heads"] >= 96
