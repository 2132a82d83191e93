"""Code written for TransformerLens: filters of names, layers of points, bound inputs, losses,
circuits, neurons."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import HookedRootModule
from transformer_lens.head_detector import detect_head
from transformer_lens.hook_points import HookPoint
from transformer_lens.tools.analysis import direct_logit_attribution, logit_lens

from corelens.errors import CorelensError
from corelens.model.bound import BoundModel, bind
from helpers.families import FAMILIES
from helpers.family_runs import alone, batch_of, hooked

over_families = pytest.mark.parametrize("family", FAMILIES)


# --- functions of names


@torch.no_grad()
@over_families
def test_a_function_of_names_sees_the_decoders_points_only(family):
    """TransformerLens's own filters, by the end of a name; in hooks, caches and added hooks
    alike."""
    model, batch = hooked(family), alone(family, 0)
    seen = []

    def look(x, hook):
        assert x.ndim == 4 and x.shape[0] == len(batch)
        seen.append((hook.name, hook.layer()))

    model.run_with_hooks(batch, fwd_hooks=[(lambda name: name.endswith("pattern"), look)])
    assert seen == [(f"blocks.{n}.attn.hook_pattern", n) for n in range(4)]
    names = []
    model.run_with_hooks(
        batch, fwd_hooks=[(lambda name: True, lambda x, hook: names.append(hook.name) or x * 1)]
    )
    assert not [name for name in names if name.startswith("vision.") or name.endswith("hook_edges")]
    _, cached = model.run_with_cache(batch, names_filter=lambda name: name.endswith("hook_z"))
    assert list(cached) == [f"blocks.{n}.attn.hook_z" for n in range(4)]
    model.add_hook(lambda name: name.endswith("resid_post"), lambda x, hook: None)
    model.add_perma_hook(lambda name: name.endswith("hook_q"), lambda x, hook: None)
    hung = sorted(point.name for point in model.hook_points() if point.active)
    assert hung == sorted(
        f"blocks.{n}.{p}" for n in range(4) for p in ("hook_resid_post", "attn.hook_q")
    )
    model.reset_hooks(including_permanent=True)
    assert not any(point.active for point in model.hook_points())


@torch.no_grad()
@over_families
def test_a_function_that_means_vision_or_edges_alone_is_told_to_name_them(family):
    model, batch = hooked(family), alone(family, 0)
    vision = [name for name in model.hook_names("vision.") if name.endswith("hook_resid_post")]
    _, cached = model.run_with_cache(batch, names_filter=vision)  # by name they are there
    assert list(cached) == vision
    for means in (
        lambda name: name.startswith("vision."),
        lambda name: name.endswith("hook_edges"),
    ):
        with pytest.raises(CorelensError, match="these names themselves"):
            model.run_with_cache(batch, names_filter=means)
        with pytest.raises(CorelensError, match="these names themselves"):
            model.run_with_hooks(batch, fwd_hooks=[(means, lambda x, hook: None)])
    assert len(model.run_with_cache(batch, names_filter=lambda name: False)[1]) == 0


@over_families
def test_every_point_of_a_layer_knows_its_layer(family):
    model = hooked(family)
    for name, point in model.hook_dict.items():
        if "blocks." in name:
            assert point.layer() == int(name.removeprefix("vision.").split(".")[1])
        else:
            with pytest.raises(CorelensError, match="layer of"):
                point.layer()
    assert model.hook_dict["blocks.3.attn.head.1.hook_z"].layer() == 3


# --- bound inputs


@torch.no_grad()
@over_families
def test_a_bound_model_runs_generates_and_hooks(family):
    model, batch = hooked(family), alone(family, 0)
    bound, plain = bind(model, batch), model(batch)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    ids = model.generate(batch, **options)
    for tokens in (None, bound.tokens, batch, bound.tokens[0]):
        assert torch.equal(bound.generate(tokens, **options), ids) and torch.equal(
            bound(tokens), plain
        )
    zero = [("blocks.1.attn.hook_z", lambda z, hook: z * 0)]
    with bound.hooks(fwd_hooks=zero) as inside:
        assert isinstance(inside, BoundModel)
        edited = inside(bound.tokens)
        assert inside.generate(max_new_tokens=1).shape == (1, 1)
    assert torch.equal(edited, model.run_with_hooks(batch, fwd_hooks=zero)) and not torch.equal(
        edited, plain
    )
    assert torch.equal(bound(bound.tokens, return_type="loss"), model(batch, return_type="loss"))
    assert torch.equal(bound.loss_fn(plain, bound.tokens), model(batch, return_type="loss"))
    with pytest.raises(CorelensError, match="not the bound ones"):
        bound(bound.tokens + 1)


@over_families
def test_texts_of_a_bound_model(family):
    """The bound prompt gives the bound tokens, another text its own; tokens become text again."""
    model, batch = hooked(family), batch_of(family)
    single, two = bind(model, alone(family, 0)), bind(model, batch)
    assert torch.equal(single.to_tokens(), single.tokens) and torch.equal(
        two.to_tokens(), two.tokens
    )
    prompt = single.to_string(single.tokens[0])
    assert torch.equal(single.to_tokens(prompt), single.tokens) and single.to_string(
        single.tokens
    ) == [prompt]
    other = single.to_tokens("Paris is in")
    assert other.shape[0] == 1 and single.to_string(other[0]) == "Paris is in"
    assert not torch.equal(other, single.to_tokens("Rome is in"[:11]))
    assert single.to_tokens("Rome", prepend_bos=True).shape[1] == len("Rome") + (
        model.tokenizer.bos_token_id is not None
    )
    assert (
        len(two.to_str_tokens(two.tokens)) == 2
        and "".join(single.to_str_tokens(single.tokens)) == prompt
    )
    assert (
        single.to_str_tokens("abc")
        == single.to_str_tokens(single.to_tokens("abc"))
        == ["a", "b", "c"]
    )
    with pytest.raises(CorelensError, match="one length"):
        single.to_tokens(["a", "bc"])
    with pytest.raises(CorelensError, match=r"model\.prepare"):
        model.to_tokens("Paris is in")


@torch.no_grad()
def test_transformer_lenss_head_detector_on_the_bound_prompt():
    model = hooked("llava")
    bound = bind(model, alone("llava", 0))
    prompt = bound.to_string(bound.tokens[0])
    _, cache = bound.run_with_cache(
        bound.tokens, remove_batch_dim=True, names_filter=lambda name: name.endswith("hook_pattern")
    )
    scores = detect_head(bound, prompt, "previous_token_head", cache=cache)
    wanted = torch.stack([cache["pattern", n].diagonal(-1, -2, -1).sum(-1) / cache["pattern", n].sum((-1, -2)) for n in range(4)])  # fmt: skip
    torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=1e-5)
    # another text is not scored as if it were the prompt
    with pytest.raises((RuntimeError, AssertionError)):
        detect_head(bound, "text that is not the prompt", "previous_token_head", cache=cache)


@torch.no_grad()
def test_transformer_lenss_analysis_tools_on_the_bound_prompt():
    bound = bind(hooked("llava"), alone("llava", 0))
    logits, cache = bound.run_with_cache(bound.tokens)
    lens = logit_lens(bound, cache=cache)
    assert lens.labels == ["0_pre", "1_pre", "2_pre", "3_pre", "final_post"]
    torch.testing.assert_close(lens.values[-1], logits[:, -1])
    for unit in ("component", "head"):
        parts = direct_logit_attribution(
            bound, bound.tokens, answer_tokens=7, unit=unit, cache=cache
        )
        torch.testing.assert_close(parts.attribution.sum(0), logits[:, -1, 7])


@torch.no_grad()
def test_an_added_hook_stays_after_a_run_as_in_transformer_lens():
    class Toy(HookedRootModule):
        def __init__(self):
            super().__init__()
            self.point = HookPoint()
            self.setup()

        def forward(self, x):
            return self.point(x)

    def zero(x, hook):
        return x * 0

    model, batch = hooked("llava"), alone("llava", 0)
    runs = {
        "run_with_cache": lambda of, x: of.run_with_cache(x),
        "run_with_hooks": lambda of, x: of.run_with_hooks(x, fwd_hooks=[]),
    }
    for name, run in runs.items():
        stays = []
        for of, x, point in (
            (Toy(), torch.ones(2), "point"),
            (model, batch, "blocks.1.attn.hook_z"),
        ):
            before = of(x)
            of.hook_dict[point].add_hook(zero)
            try:
                run(of, x)
                stays.append(not torch.equal(of(x), before))
            finally:
                of.reset_hooks()
            assert torch.equal(of(x), before)
        assert stays == [True, True], name


# --- weights


@torch.no_grad()
@over_families
def test_qk_and_ov_circuits_expand_key_value_heads(family):
    model = hooked(family)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for layer, head in ((0, 0), (3, model.cfg.n_heads - 1)):
        attn, kv = model.blocks[layer].attn, head // group
        qk, ov = attn.W_Q[head] @ attn.W_K[kv].T, attn.W_V[kv] @ attn.W_O[head]
        for circuit, wanted in ((model.QK, qk), (model.OV, ov)):
            torch.testing.assert_close(circuit.AB[layer, head], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attn.OV.AB[head], ov, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(attn.QK.AB[head], qk, atol=1e-5, rtol=1e-5)
    assert model.OV.svd()[1].shape[:2] == (4, model.cfg.n_heads)
    assert model.embed.W_E is model.hf.get_input_embeddings().weight and torch.equal(
        model.W_E, model.embed.W_E
    )
    ids = torch.tensor([[3, 4]])
    assert torch.equal(model.embed(ids), model.hf.get_input_embeddings()(ids))


@torch.no_grad()
def test_switches_of_transformer_lens_change_nothing():
    model, batch = hooked("qwen3_vl"), alone("qwen3_vl", 0)
    plain, names = model(batch), model.hook_names()
    for switch in ("attn_result", "hook_mlp_in", "attn_in", "split_qkv_input"):
        getattr(model, f"set_use_{switch}")(True)
    assert torch.equal(model(batch), plain) and model.hook_names() == names
    with pytest.raises(CorelensError, match="nearest"):
        model.run_with_hooks(batch, fwd_hooks=[("blocks.0.hook_q_input", lambda x, hook: x)])


# --- neurons


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
@pytest.mark.parametrize("width", [None, 3])
def test_projected_neuron_results_are_the_projections_of_neuron_results(family, width):
    """Behind a norm after the MLP, too; and no [pos, d_mlp, d_model] is built."""
    model, batch = hooked(family), alone(family, 0)
    _, cache = model.run_with_cache(batch)
    onto = torch.randn(model.cfg.d_model, *([] if width is None else [width]))
    whole = cache.get_neuron_results(1)
    with Largest() as largest:
        actual = cache.get_neuron_results(1, project_output_onto=onto)
    torch.testing.assert_close(actual, whole @ onto, atol=1e-4, rtol=1e-4)
    assert largest.elements < whole.numel() / 4
    two_neurons = cache.get_neuron_results(1, [2, 5], -1, onto)
    torch.testing.assert_close(two_neurons, (whole @ onto)[:, -1, [2, 5]], atol=1e-4, rtol=1e-4)
    for apply_ln in (False, True):
        options = {"pos_slice": (-6, None), "apply_ln": apply_ln}
        stack = cache.stack_neuron_results(3, **options)
        with Largest() as largest:
            actual = cache.stack_neuron_results(3, project_output_onto=onto, **options)
        torch.testing.assert_close(actual, stack @ onto, atol=1e-4, rtol=1e-4)
        assert largest.elements < stack.numel() / 4
    torch.testing.assert_close(whole.sum(-2), cache["mlp_out", 1], atol=1e-4, rtol=1e-4)
