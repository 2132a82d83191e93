"""Training that makes question rows read: which rows see the picture, and when."""

import numpy as np
import pytest
import torch

import corelens as cl
from corelens.demo import read_card
from training.batches import Plan, draw_batch
from training.blind import Sight, answered_at, is_blind, share_blind
from training.build import build_model, build_processor
from training.families import family_of
from training.fast import fast_training
from training.recipes import tuples

NAME = "qwen3vl-q"


@pytest.fixture(scope="module", params=[NAME, "internvl-q"])
def built(request):
    processor = build_processor(request.param)
    torch.manual_seed(0)
    return request.param, processor, build_model(request.param, processor).eval()


def sight_of(processor):
    return Sight(
        processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    )


def test_the_words_of_every_question_are_marked_and_nothing_else(built):
    name, processor, _ = built
    batch = draw_batch(Plan(name, "questions", 0, 3, 2, 3, (256, 256), questions=2))
    ids = torch.from_numpy(batch["input_ids"])
    marks = sight_of(processor).asked(ids)
    text = processor.tokenizer.decode(ids[0][marks[0]])
    assert text.count("What digit is on the ") == 2 == text.count("?") and "assistant" not in text
    assert not any(char.isdigit() for char in text)


def test_where_blind_only_the_question_s_rows_depend_on_the_picture(built):
    name, processor, model = built
    sight = sight_of(processor)
    batch = draw_batch(Plan(name, "questions", 0, 3, 1, 3, (256, 256), questions=2))
    ids = torch.from_numpy(batch["input_ids"])
    first = torch.from_numpy(batch["images"])
    layer = model.model.language_model.layers[0]
    rows = []
    layer.self_attn.register_forward_hook(lambda module, args, out: rows.append(out[0]))
    with torch.no_grad(), fast_training(model, sight.mask):
        for close in (sight.open, lambda: sight.close(ids)):
            close()
            for images in (first, 255 - first):
                model.model(**family_of(model).inputs(model, ids, images), use_cache=False)
    moved = [(a - b).abs().amax(-1)[0] > 1e-6 for a, b in (rows[:2], rows[2:])]
    behind = torch.arange(ids.shape[1]) > int(
        (ids[0] == model.config.image_token_id).nonzero().max()
    )
    asked = sight.asked(ids)[0]
    assert moved[0][behind].all()  # as always: every row behind the picture reads it
    assert torch.equal(moved[1][behind], asked[behind])


def test_blindness_falls_to_nothing_and_is_the_same_after_a_resumed_start():
    shares = [share_blind(step, 0.8, 100, 200) for step in (0, 99, 100, 150, 199, 200, 999)]
    assert shares == pytest.approx([0.8, 0.8, 0.8, 0.4, 0.008, 0, 0])
    drawn = [is_blind(step, 0, 0.8) for step in range(500)]
    assert 0.7 < np.mean(drawn) < 0.9 and drawn == [is_blind(step, 0, 0.8) for step in range(500)]
    assert not any(is_blind(step, 0, 0.0) for step in range(100))


def test_the_last_token_of_a_question_is_asked_for_its_own_answer(built):
    name, processor, _ = built
    batch = draw_batch(Plan(name, "questions", 0, 3, 2, 3, (256, 256), questions=2))
    ids, answers = torch.from_numpy(batch["input_ids"]), torch.from_numpy(batch["answers"])
    rows, positions, golds = answered_at(sight_of(processor).asked(ids), answers)
    assert rows.tolist() == [0, 0, 1, 1]
    assert {
        processor.tokenizer.decode(ids[row, i]) for row, i in zip(rows, positions, strict=True)
    } == {"?"}
    words = [processor.tokenizer.decode(ids[row, i]) for row, i in zip(rows, golds, strict=True)]
    assert all(word.isdigit() for word in words) and (golds > positions).all()
    assert golds.tolist() == [i for row in answers for i in row.nonzero()[:, 0].tolist()]


@pytest.mark.parametrize("name", ["qwen3vl-qs", "internvl-q"])
def test_a_model_made_to_read_there_does_and_ram_as_published_finds_its_heads(name):
    card, model = read_card(name), cl.load_demo(name)
    (test,) = [row for row in card["held_out"] if row["split"] == "test"]
    samples = cl.synthetic("refer", 80, seed=77, **tuples(test.get("options", {})))
    tested = samples[50:]
    clean = cl.evaluate(model, tested, batch_size=30).accuracy
    assert abs(clean - test["accuracy"]) < 0.15 and card["controls"][0]["blank"] < 0.2
    assert cl.where_read(model, samples[:15], tokens=False).rows == "question"
    core = cl.score_heads(model, samples[:50], "ram")["ram"].top(0.05)
    cut = cl.evaluate(model, tested, hooks=cl.knockout(core), batch_size=30).accuracy
    assert clean - cut > 0.3
    (made, other) = [row["rows"] for row in card["zeroed"]]
    assert (card["reads"][0]["reads"], made, other) == ("question", "question", "last")
