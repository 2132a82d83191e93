"""The path run: senders have another run's values, every other head keeps the base run's.

`path_hooks` makes its hooks for one set of senders; `group_hooks` for several sets that share a
batch, as the runner `path_patch` needs them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.points import Hook
from corelens.interventions.replay import layer_of
from corelens.interventions.senders_receivers import Sender, mixing, parse_senders, rank
from corelens.tokens.positions import Where, check_where, member, resolve

# (inputs, positions of this step, batch) → for each run the positions at which its senders carry
# the change, a table [batch, pos]; None: everywhere
Tables = Callable[[Any, Tensor, int], Sequence[Tensor | None]]


def path_hooks(
    senders: Any,
    *,
    base: Any,
    source: Any,
    freeze_mlps: bool = False,
    positions: Where | None = None,
) -> list[Hook]:
    """Hooks of the path run of path patching: senders have the values of another run, every other
    head keeps that of the base run.

    Run the base inputs under them, read what receivers read (`model.run_with_cache`), and
    `cl.patch` it into a last run. The logits of the path run itself are those with `hook_logits` as
    the receiver.

    Args:
        senders: heads (a HeadSet, pairs, names "L3H5"), hook names ("blocks.3.hook_mlp_out",
            "hook_embed", "blocks.3.attn.hook_z" for all heads of a layer), or "visual".
        base: the base run's cache, with `hook_z` of all layers (and `hook_gate` where heads are
            gated; `hook_attn_out` of layers without attention, whose mixers are frozen as heads
            are; and `hook_mlp_out`, if MLPs are frozen).
        source: the other run's cache, with what the senders write.
        freeze_mlps: freeze MLPs that are no senders at their base value too.
        positions: senders carry the change only there; elsewhere they are frozen at the base value.
    """
    if positions is not None:
        check_where(positions)
    held, other = getattr(base, "cache_dict", base), getattr(source, "cache_dict", source)
    of_heads = [name for name in held if name.endswith("attn.hook_z")]
    layers = 1 + max(
        (layer_of(name) for name in held if name.endswith(("attn.hook_z", "hook_attn_out"))),
        default=-1,
    )
    n_heads = max((held[name].shape[2] for name in of_heads), default=0)
    parsed = parse_senders(senders, layers, n_heads, [*other])

    def where(inputs: Any, here: Tensor, batch: int) -> list[Tensor | None]:
        if positions is None:
            return [None]
        return [member(resolve(positions, inputs, here, batch, rows=True), int(here[-1]) + 1)]

    return group_hooks([parsed], where, held, other, freeze_mlps, layers)


def group_hooks(
    groups: Sequence[Sequence[Sender]],
    tables: Tables,
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    freeze_mlps: bool,
    n_layers: int,
) -> list[Hook]:
    """Hooks for a batch in which row i·runs + j is sample i of run j, and run j has the senders of
    group j.

    Args:
        groups: senders that act jointly, one group a run.
        tables: where the senders of each run carry the change.
        base, source: {hook name: activation} of the base run and of the run that gives the change.
        freeze_mlps: freeze MLPs that are no senders, too.
        n_layers: of the model.
    """
    written: dict[str, list[tuple[int, Sender]]] = {}
    for run, senders in enumerate(groups):
        for sender in senders:
            for name in sender.names:
                written.setdefault(name, []).append((run, sender))
    # Before the first sender nothing differs from the base run: there is nothing to freeze.
    first = max(0, min((layer_of(name) for name in written), default=0))
    frozen = [name for layer in range(first, n_layers) for name in mixing(layer, base, written)]
    if freeze_mlps:
        frozen += [f"blocks.{layer}.hook_mlp_out" for layer in range(first, n_layers)]
    _check_caches(frozen, written, base, source)

    def write(name: str) -> Callable[..., Tensor]:
        def path(x: Tensor, hook: Any) -> Tensor:
            here, inputs = hook.ctx["positions"], hook.ctx["inputs"]
            n_samples = len(base[name] if name in base else source[name])
            copies = x.shape[0] // n_samples  # rows of the batch that run one sample
            runs = len(groups)
            # Freeze first, then write: what a sender leaves alone (other heads of its point, other
            # positions) keeps the base run's value.
            x = _rows(base[name], here, x, copies) if name in frozen else x.clone()
            if name not in written:
                return x
            new = _rows(source[name], here, x, copies // runs)
            masks = tables(inputs, here, len(new))
            for run, sender in written[name]:
                part = (slice(None), slice(None), sender.head) if sender.head is not None else ()
                own, value = x[run::runs][part], new[part]  # (`own` is a view of x)
                for mask in (masks[run], sender.allowed(inputs, here, len(value))):
                    if mask is not None:
                        where = mask[:, here.to(mask.device)].to(x.device)
                        where = where.reshape(*where.shape, *[1] * (own.ndim - 2))
                        value = torch.where(where, value, own)
                own.copy_(value)
            return x

        return path

    # In the order of computation: hooks on the same module then fire as the forward pass runs.
    names = sorted({*frozen, *written}, key=lambda name: rank(name, n_layers))
    return [(name, write(name)) for name in names]


def _check_caches(
    frozen: Sequence[str],
    written: Mapping[str, Any],
    base: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
) -> None:
    """Raise if the base run's cache lacks a frozen point, or the source's a written one."""
    missing = [("base", name) for name in frozen if name not in base]
    missing += [("source", name) for name in written if name not in source]
    for cache, name in missing:
        raise CorelensError(
            f"a {cache} cache without {name!r}",
            "base: hook_z of all layers, and hook_mlp_out with freeze_mlps=True; source: what "
            "the senders write",
            "run model.run_with_cache(inputs) without a names_filter, or name these points",
        )


def _rows(values: Tensor, here: Tensor, like: Tensor, copies: int) -> Tensor:
    """Another run's values at the positions `here`, each sample `copies` times."""
    return values.to(like).index_select(1, here.to(like.device)).repeat_interleave(copies, dim=0)
