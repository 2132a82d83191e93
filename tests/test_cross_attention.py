"""Decoders that read the picture through cross-attention layers: points whose key axis is the
tower's tokens."""

from functools import cache

import pytest
import torch
from einops import rearrange
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor

import corelens as cl
from corelens.errors import CorelensError
from families.checks import build
from families.processors import image_processor
from families.shrink import tiny_config
from helpers.family_parts import HEADS, build_tokenizer, randomise

CROSS = 1  # the layer
PATTERN = f"blocks.{CROSS}.attn.hook_pattern"


@cache
def model_and_tensors():
    """A tiny random Mllama: layers 1 and 3 attend to the tower; a prompt of 9 words."""
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "attention_heads": 2,
    }
    tower |= {"num_global_layers": 1, "image_size": 56, "patch_size": 14, "max_num_tiles": 4}
    tower |= {"intermediate_layers_indices": [0], "vision_output_dim": 64}
    tower |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]]}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, **HEADS}
    text |= {"cross_attention_layers": [1, 3], "vocab_size": 64, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = MllamaConfig(vision_config=tower, text_config=text, image_token_index=63)
    hf = randomise(MllamaForConditionalGeneration(config))
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[5, 63, 7, 8, 9, 10, 11, 12, 13]])
    mask = torch.zeros(1, 9, 1, 4, dtype=torch.long)
    mask[:, 1:, :, :2] = 1  # two of four tiles hold the picture; the first word stands before it
    tensors = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask,
        "pixel_values": torch.randn(1, 1, 4, 3, 56, 56, generator=generator),
        "aspect_ratio_ids": torch.tensor([[2]]), "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
    }  # fmt: skip
    return cl.HookedMLLM(hf, None, check=False), tensors


@torch.no_grad()
def plain():
    model, tensors = model_and_tensors()
    return model.hf(**tensors, use_cache=False).logits


def cross_attention():
    return model_and_tensors()[0].hf.model.language_model.layers[CROSS].cross_attn


@torch.no_grad()
def test_reading_a_cross_layer_leaves_the_logits_bit_for_bit():
    model, tensors = model_and_tensors()
    names = [f"blocks.{CROSS}.attn.hook_{word}" for word in ("q", "k", "v", "rot_q", "rot_k", "z")]
    logits, cached = model.run_with_cache(tensors, names_filter=names)
    assert torch.equal(logits, plain())
    # k as its projection gives it, a tile by itself; as attention uses them, all tokens in one row
    assert cached[names[1]].shape == (4, 17, 2, 8)
    assert cached[names[2]].shape == cached[names[4]].shape == (1, 68, 2, 8)
    assert cached[names[0]].shape == cached[names[5]].shape == (1, 9, 4, 8)


@torch.no_grad()
def test_its_pattern_is_that_of_eager_attention_over_the_towers_tokens():
    model, tensors = model_and_tensors()
    with model.pattern_rows([3, 8]):
        _, cached = model.run_with_cache(
            tensors, names_filter=[PATTERN, f"{PATTERN}_rows", f"blocks.{CROSS}.attn.hook_z"]
        )
    eager = []
    handle = cross_attention().register_forward_hook(lambda m, a, out: eager.append(out[1]))
    model.hf.set_attn_implementation("eager")
    try:
        plain()
    finally:
        model.hf.set_attn_implementation("sdpa")
        handle.remove()
    pattern = cached[PATTERN]
    torch.testing.assert_close(pattern[:, :, 1:], eager[0][:, :, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cached[f"{PATTERN}_rows"], pattern[:, :, [3, 8]], atol=1e-6, rtol=0)
    half = pattern.shape[-1] // 2
    assert (pattern[:, :, 2:, half:] == 0).all()  # tiles without a picture


@torch.no_grad()
def test_an_edit_of_z_or_k_is_a_plain_hook_and_lasts_over_generation():
    model, tensors = model_and_tensors()

    def first_head_off(module, args):
        z = rearrange(args[0], "... (head d) -> ... head d", head=4).clone()
        z[..., 0, :] = 0
        return (z.flatten(-2),)

    handle = cross_attention().o_proj.register_forward_pre_hook(first_head_off)
    wanted, words = plain(), model.generate(tensors, max_new_tokens=5, do_sample=False)
    handle.remove()
    edit = [(f"blocks.{CROSS}.attn.head.0.hook_z", lambda z, hook: z * 0)]
    assert torch.equal(model.run_with_hooks(tensors, fwd_hooks=edit), wanted)
    assert not torch.equal(wanted, plain())
    with model.hooks(fwd_hooks=edit):
        assert torch.equal(model.generate(tensors, max_new_tokens=5, do_sample=False), words)

    handle = cross_attention().k_norm.register_forward_hook(lambda m, a, out: out * 3)
    wanted, words = plain(), model.generate(tensors, max_new_tokens=5, do_sample=False)
    handle.remove()
    edit = [(f"blocks.{CROSS}.attn.hook_rot_k", lambda k, hook: k * 3)]
    torch.testing.assert_close(model.run_with_hooks(tensors, fwd_hooks=edit), wanted)
    with model.hooks(fwd_hooks=edit):  # not once more at every step
        assert torch.equal(model.generate(tensors, max_new_tokens=5, do_sample=False), words)


@torch.no_grad()
def test_columns_are_the_towers_tokens_and_names_of_the_row_are_refused():
    model, tensors = model_and_tensors()
    heads, columns = cl.HeadSet([(CROSS, 2)]), [0, 3, 7]
    cut = cl.knockout(heads, rows=[4, 8], columns=columns)
    _, base = model.run_with_cache(tensors, names_filter=[PATTERN])
    with model.hooks(fwd_hooks=cut):
        _, cached = model.run_with_cache(tensors, names_filter=[PATTERN])
    wanted = base[PATTERN].clone()
    rows = torch.tensor([4, 8])[:, None]
    wanted[0, 2, rows, torch.tensor(columns)] = 0
    wanted[0, 2, rows[:, 0]] /= wanted[0, 2, rows[:, 0]].sum(-1, keepdim=True)
    torch.testing.assert_close(cached[PATTERN], wanted, atol=1e-6, rtol=1e-5)
    edited = model.run_with_hooks(tensors, fwd_hooks=cut)
    assert not torch.equal(edited, plain())
    with pytest.raises(CorelensError, match="columns 'region' in a cross-attention layer"):
        model.run_with_hooks(tensors, fwd_hooks=cl.knockout(heads, rows=[4], columns="region"))


@torch.no_grad()
def test_an_answer_sees_the_picture_that_its_question_sees():
    """`evaluate` through the real processor is plain transformers on the same text, a sample at a
    time."""
    config = tiny_config("mllama")
    ratios = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    config.vision_config.supported_aspect_ratios = [list(ratio) for ratio in ratios]
    image, bos = "<|image|>", "<|begin_of_text|>"
    special = {"pad_token": "<pad>", "bos_token": bos, "eos_token": "<eos>"}
    words = [*special.values(), image, "<|python_tag|>"]
    tokenizer = build_tokenizer(words, adds_bos=True, **special)
    config.image_token_index = tokenizer.convert_tokens_to_ids(image)
    processor = MllamaProcessor(
        image_processor("mllama", config),
        tokenizer,
        chat_template="{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' "
        f"%}}{image}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}{{% endfor %}}{{% endfor %}}",
    )
    hf = randomise(MllamaForConditionalGeneration._from_config(config))
    samples = [
        cl.Sample(images=[Image.new("RGB", (60, 40), "red")], question="Which digit?", answer="7"),
        cl.Sample(images=[Image.new("RGB", (60, 190), "blue")], question="And?", answer="12 cups"),
    ]
    result = cl.evaluate(cl.HookedMLLM(hf, processor), samples)
    for sample, answer in zip(samples, result.per_sample, strict=True):
        prompt = f"{image}{sample.question}"
        before = len(processor(images=sample.images, text=prompt)["input_ids"][0])
        inputs = processor(images=sample.images, text=prompt + sample.answer, return_tensors="pt")
        logprobs = hf(**inputs).logits[0].log_softmax(-1)
        ids = inputs["input_ids"][0, before:]
        wanted = logprobs[before - 1 : -1].gather(1, ids[:, None]).sum().item()
        assert answer.logprob == pytest.approx(wanted, abs=1e-4)


def test_heads_of_cross_layers_are_not_drawn_among_those_that_read_the_row():
    model, _ = model_and_tensors()
    assert model.cfg.heads == (4, 0, 4, 0)
    assert model.blocks[CROSS].attn.W_Q.shape == (4, 32, 8)
    reason = model.blocks[CROSS].parts.unsummed
    assert "text alone" in reason


def test_an_attention_that_could_cross_in_a_layer_that_does_not_reads_the_row():
    assert cl.HookedMLLM(build("idefics")).cfg.heads == (4, 4, 4, 4)


def test_an_encoder_decoder_is_refused_by_name():
    hf = torch.nn.Module()
    hf.config = type("Config", (), {"model_type": "t5", "is_encoder_decoder": True})()
    with pytest.raises(CorelensError, match="an encoder-decoder"):
        cl.HookedMLLM(hf)
