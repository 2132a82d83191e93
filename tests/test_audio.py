"""Sounds: which token hears which seconds, spans as regions, and the points of audio towers."""

from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from einops import rearrange

import corelens as cl
from corelens.errors import CorelensError
from corelens.hf import attention_set, silent
from corelens.model.probing import first_layer_input
from corelens.model.sound_probing import SoundProbing
from corelens.model.towers import attention_modules
from corelens.runs.provenance import sample_hash
from families.spans import spans_of
from helpers import family_audio
from helpers.family_parts import randomise

FAMILIES = ["qwen2_audio", "qwen2_5_omni", "qwen3_omni_moe"]
CONFORMERS = ["gemma4", "gemma3n", "phi4_multimodal"]  # a token hears what lies before it, too
every_family = pytest.mark.parametrize("family", FAMILIES)
RATE = 16000
SPAN = cl.Span(0.8, 1.2)


@cache
def model_of(family):
    hf, processor = family_audio.BUILDERS[family]()
    return cl.HookedMLLM(randomise(hf), processor, check=False)


def waveform(seed=0, seconds=1.9):
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)


def sample(seed=0, seconds=1.9, **more):
    sound = waveform(seed, seconds)
    more = {"question": "What is said?", "answer": "7", "regions": [SPAN]} | more
    return cl.Sample(audio=[(sound, RATE)], **more)


@cache
def inputs_of(family):
    return model_of(family).prepare(sample())


@torch.no_grad()
def plain(family):
    return model_of(family).hf(**inputs_of(family).tensors, use_cache=False).logits


@contextmanager
def local(model):
    """The tower's attention gives zeros."""
    with silent(attention_modules(model.hf, model.layout, "audio")), torch.no_grad():
        yield


def moved(family, span):
    """How far each audio token moves when the samples of a span are replaced: [token]."""
    model, rows = model_of(family), []
    for change in (False, True):
        sound = waveform()
        if change:
            start, stop = int(span.start * RATE), int(span.end * RATE)
            sound[start:stop] = waveform(9)[start:stop]
        inputs = model.prepare(cl.Sample(audio=[(sound, RATE)], question="What is said?"))
        with local(model):
            tensors = inputs.tensors
            rows.append(first_layer_input(model.hf, model.layout.decoder(model.hf), tensors)[0])
    return (rows[1] - rows[0]).norm(dim=-1)[inputs.token_maps[0].audio], inputs.token_maps[0]


@every_family
@pytest.mark.parametrize("span", [SPAN, cl.Span(0.3, 0.45), cl.Span(1.4, 1.6)])
def test_the_tokens_of_a_span_move_and_no_others_and_a_shifted_map_fails(family, span):
    distance, token_map = moved(family, span)
    sound = token_map.sounds[0]
    inside = sound.covered(span) > 0.5
    distance = distance / distance.max()
    assert inside.sum() >= 2 and (distance[inside] > 0.1).all()
    first, last = inside.nonzero()[0, 0], inside.nonzero()[-1, 0]
    assert (distance[: max(first - 2, 0)] < 1e-3).all() and (distance[last + 3 :] < 1e-3).all()

    def off(seconds):  # between what moves and the span, in tokens
        heard = distance > 0.05
        ends = torch.stack([seconds[heard, 0].min(), seconds[heard, 1].max()])
        step = (seconds[:, 1] - seconds[:, 0]).median()
        return abs(float((ends.mean() - (span.start + span.end) / 2) / step))

    step = (sound.seconds[:, 1] - sound.seconds[:, 0]).median()
    assert off(sound.seconds) < 0.6
    assert off(sound.seconds + step) > 0.6 and off(sound.seconds - step) > 0.6


def test_times_are_those_of_the_architecture():
    # frames of 10 ms; a convolution of 3 frames, one of every second, a mean of two: 4 frames a
    # token, the middle of token j at frame 4j + 1
    for family in ("qwen2_audio", "qwen2_5_omni"):
        seconds = inputs_of(family).token_maps[0].sounds[0].seconds[2:-2]
        wanted = 0.04 * torch.arange(2, 2 + len(seconds)) - 0.01
        torch.testing.assert_close(seconds[:, 0], wanted.double(), atol=0.011, rtol=0)
    # three convolutions, one of every eighth frame, begun anew every 100 frames: 13 tokens a second
    seconds = inputs_of("qwen3_omni_moe").token_maps[0].sounds[0].seconds
    middle = seconds.mean(1)[1:25].reshape(-1)
    wanted = torch.tensor([0.08 * (i % 13) + i // 13 for i in range(1, 25)])
    assert (middle - wanted).abs().max() < 0.04


@every_family
def test_a_token_map_says_what_it_hears(family):
    inputs = inputs_of(family)
    token_map, ids = inputs.token_maps[0], inputs.tensors["input_ids"][0]
    config = model_of(family).hf.config
    assert (ids[token_map.audio] == model_of(family).layout.audio_placeholder(config)).all()
    assert not set(token_map.text.tolist()) & set(token_map.audio.tolist())
    assert not len(token_map.visual) and set(token_map.region.tolist()) < set(
        token_map.audio.tolist()
    )
    number, start, end = token_map.time(int(token_map.region[0]))
    assert number == 0 and start < SPAN.end and end > SPAN.start
    assert torch.equal(token_map.positions("audio"), token_map.audio)
    batch = model_of(family).prepare([sample(), sample(1, 0.9, regions=[cl.Span(0, 0.5)])])
    short = batch.token_maps[1]
    assert len(short.audio) < len(token_map.audio) and short.sounds[0].seconds.max() <= 0.9
    assert torch.equal(batch.token_maps[0].region, token_map.region + batch.length - inputs.length)
    with pytest.raises(CorelensError, match="no audio token"):
        token_map.time(0)


@pytest.mark.parametrize("family", CONFORMERS)
def test_spans_name_the_tokens_of_a_conformer(family):
    assert spans_of(family) == "3 of 3 spans, 0 shifted"


# (Phi-4's layers give no weights under eager attention)
@pytest.mark.parametrize("family", [*FAMILIES, "gemma4", "gemma3n"])
@torch.no_grad()
def test_ram_on_a_span_is_that_of_eager_attention(family):
    model, inputs = model_of(family), inputs_of(family)
    scored = cl.score_heads(model, [sample()], metrics=("ram", "precision"))
    scores = scored["ram"]
    question, region = inputs.token_maps[0].question, inputs.token_maps[0].region
    held = (getattr(module, "config", None) for module in model.hf.modules())
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation_internal")}
    with attention_set(configs.values(), "eager"):
        out = model.hf(**inputs.tensors, output_attentions=True, use_cache=False)
    wanted = torch.stack([a[0][:, question][:, :, region].sum(-1).mean(-1) for a in out.attentions])
    np.testing.assert_allclose(scores.values, wanted.numpy(), atol=1e-5)
    audio = inputs.token_maps[0].audio  # (of evidence in a sound, V are the audio tokens)
    whole = torch.stack([a[0][:, question][:, :, audio].sum(-1).mean(-1) for a in out.attentions])
    np.testing.assert_allclose(scored["precision"].values, (wanted / whole).numpy(), atol=1e-5)


@torch.no_grad()
def test_the_last_rows_logits_are_the_last_rows():
    # (a model that does not take logits_to_keep swallows it)
    model, inputs = model_of("qwen2_audio"), inputs_of("qwen2_audio")
    torch.testing.assert_close(model(inputs, logits_to_keep=3), plain("qwen2_audio")[:, -3:])


@torch.no_grad()
def test_knockout_of_a_span_cuts_its_tokens():
    model, inputs = model_of("qwen2_audio"), inputs_of("qwen2_audio")
    heads, token_map = cl.HeadSet([(1, 0), (2, 3)]), inputs.token_maps[0]
    for name, positions in (("region", token_map.region), ("audio", token_map.audio)):
        named = model.run_with_hooks(inputs, fwd_hooks=cl.knockout(heads, "last", columns=name))
        wanted = model.run_with_hooks(
            inputs, fwd_hooks=cl.knockout(heads, "last", columns=positions)
        )
        assert torch.equal(named, wanted) and not torch.equal(named, plain("qwen2_audio"))


@every_family
@torch.no_grad()
def test_points_of_an_audio_tower_read_and_write(family):
    model, inputs = model_of(family), inputs_of(family)
    names = [n for n in model.hook_names() if n.startswith("audio.") and "pattern" not in n]
    assert len(names) >= 12
    logits, cached = model.run_with_cache(inputs, names_filter=names)
    assert torch.equal(logits, plain(family)) and set(cached) == set(names)
    layer = model.towers[1].layers[1]

    def first_head_off(module, args):
        z = rearrange(args[0], "... (head d) -> ... head d", head=layer.n_heads).clone()
        z[..., 0, :] = 0
        return (z.flatten(-2),)

    handle = layer.module.get_submodule(layer.out).register_forward_pre_hook(first_head_off)
    wanted = plain(family)
    handle.remove()
    name = "audio.blocks.1.attn.head.0.hook_z"
    edited = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda z, hook: z * 0)])
    assert torch.equal(edited, wanted) and not torch.equal(edited, plain(family))
    pattern = "audio.blocks.0.attn.hook_pattern"
    logits, cached = model.run_with_cache(inputs, names_filter=[pattern])
    torch.testing.assert_close(logits, plain(family), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_the_decoder_hears_is_the_towers_output():
    model, inputs = model_of("qwen2_5_omni"), inputs_of("qwen2_5_omni")
    _, cached = model.run_with_cache(inputs, names_filter=["audio.hook_out", "hook_embed"])
    heard = cached["hook_embed"][0, inputs.token_maps[0].audio]
    torch.testing.assert_close(cached["audio.hook_out"][: len(heard)], heard)
    deaf = model.run_with_hooks(inputs, fwd_hooks=[("audio.hook_out", lambda x, hook: x * 0)])
    assert not torch.equal(deaf, plain("qwen2_5_omni"))


def test_sounds_that_cannot_be_heard_are_refused():
    model = model_of("qwen2_audio")
    with pytest.raises(CorelensError, match="which takes 16000"):
        model.prepare(cl.Sample(audio=[(waveform(), 44100)], question="What?"))
    with pytest.raises(CorelensError, match="outside its sound of 1.900 seconds"):
        model.prepare(sample(regions=[cl.Span(1.5, 2.5)]))
    with pytest.raises(CorelensError, match="has 0 sounds"):
        model.prepare(cl.Sample(question="What?", regions=[SPAN]))
    with pytest.raises(CorelensError, match="NaN"):
        model.prepare(cl.Sample(audio=[(np.full(9, np.nan), RATE)], question="What?"))
    with pytest.raises(CorelensError, match="is empty"):
        cl.Span(1, 1)
    demo = cl.load_demo("qwen3vl-s")
    with pytest.raises(CorelensError, match="which takes none"):
        demo.prepare(cl.Sample(audio=[(waveform(), RATE)], question="What?"))
    inputs = inputs_of("qwen2_audio")
    with pytest.raises(CorelensError, match="audio tokens in input_ids and no sound"):
        model(input_ids=inputs.tensors["input_ids"])
    with pytest.raises(CorelensError, match="cannot be read"):
        model.prepare(cl.Sample(audio=[__file__], question="What?"))


def test_a_model_whose_tokens_hear_everything_is_refused_by_name():
    hf, processor = family_audio.qwen2_audio()
    model = cl.HookedMLLM(randomise(hf), processor, check=False)
    projector = hf.model.multi_modal_projector
    handle = projector.register_forward_hook(
        lambda m, a, x: x + x[:, :40].mean(1, keepdim=True) * 1e4
    )
    model.layout.hears = SoundProbing(hf, model.layout)
    try:
        inputs = model.prepare(sample(regions=[]))
        with pytest.raises(CorelensError, match="moves wherever the sound changes"):
            inputs.token_maps[0].time(int(inputs.token_maps[0].audio[0]))
        with pytest.raises(CorelensError, match="moves wherever the sound changes"):
            _ = model.prepare(sample()).token_maps[0].region
    finally:
        handle.remove()


def test_samples_with_sounds_go_through_a_folder(tmp_path):
    saved = [sample(id="a"), sample(1, 0.5, id="b", regions=[cl.Span(0.1, 0.2, text="seven")])]
    (loaded, other) = cl.data.load_samples(cl.data.save_samples(saved, tmp_path).parent)
    assert loaded.regions == [SPAN] and other.regions[0].text == "seven"
    again = model_of("qwen2_audio").prepare(loaded)
    torch.testing.assert_close(
        again.tensors["input_features"], inputs_of("qwen2_audio").tensors["input_features"],
        atol=0.02, rtol=0,
    )  # fmt: skip
    assert torch.equal(again.token_maps[0].region, inputs_of("qwen2_audio").token_maps[0].region)


def test_a_runs_identity_holds_the_waveform():
    changed = waveform()
    changed[100] += 0.01
    other = cl.Sample(audio=[(changed, RATE)], question="What is said?", answer="7", regions=[SPAN])
    assert sample_hash([sample()]) == sample_hash([sample()]) != sample_hash([other])
