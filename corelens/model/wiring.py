"""From a hook point to the module of the Hugging Face model at which it fires.

The points inside attention fire in the attention function. All others are ordinary module hooks,
which are registered for one run, and only for points that have a hook function.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import cache_in, checkpointing_off, unknown_caches
from corelens.hooks.attention_function import attention
from corelens.hooks.exchange import exchanged
from corelens.hooks.points import HookPoint
from corelens.hooks.prefix import SharedPrefix
from corelens.hooks.running import Running, Step, edits_before_caching, running
from corelens.layouts.base import Layout
from corelens.model.module_hooks import (
    on_added,
    on_half,
    on_input,
    on_logits,
    on_norm,
    on_output,
    on_result,
    on_shared_input,
)
from corelens.model.parts import Parts
from corelens.model.tower_hooks import wired_tower
from corelens.model.weights import Block, Norm

# begin(the new tokens: ids [batch, pos] or embeddings, how many tokens came before, whether there
# is a cache)
Begin = Callable[[Tensor, int, bool], Step]

NEWER = "run `corelens doctor`: this version of transformers may be newer than the tested ones"


@contextmanager
def wired(hf: nn.Module, layout: Layout, root: Any, run: Running, begin: Begin) -> Iterator[None]:
    """Within this context a forward of `hf` fires every active point of `root`; afterwards `hf` is
    as it was.

    Args:
        hf: the Hugging Face model.
        layout: where its modules are.
        root: what holds the points: hook_embed, blocks, ln_final, hook_logits, vision.
        run: its `step` is set whenever the decoder begins, its `sites` here.
        begin: makes the Step of a forward of the decoder.
    """
    decoder = layout.decoder(hf)
    layers = list(decoder.layers)  # type: ignore[arg-type]
    with ExitStack() as stack:

        def track(handle: Any) -> None:
            stack.callback(handle.remove)

        caching = stack.enter_context(ExitStack())
        track(decoder.register_forward_pre_hook(_on_decoder(run, begin, caching), with_kwargs=True))
        track(decoder.register_forward_hook(_after_decoder(run), with_kwargs=True))
        track(decoder.register_forward_hook(lambda *_: caching.close(), always_call=True))
        if root.hook_embed.active:
            # At the first layer, not at the decoder: some decoders merge the pictures in
            # themselves, by the ids.
            track(
                layers[0].register_forward_pre_hook(
                    on_input(run, root.hook_embed), with_kwargs=True
                )
            )
        for points, layer in zip(root.blocks, layers, strict=True):
            for handle in _wire_block(run, points, layer):
                track(handle)
            attends = points.parts.attention is not None
            if attends and (
                run.sparse_plan is not None
                or any(point.active for point in points.attn.in_function)
            ):
                run.sites[layer.get_submodule(points.parts.attention)] = points.attn
        for handle in _wire_norm(run, root.ln_final):
            track(handle)
        if root.hook_logits.active:
            track(hf.register_forward_hook(on_logits(run, root.hook_logits)))

        added = [
            points.hook_deepstack for points in root.blocks if hasattr(points, "hook_deepstack")
        ]
        if any(point.active for point in added):
            stack.enter_context(
                layout.deepstack(decoder, lambda layer, x: run.fire(added[layer], x), len(added))
            )
        for tower in root.towers:
            stack.enter_context(wired_tower(tower, run))
        if run.sites or run.vision:
            # The masks are made by the decoder's config, in some models by the config that holds
            # it.
            text = hf.config.get_text_config()  # type: ignore[union-attr, operator]
            held = [text, decoder.config] if run.sites else []
            held += [m.config for m in (*run.sites, *run.vision) if hasattr(m, "config")]
            configs = {id(config): config for config in held}
            stack.enter_context(exchanged(attention, list(configs.values())))
        # hooks are not for compiled code: what is compiled runs as it was written
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if torch.is_grad_enabled() and stack.enter_context(checkpointing_off(hf)):
            warnings.warn(
                "gradient checkpointing is off for this run: a layer that is computed again for "
                "the backward pass "
                "would be computed without its hooks. The run takes as much memory as without "
                "checkpointing",
                stacklevel=2,
            )
        stack.enter_context(running(run))
        yield


def _on_decoder(run: Running, begin: Begin, caching: ExitStack) -> Callable[..., None]:
    """The decoder begins: its new tokens are counted on from those that the cache holds.

    Its arguments stay as they are: what it makes of ids, and of pictures by them, is its own
    affair.
    """

    def hook(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not run.live:
            return
        tokens = next(
            x
            for x in (kwargs.get("inputs_embeds"), kwargs.get("input_ids"), *args)
            if x is not None
        )
        cache = _cache_of_step(run, decoder, kwargs, tokens.shape[1])
        so_far = int(cache.get_seq_length()) if cache is not None else 0
        run.step = begin(tokens, so_far, cache is not None)
        run.prefix = cache if isinstance(cache, SharedPrefix) else None
        run.stored.clear()
        if run.sparse_plan is not None:
            run.sparse_plan.begin(
                run.inputs, so_far, tokens.shape[1], tokens.shape[0], tokens.device, cache
            )
        if cache is not None and any(
            p.hook_rot_k.active or p.hook_v.active for p in run.sites.values()
        ):
            caching.enter_context(edits_before_caching(cache, run))

    return hook


def _after_decoder(run: Running) -> Callable[..., None]:
    """After the prompt and after the first decode step: the cache holds as many tokens as were
    counted."""
    steps = 0

    def hook(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        nonlocal steps
        cache = cache_in(kwargs)
        # Not at every step, because reading a length may wait for the GPU; not under a sparse plan,
        # because its cache evicts tokens.
        generating = run.live and run.generating and run.sparse_plan is None
        if not (generating and run.step and cache is not None) or steps == 2:
            return
        steps += 1
        if (length := int(cache.get_seq_length())) != run.step.total:
            raise CorelensError(
                f"a KV cache that counts {length} tokens where {run.step.total} have passed",
                "as many",
                NEWER,
            )

    return hook


def _cache_of_step(run: Running, decoder: nn.Module, kwargs: dict[str, Any], new: int) -> Any:
    """The KV cache of this forward of the decoder, or None.

    Raises CorelensError for one that is not understood: positions would begin at 0 again, and
    nothing would say so.
    """
    cache = cache_in(kwargs)
    refused = unknown_caches(kwargs)
    if refused:
        name, value = next(iter(refused.items()))
        raise CorelensError(
            f"{type(decoder).__name__} called with {name}={type(value).__name__}(…)",
            "a KV cache of transformers under a name that CoreLens knows, whose length it can read",
            NEWER,
        )
    if cache is None and run.generating and run.step is not None and new < run.step.total:
        raise CorelensError(
            f"a step of generation with {new} new token(s) after {run.step.total}, and no KV "
            "cache with it",
            "the cache of the tokens before, from which their number is read",
            NEWER,
        )
    return cache


def absent(points: Block, layer: nn.Module) -> dict[str, str]:
    """The names, below this layer's, of points that the layer cannot have, each with the reason."""
    parts = points.parts
    needs = {
        name: path for name, _, path, _ in (*_points_on_inputs(points), *_points_on_outputs(points))
    }
    for name, path in (("ln1", parts.ln1), ("ln2", parts.ln2)):
        needs |= {f"{name}.hook_scale": path, f"{name}.hook_normalized": path}
    for name, _ in points.attn.named_children():
        needs.setdefault(f"attn.{name}", parts.attention)
    return {name: _reason(parts, layer, name) for name, path in needs.items() if path is None}


def _reason(parts: Parts, layer: nn.Module, name: str) -> str:
    """Why a layer has no point of this name."""
    if name.startswith("attn.") and parts.attention is None:
        mixer = None if parts.mixer is None else layer.get_submodule(parts.mixer)
        what = (
            "no attention"
            if mixer is None
            else f"a {type(mixer).__name__} ({parts.mixer!r}) and no attention"
        )
        return f"it has {what}, so there are no heads; hook_attn_out is its output"
    if name.startswith("mlp.") and parts.mlp is not None:
        return "it has a mixture of experts, or projections that are fused, not one MLP of three"
    return "it has no module of its own for this"


# A point, by its name below the layer; the module at which it fires (None: there is none); and what
# is placed there.
Wires = list[tuple[str, HookPoint, str | None, Callable[..., Callable[..., Any]]]]


def _points_on_inputs(points: Block) -> Wires:
    """Points whose tensor goes into a module."""
    return [
        ("hook_resid_pre", points.hook_resid_pre, "", on_input),
        ("hook_resid_mid", points.hook_resid_mid, points.parts.ln2, on_shared_input),
        ("mlp.hook_post", points.mlp.hook_post, points.parts.mlp_down, on_input),
    ]


def _points_on_outputs(points: Block) -> Wires:
    """Points whose tensor comes out of a module."""
    attn, parts = points.attn, points.parts
    wires: Wires = [
        ("attn.hook_q", attn.hook_q, parts.q_proj, on_output),
        ("attn.hook_k", attn.hook_k, parts.k_proj, on_output),
        ("attn.hook_result", attn.hook_result, parts.o_proj, on_result),
        ("hook_attn_out", points.hook_attn_out, parts.attn_out, on_added(parts.attn_scale)),
        ("mlp.hook_pre", points.mlp.hook_pre, parts.mlp_gate, on_output),
        ("hook_mlp_out", points.hook_mlp_out, parts.mlp_out, on_added(parts.mlp_scale)),
        ("hook_resid_post", points.hook_resid_post, "", on_output),
    ]
    if parts.gated:
        wires[0] = ("attn.hook_q", attn.hook_q, parts.q_proj, on_half(0))
        wires.append(("attn.hook_gate", attn.hook_gate, parts.q_proj, on_half(1)))
    return wires


def _wire_block(run: Running, points: Block, layer: nn.Module) -> Iterator[Any]:
    for _, point, path, make in _points_on_inputs(points):
        if point.active and path is not None:
            yield layer.get_submodule(path).register_forward_pre_hook(
                make(run, point), with_kwargs=True
            )
    for _, point, path, make in _points_on_outputs(points):
        if point.active and path is not None:
            # first of all hooks there: what transformers records as hidden states is what the hooks
            # leave
            yield layer.get_submodule(path).register_forward_hook(make(run, point), prepend=True)
    yield from _wire_norm(run, points.ln1)
    yield from _wire_norm(run, points.ln2)


def _wire_norm(run: Running, points: Norm) -> Iterator[Any]:
    if points.hook_scale.active or points.hook_normalized.active:
        yield points.norm.register_forward_hook(on_norm(run, points))
