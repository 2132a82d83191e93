"""The parts of every decoder layer of a model.

Of a family with a layout of its own the layout says them, and the text config says how many heads.
Of every other family they are measured, layer by layer, in one forward over a few tokens: which
module calls the attention function, with how many heads; which modules' outputs are added to the
residual stream; which norm reads the stream before them. What a layer does not have is None.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from corelens.hf import looks_attention_up
from corelens.hooks.attention_function import attention, plain_z
from corelens.hooks.exchange import exchanged
from corelens.hooks.rows import Call
from corelens.hooks.running import Running, running
from corelens.layouts import Layout
from corelens.layouts.base import weight_offset
from corelens.model.first_forward import LayerCall, first_forward
from corelens.model.parts import Parts, has
from corelens.model.sums import is_norm, shallowest, with_sums
from corelens.model.towers import head_count

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu, functional.gelu, partial(functional.gelu, approximate="tanh"), functional.relu,
)  # fmt: skip


# how forwards name the states of another sequence, to which a cross-attention attends
CROSS = ("cross_attention_states", "encoder_hidden_states", "key_value_states")


def parts_of(hf: nn.Module, layout: Layout) -> list[Parts]:
    """The parts of every decoder layer of a model."""
    decoder = layout.decoder(hf)
    layers, text = list(decoder.layers), decoder.config  # type: ignore[arg-type]
    by_names = [Parts.of(layout, layer, text) for layer in layers]
    if type(layout) is not Layout:
        return by_names
    calls = first_forward(hf, layout, layers)
    return [_measured(*layer) for layer in zip(layers, by_names, calls, strict=True)]


# --- what it shows


def _measured(layer: nn.Module, named: Parts, call: LayerCall | None) -> Parts:
    """The parts of one layer as its call shows them; what cannot be told stays as its name says."""
    if call is None:
        why = "it does not run on text alone, so what it adds could not be measured"
        return replace(_crossing(layer, named), unsummed=why)
    parts = with_sums(layer, named, call)
    parts = _with_heads(layer, parts, call)
    if parts.ln1 is not None:
        parts = replace(parts, norm_weight_offset=weight_offset(layer.get_submodule(parts.ln1)))
    return _with_mlp(layer, parts, call)


def _crossing(layer: nn.Module, named: Parts) -> Parts:
    """The parts of a layer that text alone does not run: one that attends to what a tower gives.

    The layer takes states of another sequence, and so does its attention module, the one that looks
    the attention function up. (A module that serves as either, in a layer that takes none, attends
    to the row: Idefics's.)
    """
    if not _takes_another_sequence(layer):
        return named
    for path, module in layer.named_modules():
        if not looks_attention_up(module) or not _takes_another_sequence(module):
            continue
        n_heads = head_count(module, "num_heads", "num_attention_heads", "n_heads")
        projections: dict[str, Any] = {
            name: f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        if not n_heads or not all(has(layer, where) for where in projections.values()):
            continue
        width = int(layer.get_submodule(projections["q_proj"]).out_features)  # type: ignore[arg-type]
        return replace(
            named, mixer=path, attention=path, **projections, cross=True, n_heads=n_heads,
            n_kv_heads=head_count(module, "num_key_value_heads") or n_heads,
            d_head=width // n_heads,
        )  # fmt: skip
    return named


def _takes_another_sequence(module: nn.Module) -> bool:
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return any(word in name for name in names for word in CROSS)


def _source(layer: nn.Module, call: LayerCall, path: str | None) -> str | None:
    """The module itself, or, of a norm behind it, the module that the norm reads."""
    if path is None or not is_norm(layer.get_submodule(path)):
        return path
    x = call.inputs.get(path)
    return shallowest(
        other for other, y in call.outputs.items() if other and other != path and call.equal(y, x)
    )


def _with_heads(layer: nn.Module, parts: Parts, call: LayerCall) -> Parts:
    """The attention module, its heads and its projections."""
    mixer = _source(layer, call, parts.attn_out)
    if not call.attends:
        # (without a config it cannot ask for the attention function: a linear attention)
        by_name = parts.attention is not None and mixer == parts.attention
        if by_name and hasattr(layer.get_submodule(parts.attention or ""), "config"):
            # it attends without the attention function: as its names say, until a run finds it
            # silent
            return parts
        none: dict[str, Any] = {
            "attention": None,
            "q_proj": None,
            "k_proj": None,
            "v_proj": None,
            "o_proj": None,
        }
        return replace(parts, mixer=mixer, **none, n_heads=0, n_kv_heads=0, d_head=0)
    path, query, key = call.attends[0]
    n_heads, n_kv_heads, d_head = query[1], key[1], query[3]
    below = {
        other: module for other, module in layer.named_modules() if other.startswith(f"{path}.")
    }
    named: dict[str, Any] = {
        name: f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    named = {name: where if where in below else None for name, where in named.items()}
    sizes: dict[str, Any] = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head}
    parts = replace(parts, mixer=mixer or path, attention=path, **sizes, **named)
    if parts.o_proj is None:  # the last module below that gives what the attention module gives
        last = [
            other
            for other in call.outputs
            if other in below and call.equal(call.outputs[other], call.outputs[path])
        ]
        parts = replace(parts, o_proj=last[-1] if last else None)
    width = _width(call, parts.q_proj)
    if width == 2 * n_heads * d_head and _gate_is_second(layer, parts, call):
        return replace(parts, gated=True)
    q_proj = parts.q_proj if width == n_heads * d_head else None
    fits: dict[str, Any] = {n: w if _width(call, w) == n_kv_heads * d_head else None
            for n, w in (("k_proj", parts.k_proj), ("v_proj", parts.v_proj))}  # fmt: skip
    return replace(parts, q_proj=q_proj, **fits)


def _width(call: LayerCall, path: str | None) -> int | None:
    return call.outputs[path].shape[-1] if path in call.outputs else None


def _gate_is_second(layer: nn.Module, parts: Parts, call: LayerCall) -> bool:
    """Whether q_proj's output is [head, 2, d_head], of which the attention function's q reads the
    first of the two.

    Measured: the attention module runs again with the second of the two changed, and q stays as it
    was.
    """
    assert parts.q_proj is not None and parts.attention is not None
    module, q_proj = layer.get_submodule(parts.attention), layer.get_submodule(parts.q_proj)
    args, kwargs = call.arguments[parts.attention]

    def query_with_added(which: int | None) -> Tensor:
        seen: list[Tensor] = []

        def change(projection: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            halves = rearrange(
                output, "... (head two d) -> ... head two d", two=2, d=parts.d_head
            ).clone()
            if which is not None:
                halves[..., which, :] += 1
            return rearrange(halves, "... head two d -> ... (head two d)")

        def keep(query: Tensor, key: Tensor, value: Tensor, of: Call) -> Tensor:
            seen.append(query.clone())
            return plain_z(query, key, value, of)

        handle = q_proj.register_forward_hook(change)
        config: Any = module.config
        try:
            with (
                torch.no_grad(),
                exchanged(attention, [config]),
                running(Running(vision={module: keep})),
            ):
                module(*args, **kwargs)
        finally:
            handle.remove()
        return seen[0]

    query = query_with_added(None)
    return torch.equal(query_with_added(1), query) and not torch.equal(query_with_added(0), query)


def _with_mlp(layer: nn.Module, parts: Parts, call: LayerCall) -> Parts:
    """The MLP and its projections."""
    mlp = _source(layer, call, parts.mlp_out)
    if mlp is None or not has(layer, mlp):
        return replace(parts, mlp=None, mlp_gate=None, mlp_up=None, mlp_down=None, d_mlp=None)
    names = {part: f"{mlp}.{name}" for part, name in
             (("mlp_gate", "gate_proj"), ("mlp_up", "up_proj"),
             ("mlp_down", "down_proj"))}  # fmt: skip
    paths: dict[str, Any] = {
        part: path if path in call.inputs else None for part, path in names.items()
    }
    below = [path for path in call.outputs if path.startswith(f"{mlp}.")]
    if paths["mlp_down"] is None:
        last = [
            path
            for path in below
            if call.equal(call.outputs[path], call.outputs[mlp]) and path in call.inputs
        ]
        paths["mlp_down"] = last[-1] if last else None
    inner = call.inputs.get(paths["mlp_down"] or "")
    if paths["mlp_down"] is None or inner is None:
        return replace(parts, mlp=mlp, mlp_gate=None, mlp_up=None, mlp_down=None, d_mlp=None)
    if paths["mlp_gate"] is None or paths["mlp_up"] is None:
        into = {
            path: call.outputs[path] for path in below if call.outputs[path].shape == inner.shape
        }
        gate, up = _gate_and_up(call, into, inner)
        paths |= {"mlp_gate": gate, "mlp_up": up}
    return replace(parts, mlp=mlp, **paths, d_mlp=inner.shape[-1])


def _gate_and_up(
    call: LayerCall, into: dict[str, Tensor], inner: Tensor
) -> tuple[str | None, str | None]:
    """The two projections of which act(gate) · up is the MLP's inner activation."""
    for gate, x in into.items():
        for up, y in into.items():
            if gate != up and any(call.equal(act(x) * y, inner) for act in ACTIVATIONS):
                return gate, up
    return None, None
