"""The tiny models keep what they promise: random throughout, grouped heads, and a round trip
through files, offline."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from corelens.inputs.prepare import Sample, prepare
from corelens.layouts import layout_for
from helpers.families import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_are_random(family):
    model, _ = tiny(family)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.numel() == 1 or parameter.std() > 0.01, name


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_share_keys_and_values(family):
    text = tiny(family)[0].config.get_text_config()
    assert text.num_hidden_layers == 4 and text.num_attention_heads == 4
    assert text.num_attention_heads // text.num_key_value_heads >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_files(family, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, processor = tiny(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = (
        AutoModelForImageTextToText.from_pretrained(tmp_path).eval(),
        AutoProcessor.from_pretrained(tmp_path),
    )
    sample = Sample(
        [Image.linear_gradient("L").resize((150, 90))], "What digit is on the red circle?", "7"
    )
    runs = []
    for hf, made in ((model, processor), loaded):
        inputs = prepare(sample, made, layout_for(hf.config), hf.config, answer=True)
        with torch.no_grad():
            runs.append((inputs, hf(**inputs.tensors).logits))
    (here, logits), (loaded, again) = runs
    assert torch.equal(here.token_maps[0].question, loaded.token_maps[0].question)
    assert torch.equal(logits, again)
