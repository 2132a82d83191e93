"""From a hook point to the place in the Hugging Face model where it fires.

What happens inside attention is reached by the attention function. All else is an ordinary module hook, placed for
the time of one run, and only for points on which something hangs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from corelens.attention import Running, Step, implementation, running
from corelens.errors import CorelensError
from corelens.hooks import BlockPoints, HookPoint, NormPoints
from corelens.layouts.base import Layout


@contextmanager
def wired(
    hf: nn.Module,
    layout: Layout,
    root: Any,
    run: Running,
    begin: Callable[[Tensor, int, bool], Step],
) -> Iterator[None]:
    """Within this context a forward of `hf` fires every active point of `root`; afterwards `hf` is as it was.

    Args:
        hf: the Hugging Face model.
        layout: where its modules are.
        root: what holds the points: hook_embed, blocks, ln_final, hook_logits.
        run: its `step` is set whenever the decoder begins, its `sites` here.
        begin: begin(the new tokens' embeddings, how many tokens came before, whether there is a cache) → the Step.
    """
    decoder = layout.decoder(hf)
    layers = list(decoder.layers)  # type: ignore[arg-type]
    with ExitStack() as stack:

        def place(handle: Any) -> None:
            stack.callback(handle.remove)

        def decoder_begins(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
            so_far = int(cache.get_seq_length()) if cache is not None else 0
            run.step = begin(embeds, so_far, cache is not None)
            if root.hook_embed.active:
                return args, kwargs | {"inputs_embeds": run.fire(root.hook_embed, embeds)}
            return None

        place(decoder.register_forward_pre_hook(decoder_begins, with_kwargs=True))
        for points, layer in zip(root.blocks, layers, strict=True):
            for handle in _place_block(run, layout, points, layer):
                place(handle)
            if any(point.active for point in points.attn.in_function):
                run.sites[layer.get_submodule(layout.attention)] = points.attn
        for handle in _place_norm(run, layout, root.ln_final, decoder, "norm"):
            place(handle)
        if root.hook_logits.active:
            place(hf.register_forward_hook(_on_logits(run, root.hook_logits)))

        added = [points.hook_deepstack for points in root.blocks if hasattr(points, "hook_deepstack")]
        if any(point.active for point in added):
            stack.enter_context(layout.deepstack(decoder, lambda layer, x: run.fire(added[layer], x)))
        if run.sites:
            configs = {id(config): config for config in [decoder.config, *(m.config for m in run.sites)]}  # type: ignore[union-attr]
            stack.enter_context(implementation(list(configs.values())))
        stack.enter_context(running(run))
        yield


def _place_block(run: Running, layout: Layout, points: BlockPoints, layer: nn.Module) -> Iterator[Any]:
    attn, mlp = points.attn, points.mlp
    before = [  # the point's tensor goes into the module
        (points.hook_resid_pre, "", _on_input),
        (points.hook_resid_mid, layout.ln2, _on_shared_input),
        (mlp.hook_post, layout.mlp_down, _on_input),
    ]
    after = [  # it comes out of the module
        (attn.hook_q, layout.q_proj, _on_output),
        (attn.hook_k, layout.k_proj, _on_output),
        (attn.hook_result, layout.o_proj, _on_result),
        (points.hook_attn_out, layout.attn_out, _on_output),
        (mlp.hook_pre, layout.mlp_gate, _on_output),
        (points.hook_mlp_out, layout.mlp_out, _on_output),
        (points.hook_resid_post, "", _on_output),
    ]
    for point, path, make in before:
        if point.active:
            module = _module(layer, path, point)
            yield module.register_forward_pre_hook(make(run, point), with_kwargs=True)
    for point, path, make in after:
        if point.active:
            yield _module(layer, path, point).register_forward_hook(make(run, point))
    yield from _place_norm(run, layout, points.ln1, layer, layout.ln1)
    yield from _place_norm(run, layout, points.ln2, layer, layout.ln2)


def _module(layer: nn.Module, path: str, point: HookPoint) -> nn.Module:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        raise CorelensError(
            f"a hook on {point.name!r}",
            f"a layer with a module {path!r} (a mixture-of-experts layer has no single MLP, some models fuse projections)",
            "hook hook_mlp_out or hook_attn_out, or another layer",
        ) from None


# --- what hangs on a module -------------------------------------------------------------------------------------------


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _on_output(run: Running, point: HookPoint) -> Callable[..., Any]:
    """The module's output is the point's tensor (split into heads where the point counts heads)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = _first(output)
        seen = x if point.head_axis is None else rearrange(x, "... (head d) -> ... head d", head=point.n_heads)
        edited = run.fire(point, seen)
        if edited is seen:
            return None
        edited = edited if point.head_axis is None else rearrange(edited, "... head d -> ... (head d)")
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook


def _on_input(run: Running, point: HookPoint) -> Callable[..., Any]:
    """The module's first input is the point's tensor."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (run.fire(point, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": run.fire(point, kwargs["hidden_states"])}

    return hook


def _on_shared_input(run: Running, point: HookPoint) -> Callable[..., Any]:
    """The module's input is the point's tensor, and the layer goes on using it (residual stream): written in place."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["hidden_states"]
        # With gradients the hooks get a copy: what they save for backward must not be overwritten.
        seen = x.clone() if torch.is_grad_enabled() and x.requires_grad else x
        edited = run.fire(point, seen)
        if edited is not x:
            x.copy_(edited)

    return hook


def _place_norm(run: Running, layout: Layout, points: NormPoints, parent: nn.Module, path: str) -> Iterator[Any]:
    if points.hook_scale.active or points.hook_normalized.active:
        norm = _module(parent, path, points.hook_normalized)
        yield norm.register_forward_hook(_on_norm(run, points, layout.norm_weight_offset))


def _on_norm(run: Running, points: NormPoints, offset: float) -> Callable[..., Any]:
    """What a norm does, taken apart: x / scale = normalized, normalized · weight (+ bias) = output."""

    def hook(norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0].float()
        if isinstance(norm, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        eps: float = getattr(norm, "variance_epsilon", None) or norm.eps  # type: ignore[assignment]
        scale, scaled = run.fire_watched(points.hook_scale, (x.pow(2).mean(-1, keepdim=True) + eps).sqrt())
        normalized, edited = run.fire_watched(points.hook_normalized, (x / scale).to(output.dtype))
        if not (scaled or edited):
            return None
        weight = norm.weight if not offset else offset + norm.weight  # type: ignore[operator]
        edited_output = normalized * weight  # type: ignore[operator]
        bias = getattr(norm, "bias", None)
        return (edited_output if bias is None else edited_output + bias).to(output.dtype)

    return hook


def _on_result(run: Running, point: HookPoint) -> Callable[..., Any]:
    """What each head adds: result_h = z_h · W_O[h]; Σ_h result + bias is the projection's output."""

    def hook(o_proj: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        z = rearrange(args[0], "... (head d) -> ... head d", head=point.n_heads)
        w_o = rearrange(o_proj.weight, "model (head d) -> head d model", head=point.n_heads)  # type: ignore[arg-type]
        result = torch.einsum("...hd,hdm->...hm", z, w_o)
        edited, changed = run.fire_watched(point, result)
        if not changed:
            return None
        edited = edited.sum(-2)
        return edited if o_proj.bias is None else edited + o_proj.bias  # type: ignore[operator]

    return hook


def _on_logits(run: Running, point: HookPoint) -> Callable[..., Any]:
    def hook(hf: nn.Module, args: Any, output: Any) -> Any:
        output.logits = run.fire(point, output.logits)
        return output

    return hook
