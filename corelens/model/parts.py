"""The parts of each decoder layer: where its attention, norms and MLP are, and how many heads it
has.

Of a family with a layout of its own the layout says it, and the text config says how many heads. Of
every other family it is measured, layer by layer, in one forward over a few tokens: which module
calls the attention function, with how many heads; which modules' outputs are added to the residual
stream; which norm reads the stream before them. What a layer does not have is None.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
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
from corelens.hooks.running import Running, running, turn
from corelens.layouts import Layout
from corelens.layouts.base import weight_offset
from corelens.model.self_check import evaluating
from corelens.model.towers import head_count

TOKENS = 6
CROSS = ("cross_attention_states", "encoder_hidden_states", "key_value_states")
DEPTH = 2  # modules below a layer that are looked at: layer.mlp.down_proj is at 2
# of the largest number: what a sum may be off, in float32 and in half precision
EXACT, HALF = 1e-4, 0.03
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    functional.silu, functional.gelu, partial(functional.gelu, approximate="tanh"), functional.relu,
)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Dotted module paths below one decoder layer (None: it has no such module), and its heads.

    Args:
        mixer: what mixes tokens: the attention module, or a linear-attention, convolution or
            recurrent one.
        attention: the module that attends by heads; None in a layer whose mixer has none.
        q_proj, k_proj, v_proj, o_proj: its projections.
        ln1, ln2: the norms before the mixer and before the MLP.
        attn_out, mlp_out: the modules whose output is added to the residual stream.
        mlp, mlp_gate, mlp_up, mlp_down: the MLP and its projections.
        norm_weight_offset: 1.0 where a norm multiplies by 1 + weight.
        n_heads, n_kv_heads: query heads and KV heads; 0 without attention.
        d_head: the width of a head's queries and keys; 0 without attention.
        d_mlp: the MLP's inner width; None where it has none, or several.
        gated: q_proj gives each head's query, then a gate of its z, side by side.
        cross: the attention's keys are the tower's tokens, not those of the row.
        unsummed: why the residual stream of this layer is not the sum of its parts; "" where it is.
    """

    mixer: str | None
    attention: str | None
    q_proj: str | None
    k_proj: str | None
    v_proj: str | None
    o_proj: str | None
    ln1: str | None
    ln2: str | None
    attn_out: str | None
    mlp_out: str | None
    mlp: str | None
    mlp_gate: str | None
    mlp_up: str | None
    mlp_down: str | None
    norm_weight_offset: float = 0.0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int | None = None
    gated: bool = False
    cross: bool = False
    unsummed: str = ""

    @classmethod
    def of(cls, layout: Layout, layer: nn.Module, text: Any) -> "Parts":
        """As a layout and a text config say, without what this layer has not."""
        names = ("attention", "q_proj", "k_proj", "v_proj", "o_proj", "ln1", "ln2", "attn_out", "mlp_out", "mlp",
                 "mlp_gate", "mlp_up", "mlp_down")  # fmt: skip
        paths: dict[str, Any] = {
            n: path if has(layer, path := getattr(layout, n)) else None for n in names
        }
        n_heads = text.num_attention_heads
        return cls(
            mixer=paths["attention"], **paths, norm_weight_offset=layout.norm_weight_offset, n_heads=n_heads,
            n_kv_heads=_entry(text, "num_key_value_heads") or n_heads,
            d_head=_entry(text, "head_dim") or text.hidden_size // n_heads, d_mlp=_entry(text, "intermediate_size"),
        )  # fmt: skip


def _entry(config: Any, name: str) -> Any:
    """An entry of a config; None where it has none, or one a layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # of a config whose layers differ
        return None
    return value if isinstance(value, int) else None


def has(layer: nn.Module, path: str | None) -> bool:
    """Whether a layer has a module at this path."""
    if path is None:
        return False
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def parts_of(hf: nn.Module, layout: Layout) -> list[Parts]:
    """The parts of every decoder layer of a model."""
    decoder = layout.decoder(hf)
    layers, text = list(decoder.layers), decoder.config  # type: ignore[arg-type]
    by_names = [Parts.of(layout, layer, text) for layer in layers]
    if type(layout) is not Layout:
        return by_names
    calls = _first_call(hf, layout, layers)
    return [_measured(*one) for one in zip(layers, by_names, calls, strict=True)]


# --- one forward


@dataclass
class LayerCall:
    """What passed through one layer in one forward.

    Args:
        stream, out: the residual stream that enters and leaves the layer, [1, pos, d_model].
        inputs, outputs: by module path, each module's first tensor in and out; outputs in the order
            of completion.
        arguments: by module path, what a module was called with.
        attends: (module path, shape of q, shape of k) of each call of the attention function.
    """

    stream: Tensor = field(init=False)
    out: Tensor = field(init=False)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    attends: list[tuple[str, torch.Size, torch.Size]] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """How far a sum may be off."""
        share = EXACT if self.stream.dtype in (torch.float32, torch.float64) else HALF
        return share * float(self.out.abs().max().clamp(min=1e-6))

    def equal(self, x: Tensor | None, y: Tensor | None) -> bool:
        """Whether two tensors hold the same numbers, up to rounding."""
        if x is None or y is None or x.numel() != y.numel() or x.shape[-1] != y.shape[-1]:
            return False
        return bool((x.reshape(y.shape) - y.to(x.device)).abs().max() <= self.limit)

    def wide(self) -> dict[str, Tensor]:
        """The outputs that could be added to the stream."""
        return {
            path: x.reshape(self.stream.shape).to(self.stream.device)
            for path, x in self.outputs.items()
            if path and x.numel() == self.stream.numel() and x.shape[-1] == self.stream.shape[-1]
        }


def _first_call(hf: nn.Module, layout: Layout, layers: list[nn.Module]) -> list[LayerCall | None]:
    """One forward over a few tokens of text; None for a layer that does not run on text alone."""
    calls = [LayerCall() for _ in layers]
    vision: dict[nn.Module, Any] = {}
    decoder: Any = layout.decoder(hf)
    device = hf.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    special = set(layout.placeholders(hf.config))
    ids = [token for token in range(3, 3 + TOKENS + len(special)) if token not in special][:TOKENS]
    with ExitStack() as stack:
        for call, layer in zip(calls, layers, strict=True):
            for handle in _watch(call, layer, vision):
                stack.callback(handle.remove)
        held = [hf.config.get_text_config(), decoder.config]  # type: ignore[union-attr, operator]
        held += [module.config for module in vision if hasattr(module, "config")]
        stack.enter_context(turn(hf))
        stack.enter_context(
            exchanged(attention, list({id(config): config for config in held}.values()))
        )
        stack.enter_context(running(Running(vision=vision)))
        stack.enter_context(evaluating(hf))
        stack.enter_context(torch.no_grad())
        tokens = torch.tensor([ids], device=device if device.type != "meta" else None)
        # whatever it raises: layers that have not run by then are taken by their names
        with suppress(Exception):
            hf.base_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)  # type: ignore[operator]
    return [call if hasattr(call, "out") else None for call in calls]


def _watch(call: LayerCall, layer: nn.Module, vision: dict[nn.Module, Any]) -> Iterator[Any]:
    def before(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        call.arguments[path] = (args, kwargs)
        if isinstance(x, Tensor):
            call.inputs[path] = x.detach().clone()

    def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if isinstance(x, Tensor):
            call.outputs[path] = x.detach().clone()
        if not path:
            call.stream, call.out = call.inputs[""], call.outputs[""]

    def attends(
        path: str, module_of: nn.Module, query: Tensor, key: Tensor, value: Tensor, of: Call
    ) -> Tensor:
        call.attends.append((path, query.shape, key.shape))
        return plain_z(query, key, value, of)

    for path, module in layer.named_modules():
        vision[module] = partial(attends, path, module)
        if path.count(".") < DEPTH:
            yield module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
            yield module.register_forward_hook(partial(after, path))


# --- what it shows


def _measured(layer: nn.Module, named: Parts, call: LayerCall | None) -> Parts:
    """The parts of one layer as its call shows them; what cannot be told stays as its name says."""
    if call is None:
        why = "it does not run on text alone, so what it adds could not be measured"
        return replace(_crossing(layer, named), unsummed=why)
    parts = _with_sums(layer, named, call)
    parts = _with_heads(layer, parts, call)
    if parts.ln1 is not None:
        parts = replace(parts, norm_weight_offset=weight_offset(layer.get_submodule(parts.ln1)))
    return _with_mlp(layer, parts, call)


def _crossing(layer: nn.Module, named: Parts) -> Parts:
    """The parts of a layer that text alone does not run: one that attends to what a tower gives.

    Its attention module is the one that looks the attention function up and takes states of
    another sequence.
    """
    for path, module in layer.named_modules():
        takes = inspect.signature(inspect.unwrap(type(module).forward)).parameters
        if not looks_attention_up(module) or not any(
            word in name for name in takes for word in CROSS
        ):
            continue
        n_heads = head_count(module, "num_heads", "num_attention_heads", "n_heads")
        projections = {name: f"{path}.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        if not n_heads or not all(has(layer, where) for where in projections.values()):
            continue
        width = layer.get_submodule(projections["q_proj"]).out_features
        return replace(
            named, mixer=path, attention=path, **projections, cross=True, n_heads=n_heads,
            n_kv_heads=head_count(module, "num_key_value_heads") or n_heads, d_head=width // n_heads,
        )  # fmt: skip
    return named


def _with_sums(layer: nn.Module, parts: Parts, call: LayerCall) -> Parts:
    """The norms that read the stream, and the modules whose outputs are added to it."""
    wide = call.wide()
    norms = [path for path in call.inputs if path and _is_norm(layer.get_submodule(path))]
    reading = [path for path in norms if call.equal(call.inputs[path], call.stream)]
    parts = replace(
        parts, ln1=reading[0] if reading else None, attn_out=None, mlp_out=None, ln2=None
    )
    for ln2 in norms:  # one after the other: x + a goes into a norm, x + a + m comes out
        middle = call.inputs[ln2]
        first = _shallowest(path for path, x in wide.items() if call.equal(call.stream + x, middle))
        if first is None:
            continue
        second = _shallowest(path for path, x in wide.items() if call.equal(middle + x, call.out))
        why = "" if second else "what its MLP gives is not all that is added after attention"
        mlp_out = second or _fed_by(layer, call, wide, ln2, parts)
        return replace(parts, ln2=ln2, attn_out=first, mlp_out=mlp_out, unsummed=why)
    pairs = [
        (first, second)
        for number, (first, x) in enumerate(wide.items())
        for second, y in list(wide.items())[number + 1 :]
        if not second.startswith(f"{first}.") and call.equal(call.stream + x + y, call.out)
    ]
    if pairs:  # side by side: both read the same norm
        first, second = min(pairs, key=lambda pair: pair[0].count(".") + pair[1].count("."))
        return replace(parts, attn_out=first, mlp_out=second)
    names = {"attn_out": parts.attention or parts.mixer, "mlp_out": parts.mlp}
    why = "no module of this layer gives what is added to the residual stream"
    return replace(parts, **names, unsummed=why)  # type: ignore[arg-type]


def _shallowest(paths: Iterator[str]) -> str | None:
    return min(paths, key=lambda path: path.count("."), default=None)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not list(module.children())


def _fed_by(
    layer: nn.Module, call: LayerCall, wide: dict[str, Tensor], ln2: str, parts: Parts
) -> str | None:
    """The module behind ln2, or the norm behind that module."""
    inner = _shallowest(
        path for path in wide if path != ln2 and call.equal(call.inputs.get(path), wide[ln2])
    )
    if inner is None:
        return parts.mlp
    behind = (
        path for path in wide if path != inner and call.equal(call.inputs.get(path), wide[inner])
    )
    return next((path for path in behind if _is_norm(layer.get_submodule(path))), inner)


def _source(layer: nn.Module, call: LayerCall, path: str | None) -> str | None:
    """The module itself, or, of a norm behind it, the module that the norm reads."""
    if path is None or not _is_norm(layer.get_submodule(path)):
        return path
    x = call.inputs.get(path)
    return _shallowest(
        other for other, y in call.outputs.items() if other and other != path and call.equal(y, x)
    )


def _with_heads(layer: nn.Module, parts: Parts, call: LayerCall) -> Parts:
    """The attention module, its heads and its projections."""
    mixer = _source(layer, call, parts.attn_out)
    if not call.attends:
        if parts.attention is not None and mixer == parts.attention:
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
             (("mlp_gate", "gate_proj"), ("mlp_up", "up_proj"), ("mlp_down", "down_proj"))}  # fmt: skip
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
