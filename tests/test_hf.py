"""Each part of transformers, accelerate and TransformerLens that nothing promises us, by name, and
the tested range.

A test that fails here says which part of `corelens/hf/` the installed versions no longer have.
"""

import inspect
import re
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

import corelens as cl
from corelens import hf
from corelens.demo import checkpoint
from corelens.hf import versions
from helpers.families import FAMILIES, rounding, tiny

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


# --- the KV cache


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_take_their_cache_under_a_name_that_we_know(family):
    model, _ = tiny(family)
    decoder = cl.HookedMLLM(model).layout.decoder(model)
    for module in (decoder, model):
        assert set(hf.CACHE_ARGUMENTS) & set(inspect.signature(type(module).forward).parameters), (
            type(module).__name__
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_are_called_with_their_cache_under_that_name_and_outputs_hold_it(family):
    model, _ = tiny.__wrapped__(family)  # (some keep positions of their last run)
    decoder = cl.HookedMLLM(model).layout.decoder(model)
    held, lengths = DynamicCache(), []

    def called(module, args, kwargs):
        assert hf.cache_in(kwargs) is held
        lengths.append(held.get_seq_length())

    handle = decoder.register_forward_pre_hook(called, with_kwargs=True)
    try:
        ids = torch.tensor([[40, 41, 42]])
        more = {"token_type_ids": torch.zeros_like(ids)} if family == "paligemma" else {}
        with torch.no_grad():
            out = model(ids, use_cache=True, **{hf.cache_argument(model): held}, **more)
            model(ids[:, :1], use_cache=True, **{hf.cache_argument(model): held})
    finally:
        handle.remove()
    assert lengths == [0, 3] and hf.cache_of(out) is held


def test_cache_in_reads_either_name_and_no_other():
    held = DynamicCache()
    assert all(
        hf.cache_in({name: held, "use_cache": True}) is held
        for name in ("cache", "past_key_values")
    )
    assert hf.cache_in({"cache": None, "past_key_values": held}) is held
    assert hf.cache_in({"caches": held}) is None


def test_cache_layers_hold_keys_and_values():
    held = DynamicCache()
    held.update(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    assert [x.shape for x in hf.cached_tensors(held)] == [(1, 2, 3, 4)] * 2


def test_cache_layers_say_their_sliding_window():
    config = tiny("gemma3")[0].config.get_text_config()
    assert hf.cache_windows(config) == [48, None, 48, None]
    assert hf.cache_windows(tiny("llava")[0].config.get_text_config()) == [None] * 4


def test_cache_layers_ask_for_nothing_that_ours_do_not_have():
    from corelens.sparse.cache import RaggedLayer

    abstract = set(CacheLayerMixin.__abstractmethods__)
    assert abstract <= set(vars(RaggedLayer)), abstract - set(vars(RaggedLayer))
    assert {"update", "get_seq_length", "get_mask_sizes"} <= set(vars(Cache))
    wanted = ["self", "key_states", "value_states", "layer_idx"]
    assert list(inspect.signature(Cache.update).parameters)[:4] == wanted


# --- attention


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_keep_the_name_of_their_attention_under_attn_implementation_internal(family):
    config = tiny(family)[0].config.get_text_config()
    before = hf.attention_name(config)
    assert before == config._attn_implementation == "sdpa"
    try:
        hf.set_attention_name(config, "eager")
        assert config._attn_implementation == "eager" != tiny(family)[0].config._attn_implementation
    finally:
        hf.set_attention_name(config, before)


def test_the_table_of_attention_functions_has_a_layer_above_the_registered_ones():
    table = hf.attention_functions()
    assert isinstance(table, AttentionInterface) and table._local_mapping == {}
    plain, calls = table["sdpa"], []

    def around(function):
        def counted(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return counted

    model, ids = tiny("llava")[0], torch.tensor([[40, 41, 42]])
    with hf.every_attention(around), torch.no_grad():
        model(ids)
        assert calls == [plain] * 4
        AttentionInterface.register("sdpa", other := lambda *args, **kwargs: plain(*args, **kwargs))
        try:
            model(ids)
        finally:
            AttentionInterface.register("sdpa", plain)
    assert calls[4:] == [other] * 4, "what is registered while the calls are watched is watched too"
    assert table["sdpa"] is plain and table._local_mapping == {}


def test_a_registered_attention_function_can_be_forgotten():
    AttentionInterface.register("corelens_test", len)
    hf.forget_attention("corelens_test")
    assert "corelens_test" not in AttentionInterface()


def test_deepstack_is_added_by_a_method_of_the_decoder():
    model = tiny("qwen3_vl")[0]
    decoder = cl.HookedMLLM(model).layout.decoder(model)
    assert list(inspect.signature(decoder._deepstack_process).parameters)[:3] == [
        "hidden_states", "visual_pos_masks", "visual_embeds",
    ]  # fmt: skip
    with hf.deepstack_addition(decoder, len):
        assert decoder._deepstack_process is len
    assert "_deepstack_process" not in vars(decoder)


# --- pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_pictures_are_taken_or_the_batch_stays_as_it_is(family):
    """A model that does not know the argument would swallow it and run without its pictures."""
    model = cl.HookedMLLM(*tiny(family))
    features = model.layout.visual_features(model.hf)
    batch = model.prepare(cl.Sample(images=[picture()], question="What?"))
    encoded = model.encode(batch)
    assert (
        hf.takes_encoded(features)
        == (hf.ENCODED in encoded.tensors)
        == ("pixel_values" not in encoded.tensors)
    )
    with torch.no_grad():
        plain = model(batch)
        torch.testing.assert_close(model(encoded), plain, atol=rounding(plain), rtol=0)


def test_a_model_without_the_argument_gets_its_pixels():
    class Old(nn.Module):
        def forward(self, pixel_values=None, **kwargs): ...

    from corelens.inputs.encode import encode
    from corelens.inputs.prepare import Inputs

    batch = Inputs({"pixel_values": torch.ones(1)}, [], [])
    assert not hf.takes_encoded(Old()) and encode(Old(), batch) is batch


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_encoders_return_pooler_output_and_deepstack_features(family):
    model = cl.HookedMLLM(*tiny(family))
    batch = model.prepare(cl.Sample(images=[picture()], question="What?")).tensors
    call = model.layout.visual_features(model.hf).get_image_features
    takes = inspect.signature(inspect.unwrap(call)).parameters
    with torch.no_grad():
        output = call(**{name: x for name, x in batch.items() if name in takes}, return_dict=True)
    features = hf.visual_features(output)
    assert len(features) == 1 + model.cfg.n_deepstack
    hf.set_visual_features(
        output, doubled := [features[0], *[[2 * x for x in f] for f in features[1:]]]
    )
    assert hf.visual_features(output) == doubled


def test_processors_keep_their_own_options_for_images_on_their_type_or_on_themselves():
    assert any("do_pan_and_scan" in options for options in hf.image_defaults(tiny("gemma3")[1]))


# --- accelerate


def test_accelerate_keeps_offloaded_weights_in_its_hook():
    from accelerate import cpu_offload

    linear = nn.Linear(2, 3)
    weight = linear.weight.detach().clone()
    model = nn.Sequential(linear)
    assert hf.offloaded(linear, "weight") is None and hf.execution_device(linear) is None
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert linear.weight.device.type == "meta"
    assert torch.equal(hf.offloaded(linear, "weight"), weight)
    assert hf.execution_device(linear) == torch.device("cpu")


def test_accelerate_puts_its_forward_on_the_module_itself():
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(2, 3))
    cpu_offload(model, execution_device=torch.device("cpu"))
    theirs = vars(model[0])["forward"]
    with hf.replaced_forward(model[0], len):
        assert model[0].forward is len
    assert vars(model[0])["forward"] is theirs and model(torch.ones(1, 2)).shape == (1, 3)


# --- TransformerLens


def test_transformer_lens_slice():
    assert torch.equal(
        hf.Slice.unwrap(hf.Slice((1, 3))).apply(torch.arange(5), dim=0), torch.tensor([1, 2])
    )


def test_transformer_lens_hooked_root_module():
    assert {"setup", "hooks", "run_with_hooks", "run_with_cache", "get_caching_hooks"} <= set(
        dir(hf.HookedRootModule)
    )


def test_transformer_lens_projects_neurons_in_a_step_of_its_own():
    step = inspect.signature(
        super(hf.LensCache, hf.LensCache)._stack_neuron_results_apply_ln_projected
    )
    assert list(step.parameters)[:5] == ["self", "layer", "pos_slice", "neuron_slice", "project_2d"]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_transformer_lens_handles_hold_torch_handles(direction):
    """And they stand in lists of their own, whatever add_hook returns."""
    point, handles = hf.LensHookPoint(), []
    for prepend in (False, False, True):
        point.add_hook(lambda x, hook: None, dir=direction, prepend=prepend)
        handles.append(hf.newest_handle(getattr(point, f"{direction}_hooks")))
    assert len({id(handle) for handle in handles}) == 3
    assert sorted(map(hf.attach_order, handles)) == [hf.attach_order(handle) for handle in handles]


# --- versions


def test_the_project_file_names_the_tested_range():
    wanted = {re.split(r"[><=]", text)[0]: text for text in PROJECT["dependencies"]}
    for package, (lowest, limit) in hf.TESTED.items():
        assert wanted[package] == f"{package}>={lowest},<{limit}"


def test_the_contract_begins_at_the_lowest_versions():
    import contract

    assert all(
        contract.LOWEST[package].startswith(hf.TESTED[package][0])
        for package in hf.TESTED
        if package != "torch"
    )
    assert contract.cap() == hf.TESTED["transformers"][1]


def test_constraints_are_names_and_versions_inside_the_range():
    """Of every package that the README's commands ask for, and without an address."""
    requirements = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in requirements if not line.startswith("#"))
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line)
        for line in requirements
        if not line.startswith("#")
    )
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): Version(text) for name, text in pins.items()}
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["dev"], *extras["data"]):
        wanted = Requirement(text)
        if wanted.name != PROJECT["name"]:
            assert pinned[wanted.name.lower()] in wanted.specifier, text


def test_the_installed_versions_are_in_the_tested_range():
    assert hf.untested() == []


@pytest.mark.parametrize(
    ("installed", "outside"),
    [
        ("5.16.1", True),
        ("5.17.0", False),
        ("5.24.3", False),
        ("5.25.0.dev0", True),
        ("5.25.0", True),
        ("6.0", True),
    ],
)
def test_a_version_outside_the_range_warns_once_and_names_the_range_and_doctor(
    monkeypatch, installed, outside
):
    real = versions.version
    monkeypatch.setattr(
        versions, "version", lambda name: installed if name == "transformers" else real(name)
    )
    hf.warn_if_untested.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                cl.HookedMLLM(*tiny("llava"))
        texts = [str(w.message) for w in caught if "not tested" in str(w.message)]
        assert len(texts) == outside
        if outside:
            assert f"transformers {installed} (tested: 5.17 and later, before 5.25)" in texts[0]
            assert "corelens doctor" in texts[0]
    finally:
        hf.warn_if_untested.cache_clear()


def test_a_package_that_says_no_version_is_not_judged(monkeypatch):
    def version(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    assert hf.untested() == []


# --- announced changes


def test_a_processor_with_an_option_that_transformers_has_dropped_still_loads(tmp_path):
    """`cap_pixels_per_frame` stands in five bundled processors, and is to be removed."""
    import json

    from transformers import AutoProcessor

    source = checkpoint("qwen3vl-s")
    for path in source.glob("*"):
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_text(path.read_text())
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    videos = settings["video_processor"]
    assert "cap_pixels_per_frame" in videos
    videos["an_option_of_another_version"] = True
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    processor = AutoProcessor.from_pretrained(tmp_path)
    frames = torch.zeros(1, 4, 3, 64, 64, dtype=torch.uint8)
    options = {
        "video_metadata": [{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}]
    }
    output = processor.video_processor(
        frames, return_tensors="pt", do_sample_frames=False, **options
    )
    assert output["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_nothing_reads_image_hidden_states():
    """From transformers 5.30 on it is something else."""
    sources = (Path(cl.__file__).parent).rglob("*.py")
    assert not [path.name for path in sources if "image_hidden_states" in path.read_text()]


# --- a hooked run


def test_a_config_answers_by_the_condition_and_keeps_its_own_name():
    config, holds = tiny("llava")[0].config.text_config, []
    before, its_class = config._attn_implementation, type(config)
    with hf.attention_named(config, lambda: bool(holds), "eager"):
        assert config._attn_implementation == before and isinstance(config, its_class)
        holds.append(True)
        assert config._attn_implementation == "eager"
        assert config.to_dict()["hidden_size"] == config.hidden_size
    assert config._attn_implementation == before and type(config) is its_class


def test_caches_that_are_not_understood_are_named():
    class PagedAttentionCache:
        pass

    caches = {
        "other_cache": DynamicCache(),
        "cache": DynamicCache(),
        "hidden_states": torch.zeros(1),
    }
    assert list(hf.unknown_caches(caches)) == ["other_cache"]
    assert list(hf.unknown_caches({"cache": PagedAttentionCache()})) == ["cache"]
    assert not hf.unknown_caches({"cache": None, "past_key_values": None})


def test_layers_say_whether_they_are_checkpointed():
    model, _ = tiny("llava")
    layers = hf_layers(model)
    assert all(layer.gradient_checkpointing is False for layer in layers)
    for layer in layers[:2]:
        layer.gradient_checkpointing = True
    with hf.checkpointing_off(model):
        assert not any(layer.gradient_checkpointing for layer in layers)
    assert [layer.gradient_checkpointing for layer in layers] == [True] * 2 + [False] * (
        len(layers) - 2
    )
    for layer in layers:
        layer.gradient_checkpointing = False


def hf_layers(model):
    return list(model.model.language_model.layers)


def test_arguments_of_a_forward_are_found_behind_its_wrappers():
    model, _ = tiny("llava")
    assert hf.takes_argument(model, "logits_to_keep") and not hf.takes_argument(
        model, "logits_to_kepp"
    )
