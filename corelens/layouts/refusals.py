"""Why a model has no decoder that hooks could stand on, or no places for its image tokens."""

from typing import Any

from torch import nn

from corelens.errors import CorelensError


def no_decoder(hf: nn.Module, asked: bool, decoder: Any, holder: Any) -> CorelensError:
    """What was looked for in a model, what it has, and what to wrap or write instead."""
    kind = type(decoder).__name__
    if not asked:
        returned = "there is no get_decoder()"
    elif holder is None:
        returned = f"it returns a {kind}, without `.layers` in it"
    else:
        streams = getattr(getattr(decoder, "config", None), "hc_count", 1)  # (hyper-connections)
        several = f"which carries {streams} residual streams side by side"
        why = several if streams > 1 else "whose layers have no norm behind them"
        returned = f"it returns a {kind}, {why}"
    writers = [
        name
        for name, part in hf.named_children()
        if hasattr(part, "get_decoder") and hasattr(part, "generate") and hasattr(part, "lm_head")
    ]
    do = "write a Layout for it with `decoder(hf)` overridden: cl.register_layout(MyLayout)"
    if writers:
        do = f"wrap the part of it that writes text: cl.HookedMLLM(hf.{writers[0]}, processor)"
    return CorelensError(
        f"a model of class {type(hf).__name__}, in which no decoder was found: looked for what "
        f"get_decoder() returns, with `.layers` and a norm; {returned}",
        "a transformers vision-language model whose get_decoder() returns its text decoder",
        do,
    )


def no_layout(config: Any) -> CorelensError:
    """A family whose token geometry nobody knows."""
    return CorelensError(
        f"a model of type {getattr(config, 'model_type', '?')!r}, for which no layout is "
        "registered",
        "a family whose token geometry CoreLens knows, when regions, images or cells are asked for",
        "hooks work without it; for regions write a Layout with image_cells() and call "
        "cl.register_layout(MyLayout)",
    )
