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
from corelens.interventions.senders_receivers import Sender, mixer_points, parse_senders, rank
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
    """Hooks of the path run: senders get another run's values, and every other head keeps its value
    of the base run.

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
    base_values = getattr(base, "cache_dict", base)
    source_values = getattr(source, "cache_dict", source)
    # A layer has one of these points: `hook_attn_out` where it mixes tokens without heads.
    mixers = [name for name in base_values if name.endswith(("attn.hook_z", "hook_attn_out"))]
    n_layers = 1 + max(map(layer_of, mixers), default=-1)
    z_points = [name for name in mixers if name.endswith("attn.hook_z")]
    n_heads = max((base_values[name].shape[2] for name in z_points), default=0)
    parsed = parse_senders(senders, n_layers, n_heads, [*source_values])

    def where(inputs: Any, step_positions: Tensor, batch: int) -> list[Tensor | None]:
        if positions is None:
            return [None]
        carriers = resolve(positions, inputs, step_positions, batch, rows=True)
        return [member(carriers, int(step_positions[-1]) + 1)]

    return group_hooks([parsed], where, base_values, source_values, freeze_mlps, n_layers)


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
    frozen = [
        name for layer in range(first, n_layers) for name in mixer_points(layer, base, written)
    ]
    if freeze_mlps:
        frozen += [f"blocks.{layer}.hook_mlp_out" for layer in range(first, n_layers)]
    _check_caches(frozen, written, base, source)

    def write(name: str) -> Callable[..., Tensor]:
        def path(x: Tensor, hook: Any) -> Tensor:
            step_positions, inputs = hook.ctx["positions"], hook.ctx["inputs"]
            n_samples = len(base[name] if name in base else source[name])
            copies = x.shape[0] // n_samples  # how often each sample stands in the batch
            runs = len(groups)
            # Freeze the whole point at the base run's values, then write the senders' part: other
            # heads of the point and other positions stay frozen.
            x = _values_at(base[name], step_positions, x, copies) if name in frozen else x.clone()
            if name not in written:
                return x
            new = _values_at(source[name], step_positions, x, copies // runs)
            masks = tables(inputs, step_positions, len(new))
            for run, sender in written[name]:
                part = (slice(None), slice(None), sender.head) if sender.head is not None else ()
                sender_part, value = x[run::runs][part], new[part]
                for mask in (masks[run], sender.allowed(inputs, step_positions, len(value))):
                    if mask is not None:
                        where = mask[:, step_positions.to(mask.device)].to(x.device)
                        where = where.reshape(*where.shape, *[1] * (sender_part.ndim - 2))
                        value = torch.where(where, value, sender_part)
                sender_part.copy_(value)  # a view: this writes into x
            return x

        return path

    # In the order of computation, so that hooks on one module fire as the forward pass runs.
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


def _values_at(values: Tensor, step_positions: Tensor, like: Tensor, copies: int) -> Tensor:
    """A run's values at this step's positions, each sample repeated `copies` times."""
    return (
        values.to(like)
        .index_select(1, step_positions.to(like.device))
        .repeat_interleave(copies, dim=0)
    )
