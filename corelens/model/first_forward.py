"""What passes through each decoder layer in one forward over a few tokens of text: from it the
layer's parts are told."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corelens.hooks.attention_function import attention, plain_z
from corelens.hooks.exchange import exchanged
from corelens.hooks.rows import Call
from corelens.hooks.running import Running, running, turn
from corelens.layouts import Layout
from corelens.model.self_check import evaluating

TOKENS = 6
DEPTH = 2  # modules below a layer that are looked at: layer.mlp.down_proj is at 2
# of the largest number: what a sum may be off, in float32 and in half precision
EXACT, HALF = 1e-4, 0.03


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
        tolerance = EXACT if self.stream.dtype in (torch.float32, torch.float64) else HALF
        return tolerance * float(self.out.abs().max().clamp(min=1e-6))

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


def first_forward(hf: nn.Module, layout: Layout, layers: list[nn.Module]) -> list[LayerCall | None]:
    """One forward over a few tokens of text; None for a layer that does not run on text alone."""
    calls = [LayerCall() for _ in layers]
    vision: dict[nn.Module, Any] = {}
    decoder: Any = layout.decoder(hf)
    embeddings: Any = hf.get_input_embeddings()  # type: ignore[operator]
    device = next(embeddings.parameters()).device
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
        # The whole model first: it scales embeddings and makes masks. One that wants a picture
        # raises; then its decoder runs alone, on ids or on their embeddings.
        whole: Any = hf.base_model
        mask = torch.ones_like(tokens)
        for run in (
            lambda: whole(input_ids=tokens, attention_mask=mask, use_cache=False),
            lambda: decoder(input_ids=tokens, attention_mask=mask, use_cache=False),
            lambda: decoder(inputs_embeds=embeddings(tokens), attention_mask=mask, use_cache=False),
        ):
            # whatever it raises: layers that have not run by then are taken by their names
            with suppress(Exception):
                run()
            if any(hasattr(call, "out") for call in calls):
                break
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
