"""Where a sweep patches: a site's hook names, and the patches that a product of axes ("layer",
"head" …) means."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs
from corelens.interventions.ablation import ROLES
from corelens.model.hooked import HookedMLLM
from corelens.tokens.positions import Where, member, resolve

# site → its point in a layer, and what its extra axis counts
SITES: dict[str, tuple[str, str | None]] = {
    "resid_pre": ("hook_resid_pre", None),
    "resid_mid": ("hook_resid_mid", None),
    "resid_post": ("hook_resid_post", None),
    "attn_out": ("hook_attn_out", None),
    "mlp_out": ("hook_mlp_out", None),
    "mlp_pre": ("mlp.hook_pre", "neuron"),
    "mlp_post": ("mlp.hook_post", "neuron"),
    "z": ("attn.hook_z", "head"),
    "result": ("attn.hook_result", "head"),
    "q": ("attn.hook_q", "head"),
    "rot_q": ("attn.hook_rot_q", "head"),
    "k": ("attn.hook_k", "kv_head"),
    "rot_k": ("attn.hook_rot_k", "kv_head"),
    "v": ("attn.hook_v", "kv_head"),
    "pattern": ("attn.hook_pattern", "head"),
    "attn_scores": ("attn.hook_attn_scores", "head"),
}
WHOLE = ("embed", "visual")  # sites of the model, not of a layer
# the projector's output, with what DeepStack adds
ALIASES = {"vision": "visual", "vision.hook_out": "visual"}
POSITION_AXES = ("position", "role", "region")
AXES = ("layer", "head", "kv_head", "neuron", *POSITION_AXES)


def axis_of(name: str) -> tuple[int, int]:
    """(the axis that counts positions, the axis that counts heads or neurons) of a hook point's
    tensor."""
    return (2, 1) if name.endswith(("hook_pattern", "hook_attn_scores")) else (1, 2)


@dataclass(frozen=True, eq=False)
class Patch:
    """One patch of a sweep: points that are written at once, which part of them, and where.

    Args:
        names: hook points; none where the model has no such point (a layer without
            attention).
        part: which heads, KV heads or neurons; None: all.
        where: True at the positions that are patched; None: all.
    """

    names: tuple[str, ...]
    part: slice | None
    where: Bool[Tensor, "sample pos"] | None


def patches(
    model: HookedMLLM,
    inputs: Inputs,
    site: str,
    per: Sequence[str] | str | None,
    positions: Any = None,
    block: int = 64,
) -> tuple[dict[str, list[str]], list[Patch]]:
    """The labels of each axis, and one Patch for each combination, in the order of `numpy.ndindex`.

    Args:
        model: a HookedMLLM.
        inputs: the run that is patched: its token maps say what "role", "region" and names of
            positions mean.
        site: one of SITES, "embed", or "visual": the visual features, those that DeepStack adds
            included.
        per: which of AXES, each at most once.
        positions: patch only there. With "position" among `per`: those that are swept. With "role":
            a list of names, one role each ("region", "question", "last" …); by default visual,
            question and other.
        block: how many neurons are one block.
    """
    site, per = ALIASES.get(site, site), (per,) if isinstance(per, str) else tuple(per or ())
    _check(site, per)
    within = _visual(inputs) if site == "visual" else None
    masks, mask_labels = position_masks(inputs, per, positions, within)
    axes: dict[str, list[str]] = {}
    for name in per:
        if name == "layer":
            axes[name] = [str(layer) for layer in range(model.cfg.n_layers)]
        elif name in POSITION_AXES:
            axes[name] = mask_labels
        else:
            parts = _parts(model, name, block)
            whole = all(part.stop - part.start == 1 for part in parts)
            axes[name] = [
                str(part.start) if whole else f"{part.start}–{part.stop - 1}" for part in parts
            ]
    jobs = []
    for numbers in product(*(range(len(labels)) for labels in axes.values())):
        index = dict(zip(axes, numbers, strict=True))
        part: slice | None = None
        mask = masks[0]
        for name, number in index.items():
            if name in POSITION_AXES:
                mask = masks[number]
            elif name != "layer":
                part = _parts(model, name, block)[number]
        names = _names(model, site, index.get("layer"))
        jobs.append(Patch(_with_part(model, names, part), part, mask))
    if all(not job.names for job in jobs):  # the model has no such point: this raises, and says why
        model.hook_dict[f"blocks.0.{SITES[site][0]}"]
    return axes, jobs


def _check(site: str, per: tuple[str, ...]) -> None:
    if site not in SITES and site not in WHOLE:
        raise CorelensError(
            f"the site {site!r}", f"one of {', '.join([*SITES, *WHOLE])}", "choose one"
        )
    extra = SITES[site][1] if site in SITES else None
    allowed = [name for name in ("layer" if site in SITES else None, extra, *POSITION_AXES) if name]
    wrong = [name for name in per if name not in allowed]
    kv = "head" in wrong and extra == "kv_head"
    if wrong or len(set(per)) < len(per) or len(set(per) & set(POSITION_AXES)) > 1:
        raise CorelensError(
            f"per={per} at the site {site!r}",
            f"axes among {', '.join(allowed)}, none twice, and one of {', '.join(POSITION_AXES)} "
            "at most",
            "KV heads, not heads, carry k and v" if kv else "leave out the others",
        )


def _parts(model: HookedMLLM, axis: str, block: int) -> list[slice]:
    """The heads, KV heads or blocks of neurons along an axis, one slice each."""
    if axis == "neuron":
        size = model.cfg.d_mlp or max(block.parts.d_mlp or 0 for block in model.blocks)
        return [slice(first, min(first + block, size)) for first in range(0, size, block)]
    size = model.cfg.n_heads if axis == "head" else model.cfg.n_kv_heads
    return [slice(number, number + 1) for number in range(size)]


def _names(model: HookedMLLM, site: str, layer: int | None) -> tuple[str, ...]:
    if site == "embed":
        return ("hook_embed",)
    if site == "visual":
        return ("hook_embed", *(name for name in model.hook_names("hook_deepstack")))
    layers = range(model.cfg.n_layers) if layer is None else [layer]
    return tuple(
        name
        for number in layers
        if (name := f"blocks.{number}.{SITES[site][0]}") in model.hook_dict
    )


def _with_part(model: HookedMLLM, names: tuple[str, ...], part: slice | None) -> tuple[str, ...]:
    """Those of these points that have these heads: layers may have fewer than others."""
    if part is None:
        return names
    counts = {name: model.hook_dict[name].n_heads for name in names}
    return tuple(name for name, count in counts.items() if not count or part.start < count)


def table(where: Where, inputs: Inputs) -> Bool[Tensor, "sample pos"]:
    """A mask [sample, pos] of the positions that `where` names."""
    every = torch.arange(inputs.length)
    return member(resolve(where, inputs, every, len(inputs), rows=True), inputs.length)


def _visual(inputs: Inputs) -> Bool[Tensor, "sample pos"]:
    """Every token that stands for picture content."""
    visual = torch.zeros(len(inputs), inputs.length, dtype=torch.bool)
    for row, token_map in zip(visual, inputs.token_maps, strict=True):
        row[token_map.placeholder] = True
    return visual


def position_masks(
    inputs: Inputs,
    per: Sequence[str],
    positions: Any,
    within: Bool[Tensor, "sample pos"] | None = None,
) -> tuple[list[Bool[Tensor, "sample pos"] | None], list[str]]:
    """Where each patch along the axis of positions writes, and the labels of that axis.

    Args:
        inputs: their token maps say what names of positions mean.
        per: the axes; the one among POSITION_AXES, if any, is the axis of positions.
        positions: only there; with "role" among `per`, a list of names, one role each.
        within: only there, too.

    Returns:
        Masks, and as many labels; without an axis of positions one mask (None: everywhere) and no
        label.
    """
    named = (
        isinstance(positions, list | tuple) and bool(positions) and isinstance(positions[0], str)
    )
    if named and "role" not in per:
        raise CorelensError(
            f"positions={positions!r} with per={per}",
            "one name, or 'role' among `per`",
            "join names with '+'",
        )
    if positions is not None and not named:
        within = table(positions, inputs) if within is None else within & table(positions, inputs)

    def limited(masks: Sequence[Tensor]) -> list[Tensor | None]:
        return [mask if within is None else mask & within for mask in masks]

    def real() -> Tensor:
        return torch.stack([token_map.real for token_map in inputs.token_maps])

    if "position" in per:
        swept = real() if within is None else real() & within
        numbers = swept.any(0).nonzero()[:, 0].tolist()
        return limited([table(n, inputs) for n in numbers]), [str(n) for n in numbers]
    if "role" in per and named:
        return limited([table(name, inputs) for name in positions]), list(positions)
    if "role" in per:
        roles = [table(role, inputs) for role in ROLES[:-1]]
        other = real() & ~torch.stack(roles).any(0)
        return limited([*roles, other]), list(ROLES)
    if "region" in per:
        regions = _regions(inputs)
        return limited(regions), [str(number) for number in range(len(regions))]
    return [within], []


def _regions(inputs: Inputs) -> list[Bool[Tensor, "sample pos"]]:
    """One mask for each region, the first of all samples first."""
    counts = {len(token_map.regions) for token_map in inputs.token_maps}
    if len(counts) != 1 or counts == {0}:
        raise CorelensError(
            f"samples with {sorted(counts)} regions",
            "the same number of regions, one or more, in each",
            "patch per='role'",
        )
    masks = []
    for number in range(counts.pop()):
        mask = torch.zeros(len(inputs), inputs.length, dtype=torch.bool)
        for row, token_map in zip(mask, inputs.token_maps, strict=True):
            row[token_map.regions[number]] = True
        masks.append(mask)
    return masks
