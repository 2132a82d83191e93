"""The towers: the layers of what encodes pictures and sounds, and where each layer's attention is.

No family is named here. A layer's attention module is the one whose forward looks transformers'
attention function up; the module list that holds such modules, outside the decoder, is a tower.
Whether it sees or hears is what its class says of its input, else the words in its path.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from torch import nn

from corelens.hf import looks_attention_up
from corelens.layouts import Layout

Kind = Literal["vision", "audio"]
KINDS: tuple[Kind, ...] = ("vision", "audio")
WORDS: dict[Kind, tuple[str, ...]] = {
    "audio": ("audio", "speech", "sound", "voice"),
    "vision": ("vis", "image", "img", "video"),
}

_PREFIX, _SUFFIX = r"(?:to_|linear_|w)?", r"(?:_proj|_layer|jection_layer|jection)?"
PROJECTIONS = {
    "qkv": re.compile(_PREFIX + r"(?:qkv|in)" + _SUFFIX),
    "q": re.compile(_PREFIX + r"(?:q|query)" + _SUFFIX),
    "k": re.compile(_PREFIX + r"(?:k|key)" + _SUFFIX),
    "v": re.compile(_PREFIX + r"(?:v|value)" + _SUFFIX),
    "out": re.compile(_PREFIX + r"(?:o|out|output|pro|proj)" + _SUFFIX),
}


@dataclass(frozen=True)
class TowerLayer:
    """One layer of a tower. Dotted module paths below the layer; None: it has no such module.

    Args:
        module: the layer.
        attention: the module that calls transformers' attention function.
        qkv: one projection that gives q, k and v; None where there are three.
        q, k, v: the three projections; None where there is one.
        out: the projection that gets z.
        n_heads, n_kv_heads: query heads and KV heads; 0 without attention.
    """

    module: nn.Module
    attention: str | None = None
    qkv: str | None = None
    q: str | None = None
    k: str | None = None
    v: str | None = None
    out: str | None = None
    n_heads: int = 0
    n_kv_heads: int = 0

    def absent(self) -> dict[str, str]:
        """The attention points that this layer cannot have, each with the reason."""
        names = ("q", "k", "v", "z", "pattern")
        if self.attention is None or not self.n_heads:
            reason = "its attention does not call transformers' attention interface"
            return dict.fromkeys(names, reason)
        paths = {"q": self.qkv or self.q, "k": self.qkv or self.k, "v": self.qkv or self.v}
        paths["z"] = self.out
        return {
            name: f"its attention {self.attention!r} has no module that gives or takes {name}"
            for name, path in paths.items()
            if path is None
        }


def tower_layers(hf: nn.Module, layout: Layout, kind: Kind) -> list[TowerLayer]:
    """The layers of a model's vision or audio tower, in the order in which they are registered.

    A model with two towers of one kind and one build (for images, for videos) has the layers of
    both, one after the other. Empty where there is no such tower.
    """
    inside = _decoder_modules(hf, layout)
    lists = [pair for pair in _lists(hf, inside) if _kind(hf, pair[0]) == kind]
    by_interface = [layers for _, layers in lists if any(map(_uses_interface, layers))]
    if not by_interface:  # its attention does not go through transformers' attention function
        by_itself = [layers for _, layers in lists if all(map(_has_attention, layers))]
        return [TowerLayer(layer) for layer in max(by_itself, key=len, default=[])]
    same_type = [layers for layers in by_interface if type(layers[0]) is type(by_interface[0][0])]
    return [_layer(layer) for layers in same_type for layer in layers]


def _uses_interface(layer: nn.Module) -> bool:
    return any(map(looks_attention_up, layer.modules()))


def _has_attention(layer: nn.Module) -> bool:
    return any(map(_attends, layer.modules()))


def attention_modules(hf: nn.Module, layout: Layout, kind: Kind) -> list[nn.Module]:
    """The attention modules of a tower's layers, those too that do not call transformers' attention
    function."""
    inside = _decoder_modules(hf, layout)
    lists = [layers for path, layers in _lists(hf, inside) if _kind(hf, path) == kind]
    modules: list[nn.Module] = []
    for layer in chain.from_iterable(lists):
        paths = [path for path, part in layer.named_modules() if path and _attends(part)]
        for path in paths:
            # (the innermost: one that holds another may add its own input to what that gives)
            if not any(other.startswith(f"{path}.") for other in paths):
                modules.append(layer.get_submodule(path))
    return modules


def _attends(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ or looks_attention_up(module)


def _lists(hf: nn.Module, inside: set[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
    """The innermost module lists outside the decoder's layers, with their paths."""
    for path, module in hf.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or module[0] in inside:
            continue
        if not isinstance(module[0], nn.ModuleList) and not _holds(module, inside):
            yield path, list(module)


def _decoder_modules(hf: nn.Module, layout: Layout) -> set[nn.Module]:
    decoder: Any = layout.decoder(hf)  # (which may hold its tower: its layers do not)
    return {module for layer in decoder.layers for module in layer.modules()}


def _holds(module: nn.Module, inside: set[nn.Module]) -> bool:
    return any(part in inside for part in module.modules())


def _kind(hf: nn.Module, path: str) -> Kind | None:
    """Whether the modules at this path see or hear; None if neither can be told."""
    names = path.split(".")
    holders = [hf.get_submodule(".".join(names[:depth])) for depth in range(len(names), 0, -1)]
    takes = next((kinds for holder in holders if (kinds := _input_modalities(holder))), ())
    if "audio" in takes and not {"image", "video"} & set(takes):
        return "audio"
    for kind, words in WORDS.items():
        if any(word in path for word in words):
            return kind
    return "vision" if {"image", "video"} & set(takes) and "text" not in takes else None


def _input_modalities(module: nn.Module) -> tuple[str, ...]:
    """What a transformers model takes: "image", "video", "audio", "text"; () for other modules."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return ()
    kinds: Any = getattr(module, "input_modalities", None) or ()
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _layer(module: nn.Module) -> TowerLayer:
    """One layer, its attention the shallowest module that looks the attention function up."""
    callers = [path for path, part in module.named_modules() if looks_attention_up(part)]
    if not callers:
        return TowerLayer(module)
    attention = min(callers, key=lambda path: path.count("."))
    attends = module.get_submodule(attention)
    n_heads = head_count(attends, "num_heads", "num_attention_heads", "n_heads", "heads")
    n_kv_heads = head_count(attends, "num_key_value_heads", "num_kv_heads") or n_heads
    paths: dict[str, Any] = {}
    for name, form in PROJECTIONS.items():
        children = [child for child, _ in attends.named_children() if form.fullmatch(child)]
        child = children[0] if children else None
        paths[name] = child and (f"{attention}.{child}" if attention else child)
    return TowerLayer(module, attention, **paths, n_heads=n_heads, n_kv_heads=n_kv_heads)


def head_count(attends: nn.Module, *names: str) -> int:
    """The first of these that an attention module, or its config, has as a number; else 0."""
    for holder in (attends, getattr(attends, "config", None)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return 0
