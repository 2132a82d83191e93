"""Path patching against a slow reference: three runs, everything cached and frozen by name.

The reference runs on a copy of the model in which every query head has KV heads of its own (the
same weights, written out), so that "this query head's keys" is an ordinary hook there.
"""

import copy
import warnings
from functools import cache

import pytest
import torch
from einops import repeat
from PIL import Image
from torch import nn

from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.inputs.prepare import Inputs, Sample
from corelens.interventions import (
    ablate,
    activation_patch,
    logit_diff,
    patch,
    path_hooks,
    path_patch,
)
from corelens.model.hooked import HookedMLLM
from corelens.tokens.regions import Box
from helpers.families import tiny

FAMILIES = ["qwen3_vl", "llava_next", "gemma3"]


def sample(seed: int, question: str = "What digit is on the red circle?") -> Sample:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (64, 96, 3), generator=generator, dtype=torch.uint8)
    return Sample(
        images=[Image.fromarray(noise.numpy())],
        question=question,
        answer="7",
        regions=[Box(10, 10, 60, 40)],
    )


@cache
def hooked(family: str) -> HookedMLLM:
    return HookedMLLM(*tiny(family))


@cache
def ungrouped(family: str) -> HookedMLLM:
    """The same function of its inputs, with a KV head for every query head."""
    model = hooked(family)
    group, hf = model.cfg.n_heads // model.cfg.n_kv_heads, copy.deepcopy(model.hf)
    hf.config.get_text_config().num_key_value_heads = model.cfg.n_heads
    for layer in model.layout.decoder(hf).layers:
        attn = layer.self_attn
        attn.num_key_value_groups = 1
        for name in ("k_proj", "v_proj"):
            old = getattr(attn, name)
            new = nn.Linear(old.in_features, old.out_features * group, bias=old.bias is not None)
            with torch.no_grad():
                spread = "(kv d) m -> (kv group d) m"
                new.weight.copy_(repeat(old.weight, spread, group=group, d=model.cfg.d_head))
                if old.bias is not None:
                    new.bias.copy_(
                        repeat(old.bias, "(kv d) -> (kv group d)", group=group, d=model.cfg.d_head)
                    )
            setattr(attn, name, new)
    return HookedMLLM(hf, model.processor)


@cache
def runs(family: str) -> tuple[Inputs, Inputs]:
    model = hooked(family)
    clean = model.prepare([sample(0), sample(1, "Which colour?")])
    return clean, model.prepare([sample(7), sample(8, "Which colour?")])


@cache
def everything(family: str, which: int) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return ungrouped(family).run_with_cache(runs(family)[which])[1].cache_dict


def measure(logits):
    """Three rows and all of the vocabulary."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    return logits[:, -1] @ weights + logits[:, -3] @ weights.flip(0) + logits[:, -6, 4]


def slow(
    family, senders, receivers, freeze_mlps=False, base=0, positions=None, receiver_positions=None
):
    """Three forwards; senders: [("L1H2" as (1, 2)) or a name]; receivers: names of the ungrouped
    model."""
    model, inputs = ungrouped(family), runs(family)[base]
    base_values, theirs = everything(family, base), everything(family, 1 - base)
    where = positions if positions is not None else torch.ones(2, inputs.length, dtype=torch.bool)

    def frozen(name):
        def set_to(x, hook):
            x = base_values[name].clone()
            for sender in senders:
                if sender == name:
                    x[where] = theirs[name][where]
                elif isinstance(sender, tuple) and name == f"blocks.{sender[0]}.attn.hook_z":
                    x[:, :, sender[1]][where] = theirs[name][:, :, sender[1]][where]
            return x

        return set_to

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(4)]
    names += [f"blocks.{layer}.hook_mlp_out" for layer in range(4)] if freeze_mlps else []
    names += [name for name in senders if isinstance(name, str) and name not in names]
    read = {}

    def recorder(name):
        def record(x, hook):
            read[name] = x.clone()

        return record

    def receive(name):
        def set_to(x, hook):
            if receiver_positions is None:
                return read[name]
            x = x.clone()
            x[receiver_positions] = read[name][receiver_positions]
            return x

        return set_to

    with torch.no_grad():
        model.run_with_hooks(
            inputs,
            fwd_hooks=[(n, frozen(n)) for n in names] + [(n, recorder(n)) for n in receivers],
        )
        return measure(model.run_with_hooks(inputs, fwd_hooks=[(n, receive(n)) for n in receivers]))


def agrees(actual, wanted, moved=True):
    torch.testing.assert_close(torch.tensor(actual), wanted, atol=1e-5, rtol=1e-5)


SENDERS = [(0, 1), (1, 2), "blocks.0.hook_mlp_out"]
RECEIVERS = {  # ours → the reference's
    "blocks.2.attn.head.1.hook_q": ["blocks.2.attn.head.1.hook_q"],
    "blocks.2.attn.head.1.hook_rot_q": ["blocks.2.attn.head.1.hook_rot_q"],
    "blocks.2.attn.head.1.hook_k": ["blocks.2.attn.head.1.hook_k"],
    "blocks.2.attn.head.2.hook_v": ["blocks.2.attn.head.2.hook_v"],
    "blocks.2.attn.kv_head.1.hook_k": [
        "blocks.2.attn.head.2.hook_k",
        "blocks.2.attn.head.3.hook_k",
    ],
    "blocks.2.attn.kv_head.0.hook_v": [
        "blocks.2.attn.head.0.hook_v",
        "blocks.2.attn.head.1.hook_v",
    ],
    "blocks.2.attn.hook_pattern": ["blocks.2.attn.hook_pattern"],
    "blocks.2.attn.head.3.hook_attn_scores": ["blocks.2.attn.head.3.hook_attn_scores"],
    "blocks.1.hook_mlp_in": ["blocks.1.ln2.hook_normalized"],
    "blocks.2.ln1.hook_normalized": ["blocks.2.ln1.hook_normalized"],
    "blocks.1.hook_mlp_out": ["blocks.1.hook_mlp_out"],
    "blocks.2.hook_resid_pre": ["blocks.2.hook_resid_pre"],
    "blocks.1.hook_resid_mid": ["blocks.1.hook_resid_mid"],
    "blocks.3.hook_resid_post": ["blocks.3.hook_resid_post"],
    "ln_final.hook_normalized": ["ln_final.hook_normalized"],
    "hook_logits": ["hook_logits"],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_every_kind_of_receiver_equals_the_slow_reference(family, freeze_mlps):
    clean, corrupted = runs(family)
    model = hooked(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a frozen MLP cannot be reached
        result = path_patch(
            model,
            clean,
            corrupted,
            SENDERS,
            list(RECEIVERS),
            measure,
            freeze_mlps=freeze_mlps,
            per="receiver",
        )
    for number, (name, names) in enumerate(RECEIVERS.items()):
        wanted = slow(family, SENDERS, names, freeze_mlps)
        torch.testing.assert_close(
            torch.tensor(result.values[:, number]),
            wanted,
            atol=1e-5,
            rtol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        if not (freeze_mlps and name.endswith("mlp_out")):
            assert result.effect[:, number].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_receivers_together_senders_each_alone_and_the_other_direction(family):
    clean, corrupted = runs(family)
    model = hooked(family)
    receivers = [
        "blocks.2.attn.head.1.hook_q",
        "blocks.2.attn.head.0.hook_k",
        "blocks.2.attn.head.0.hook_v",
        "blocks.3.hook_mlp_in",
    ]
    theirs = [*receivers[:3], "blocks.3.ln2.hook_normalized"]
    senders = [(0, 0), (0, 3), (1, 1), "blocks.0.hook_mlp_out", "hook_embed"]
    result = path_patch(
        model, clean, corrupted, senders, receivers, measure, per="sender", direction="denoising"
    )
    assert result.axes == {
        "sender": ["L0H0", "L0H3", "L1H1", "blocks.0.hook_mlp_out", "hook_embed"]
    }
    for number, sender in enumerate(senders):
        torch.testing.assert_close(
            torch.tensor(result.values[:, number]),
            slow(family, [sender], theirs, base=1),
            atol=1e-5,
            rtol=1e-5,
        )
    tight = path_patch(
        model,
        clean,
        corrupted,
        senders,
        receivers,
        measure,
        per="sender",
        direction="denoising",
        batch_tokens=1,
    )
    torch.testing.assert_close(
        torch.tensor(tight.values), torch.tensor(result.values), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_only_at_these_positions(family):
    clean, corrupted = runs(family)
    model = hooked(family)
    masks = {}
    for name in ("region", "question"):
        masks[name] = torch.zeros(2, clean.length, dtype=torch.bool)
        for line, token_map in zip(masks[name], clean.token_maps, strict=True):
            line[token_map.positions(name)] = True
    receivers = [
        "blocks.2.attn.head.1.hook_k",
        "blocks.2.attn.head.2.hook_v",
        "blocks.3.hook_resid_pre",
    ]
    roles = path_patch(
        model,
        clean,
        corrupted,
        SENDERS,
        receivers,
        measure,
        per=("role", "receiver"),
        positions=["region", "question"],
    )
    for i, role in enumerate(("region", "question")):
        for j, receiver in enumerate(receivers):
            wanted = slow(family, SENDERS, [receiver], positions=masks[role])
            torch.testing.assert_close(
                torch.tensor(roles.values[:, i, j]), wanted, atol=1e-5, rtol=1e-5
            )
    limited = path_patch(
        model, clean, corrupted, SENDERS, receivers, measure, receiver_positions="region"
    )
    wanted = slow(family, SENDERS, receivers, receiver_positions=masks["region"])
    torch.testing.assert_close(torch.tensor(limited.values), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_to_the_logits_is_noising_all_z_at_once(family):
    clean, corrupted = runs(family)
    model = hooked(family)
    heads = HeadSet((layer, head) for layer in range(4) for head in range(4))
    path = path_patch(model, clean, corrupted, heads, "hook_logits", measure)
    noised = activation_patch(model, clean, corrupted, "z", measure, per=(), direction="noising")
    torch.testing.assert_close(
        torch.tensor(path.values), torch.tensor(noised.values), atol=1e-5, rtol=1e-5
    )
    assert (abs(path.effect) > 1e-3).all()


def test_visual_features_send_what_embeddings_and_deepstack_carry():
    clean, corrupted = runs("qwen3_vl")
    model = hooked("qwen3_vl")
    names = ["hook_embed", "blocks.0.hook_deepstack", "blocks.1.hook_deepstack"]
    visual = path_patch(model, clean, corrupted, "visual", "blocks.3.attn.head.1.hook_v", measure)
    torch.testing.assert_close(
        torch.tensor(visual.values),
        slow("qwen3_vl", names, ["blocks.3.attn.head.1.hook_v"]),
        atol=1e-5,
        rtol=1e-5,
    )
    embed = path_patch(
        model, clean, corrupted, "hook_embed", "blocks.3.attn.head.1.hook_v", measure
    )
    # without DeepStack, part of the picture stays
    assert abs(embed.values - visual.values).max() > 1e-4


def test_the_hooks_by_themselves_make_the_path_run():
    """What a user would write with the factories alone."""
    model, (clean, corrupted) = hooked("qwen3_vl"), runs("qwen3_vl")
    receivers = ["blocks.3.attn.head.0.hook_q", "blocks.2.hook_resid_mid"]
    with torch.no_grad():
        _, base = model.run_with_cache(clean)
        _, other = model.run_with_cache(corrupted)
        hooks = path_hooks([(0, 1), "blocks.1.hook_mlp_out"], base=base, source=other)
        with model.hooks(fwd_hooks=hooks):
            logits, read = model.run_with_cache(clean, names_filter=receivers)
        actual = measure(model.run_with_hooks(clean, fwd_hooks=patch(receivers, read)))
    wanted = path_patch(
        model, clean, corrupted, [(0, 1), "blocks.1.hook_mlp_out"], receivers, measure
    )
    torch.testing.assert_close(actual, torch.tensor(wanted.values), atol=1e-5, rtol=1e-5)
    direct = path_patch(
        model, clean, corrupted, [(0, 1), "blocks.1.hook_mlp_out"], "hook_logits", measure
    )
    torch.testing.assert_close(measure(logits), torch.tensor(direct.values), atol=1e-5, rtol=1e-5)
    with pytest.raises(CorelensError, match="hook_z"):
        path_hooks([(0, 1)], base={"blocks.3.attn.hook_z": base["z", 3]}, source=other)


def test_what_cannot_be_reached_has_no_effect_and_a_warning():
    model, (clean, corrupted) = hooked("qwen3_vl"), runs("qwen3_vl")
    for senders, receivers, more in (
        ([(2, 1)], "blocks.1.attn.head.0.hook_q", {}),
        ([(2, 1)], "blocks.2.attn.head.0.hook_q", {}),
        ([(2, 1)], "blocks.2.attn.kv_head.0.hook_k", {}),
        (["blocks.2.hook_mlp_out"], "blocks.2.hook_mlp_in", {}),
        ([(0, 0)], "blocks.3.attn.head.0.hook_z", {}),
        (
            [(0, 1)],
            "blocks.2.attn.head.0.hook_k",
            {"positions": "last", "receiver_positions": "region"},
        ),
    ):
        with pytest.warns(UserWarning, match="cannot reach"):
            result = path_patch(model, clean, corrupted, senders, receivers, measure, **more)
        assert (result.effect == 0).all()
    # beside one that can be reached, it changes nothing
    both = [
        "blocks.1.attn.head.0.hook_q",
        "blocks.2.attn.head.0.hook_k",
        "blocks.3.attn.head.0.hook_q",
    ]
    result = path_patch(model, clean, corrupted, [(2, 1)], both, measure)
    wanted = slow("qwen3_vl", [(2, 1)], both)
    torch.testing.assert_close(torch.tensor(result.values), wanted, atol=1e-5, rtol=1e-5)
    reached = path_patch(model, clean, corrupted, [(2, 1)], "blocks.2.hook_mlp_in", measure)
    assert reached.effect.any()
    with pytest.warns(UserWarning, match="hook_logits among several"):
        path_patch(
            model,
            clean,
            corrupted,
            [(0, 1)],
            ["blocks.2.attn.head.0.hook_q", "hook_logits"],
            measure,
        )


def test_under_an_ablation_both_runs_are_ablated():
    model, (clean, corrupted) = hooked("llava_next"), runs("llava_next")
    hooks = ablate([(1, 0), (2, 3)])
    result = path_patch(
        model, clean, corrupted, [(0, 2)], ["blocks.3.attn.head.1.hook_v"], measure, hooks=hooks
    )
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, base = model.run_with_cache(clean)
        _, other = model.run_with_cache(corrupted)
        with model.hooks(fwd_hooks=path_hooks([(0, 2)], base=base, source=other)):
            _, read = model.run_with_cache(clean, names_filter="blocks.3.attn.kv_head.0.hook_v")
    alone = {"blocks.3.attn.head.1.hook_v": read["blocks.3.attn.kv_head.0.hook_v"]}
    reference = ungrouped("llava_next")
    with torch.no_grad():
        wanted = measure(
            reference.run_with_hooks(
                clean, fwd_hooks=hooks + patch("blocks.3.attn.head.1.hook_v", alone)
            )
        )
    torch.testing.assert_close(torch.tensor(result.values), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_equals_transformer_lens_direct_path_patching(component, tmp_path):
    """Its exact edge intervention runs on text alone, and on k and v only without grouped heads."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.patching import get_act_patch_direct_path
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = hooked("llava_next") if component == "q" else ungrouped("llava_next")
    text = LlamaForCausalLM(model.hf.config.get_text_config())
    text.model.load_state_dict(model.layout.decoder(model.hf).state_dict())
    text.lm_head.load_state_dict(model.hf.lm_head.state_dict())
    text.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), tokenizer=AutoTokenizer.from_pretrained(tmp_path)
    ).eval()
    clean, corrupted = (
        torch.tensor([[5, 9, 33, 60, 70, 80, 12]]),
        torch.tensor([[5, 9, 44, 60, 71, 80, 12]]),
    )

    def difference(logits):
        return logits[:, -1, 3] - logits[:, -1, 9]

    with torch.no_grad():
        caches = [bridge.run_with_cache(ids)[1] for ids in (clean, corrupted)]
        wanted = get_act_patch_direct_path(
            bridge,
            corrupted,
            *caches,
            difference,
            src_layer=1,
            src_head=2,
            component=component,
            verbose=False,
        )
    receivers = [
        f"blocks.{layer}.attn.head.{head}.hook_{component}" for layer in (2, 3) for head in range(4)
    ]
    ours = path_patch(
        model, model.inputs(input_ids=clean), model.inputs(input_ids=corrupted), [(1, 2)], receivers, difference,
        freeze_mlps=True, direction="denoising", per="receiver",
    )  # fmt: skip
    assert (abs(ours.effect) > 1e-6).all()
    torch.testing.assert_close(
        torch.tensor(ours.values).reshape(2, 4), wanted[2:], atol=1e-5, rtol=0
    )


def test_mistakes_are_named():
    model, (clean, corrupted) = hooked("qwen3_vl"), runs("qwen3_vl")
    for senders, receivers, more, message in (
        ([(7, 0)], "hook_logits", {}, "another model"),
        ([(0, 9)], "hook_logits", {}, "another model"),
        (["blocks.0.attn.hook_pattern"], "hook_logits", {}, "residual stream"),
        ([(0, 0)], "blocks.2.attn.head.0.hook_qq", {}, "hook name"),
        ([(0, 0)], [], {}, "no receivers"),
        ([], "hook_logits", {}, "no senders"),
        ([(0, 0)], "hook_logits", {"per": "head"}, "sender, receiver"),
        ([(0, 0)], "hook_logits", {"direction": "up"}, "denoising"),
        ([(0, 0)], "hook_logits", {"metric": None}, "no metric"),
        ([(0, 0)], "hook_logits", {"metric": lambda logits: logits[:, -1]}, "one number a sample"),
        ([(0, 0)], "hook_logits", {"metric": logit_diff("7", "77")}, "2 tokens"),
    ):
        options = {"metric": measure} | more
        with pytest.raises(CorelensError, match=message):
            path_patch(model, clean, corrupted, senders, receivers, **options)
