"""The second of two runs, from the first token on in which it differs from the first run: two
questions about one picture."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelens.hf import CACHE_ARGUMENTS
from corelens.inputs.prepare import Inputs
from corelens.interventions.replay import Replay, layer_of
from corelens.interventions.sites import axis_of


def branch(
    base: Replay, other: Inputs, names: Sequence[str]
) -> tuple[dict[str, Tensor], Float[Tensor, "sample pos d_vocab"]] | None:
    """What a run on other inputs computes; the rows before the first difference are the base run's.

    Args:
        base: the base run, without hooks, with the values of these points stored.
        other: a batch with as many tokens, at the same positions.
        names: hook points.

    Returns:
        ({hook point: its values}, the logits of the last `keep` positions), as of a whole run. None
        where that would be wrong or save nothing: the base run has hooks, a point lies before the
        first layer, the inputs differ in more than their embeddings, or from their first rows on.
    """
    if not base.suffixes or base.hooks or any(layer_of(name) < 0 for name in names):
        return None
    embed, arguments = _entering(base, other)
    if not _same(arguments, {name: base.arguments.get(name) for name in arguments}):
        return None
    unequal = (embed != base.cache["hook_embed"]).any(-1)  # [sample, pos]
    differs = unequal.any(1)
    if not differs.any():
        return {name: base.cache[name] for name in names}, base.logits
    start = base.begin(0, int(unequal.any(0).nonzero()[0, 0]))
    if not start.row:
        return None
    values: dict[str, Tensor] = {}

    def store(x: Tensor, hook: Any) -> None:
        axis, whole = axis_of(hook.name)[0], base.cache[hook.name].clone()
        # A sample that does not differ keeps the base run's values, to the last bit.
        whole.narrow(axis, start.row, x.shape[axis])[differs] = x[differs]
        values[hook.name] = whole

    run = copy(base)
    run.inputs, run.cache = other, base.cache | {"hook_embed": embed}
    logits = run.run(start, [], dict.fromkeys(names, store))
    assert logits is not None
    by_sample = differs.to(logits.device)[:, None, None]
    return values, torch.where(by_sample, logits, base.logits)


def _entering(
    base: Replay, other: Inputs
) -> tuple[Float[Tensor, "sample pos d_model"], dict[str, Any]]:
    """What enters the first layer in a run on other inputs, and what else the decoder is called
    with, without ids and caches."""
    received: dict[str, Any] = {}

    def capture(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        received.update(kwargs)

    handle = base.decoder.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            embed = base.model(other, stop_at_layer=0).to(base.cache["hook_embed"].device)
    finally:
        handle.remove()
    own = {"inputs_embeds", "input_ids", *CACHE_ARGUMENTS}
    return embed, {name: value for name, value in received.items() if name not in own}


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments of the decoder are equal; False for what cannot be compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)
