"""Several threads, and runs inside runs: a point fires in its own run, and everything is undone by
the last to leave."""

import threading

import pytest
import torch
from transformers import AttentionInterface, GptOssConfig, GptOssForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from corelens.errors import CorelensError
from corelens.hooks import running
from corelens.model.hooked import HookedMLLM
from helpers.family_parts import TEXT, randomise
from helpers.text_models import text, text_model

Z = "blocks.1.attn.hook_z"
ROUNDS = 12


def in_threads(*functions):
    """Run these at the same time; raises what one of them raised."""
    errors, barrier = [], threading.Barrier(len(functions))

    def start(function):
        try:
            barrier.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def names_of(hf):
    return {
        module.config._attn_implementation for module in hf.modules() if hasattr(module, "config")
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_hooked_threads_and_plain_ones_do_not_meet(implementation):
    model, other = text_model(), text_model().hf
    for hf in (model.hf, other):
        hf.set_attn_implementation(implementation)
    inputs = text()
    with torch.no_grad():
        plain = model.hf(**inputs).logits
        zeroed = model.run_with_hooks(inputs, fwd_hooks=[(Z, lambda z, hook: z * 0)])
        doubled = model.run_with_hooks(
            inputs, fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x * 2)]
        )

    def hooked(name, edit, wanted):
        def run():
            with torch.no_grad():
                for _ in range(ROUNDS):
                    assert torch.equal(
                        model.run_with_hooks(inputs, fwd_hooks=[(name, edit)]), wanted
                    )

        return run

    def unhooked(run_plain):
        def run():
            with torch.no_grad():
                for _ in range(2 * ROUNDS):
                    assert torch.equal(run_plain(), plain)

        return run

    in_threads(
        hooked(Z, lambda z, hook: z * 0, zeroed),
        hooked("blocks.0.hook_resid_pre", lambda x, hook: x * 2, doubled),
        unhooked(lambda: model(inputs)),
        unhooked(lambda: model.hf(**inputs).logits),
        unhooked(lambda: other(**inputs).logits),
    )
    assert names_of(model.hf) == names_of(other) == {implementation}
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.hf.modules()
    )


def test_sinks_are_kept_in_plain_runs_beside_a_hooked_one():
    """SDPA knows no sinks: a model loaded as eager has the name "sdpa" in its hooked runs, and
    nowhere else."""
    config = GptOssConfig(
        **TEXT,
        head_dim=8,
        vocab_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model, inputs = HookedMLLM(randomise(GptOssForCausalLM(config))), text()
    with torch.no_grad():
        plain = model.hf(**inputs).logits
        beside = []

        def meanwhile(z, hook):
            def run():
                with torch.no_grad():
                    beside.append(model.hf(**inputs).logits)

            in_threads(run)

        model.run_with_hooks(inputs, fwd_hooks=[(Z, meanwhile)])
    assert torch.equal(beside[0], plain)
    assert names_of(model.hf) == {"eager"}


def test_a_thread_that_waits_for_its_turn_says_so(monkeypatch):
    monkeypatch.setattr(running, "PATIENCE", 0.05)
    model, leave = text_model(check=False), threading.Event()

    def holds():
        with model.hooks(fwd_hooks=[(Z, lambda z, hook: z * 0)]):
            leave.wait(10)

    holder = threading.Thread(target=holds)
    holder.start()
    try:
        while not any(point.active for point in model.hook_points()):
            pass
        threading.Timer(0.3, leave.set).start()
        with pytest.warns(UserWarning, match="take turns"):
            logits = model(text())
    finally:
        leave.set()
        holder.join()
    assert torch.equal(logits, model(text()))  # the other thread's hooks are not ours


# --- runs inside runs


@torch.no_grad()
def test_what_a_hook_function_runs_itself_is_no_part_of_the_run():
    model, inputs = text_model(), text()
    plain, inner = model(inputs), {}

    def look(z, hook):
        inner["plain"] = model.hf(**inputs).logits
        return z * 0

    edited = model.run_with_hooks(inputs, fwd_hooks=[(Z, look)])
    assert torch.equal(inner["plain"], plain) and not torch.equal(edited, plain)
    assert torch.equal(edited, model.run_with_hooks(inputs, fwd_hooks=[(Z, lambda z, hook: z * 0)]))

    def run_once(x, hook):
        if "cached" not in inner:
            inner["cached"] = None
            inner["cached"] = model.run_with_cache(inputs, names_filter="blocks.3.hook_resid_post")[
                1
            ]

    outer = model.run_with_hooks(
        inputs, fwd_hooks=[("blocks.0.hook_resid_pre", run_once), (Z, lambda z, hook: z * 0)]
    )
    assert torch.equal(outer, edited)
    # the hooks that hang on the model fire in the inner run as in any other
    wanted = {}
    keep = ("blocks.3.hook_resid_post", lambda x, hook: wanted.update(x=x.clone()))
    model.run_with_hooks(inputs, fwd_hooks=[(Z, lambda z, hook: z * 0), keep])
    assert torch.equal(inner["cached"]["blocks.3.hook_resid_post"], wanted["x"])


def test_a_hook_added_inside_a_hook_is_refused_where_the_run_does_not_stop():
    model, inputs, calls = text_model(), text(), []

    def add_later(x, hook):
        model.add_hook("blocks.2.attn.hook_z", lambda z, hook: calls.append(hook.name))

    with pytest.raises(CorelensError, match=r"'blocks\.2\.attn\.hook_z' inside a hook function"):
        model.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_resid_pre", add_later)])
    with pytest.raises(CorelensError, match=r"head\.1\.hook_z' inside a hook function"):
        model.run_with_hooks(
            inputs,
            fwd_hooks=[
                (
                    Z,
                    lambda z, hook: model.add_hook(
                        "blocks.2.attn.head.1.hook_z", lambda z, hook: None
                    ),
                )
            ],
        )
    # where the run stops in any case, it fires in this run
    model.run_with_hooks(
        inputs, fwd_hooks=[("blocks.0.hook_resid_pre", add_later), ("blocks.2.attn.hook_z", len_of)]
    )
    assert calls == ["blocks.2.attn.hook_z"]
    model.reset_hooks()


def len_of(z, hook):
    assert z.ndim == 4
