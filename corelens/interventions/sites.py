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
PLACES = ("position", "role", "region")
AXES = ("layer", "head", "kv_head", "neuron", *PLACES)


def axis_of(name: str) -> tuple[int, int]:
    """(the axis that counts positions, the axis that counts heads or neurons) of a hook point's
    tensor."""
    return (2, 1) if name.endswith(("hook_pattern", "hook_attn_scores")) else (1, 2)


@dataclass(frozen=True, eq=False)
class Patch:
    """One patch: these points at once, of each this part, at these positions.

    Args:
        names: hook points; none where the model has nothing at this place (a layer without
            attention).
        part: which heads, KV heads or neurons; None: all.
        where: True at the positions that are patched; None: all.
    """

    names: tuple[str, ...]
    part: slice | None
    where: Bool[Tensor, "sample pos"] | None


def patches(
    model: Any,
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
    along_places, labels_of_places = places(inputs, per, positions, within)
    axes: dict[str, list[str]] = {}
    for name in per:
        if name == "layer":
            axes[name] = [str(layer) for layer in range(model.cfg.n_layers)]
        elif name in PLACES:
            axes[name] = labels_of_places
        else:
            size, step = _extent(model, name, block)
            axes[name] = [
                str(i) if step == 1 else f"{i}–{min(i + step, size) - 1}"
                for i in range(0, size, step)
            ]
    jobs = []
    for index in product(*(range(len(labels)) for labels in axes.values())):
        chosen_index = dict(zip(axes, index, strict=True))
        part = None
        for name in ("head", "kv_head", "neuron"):
            if name in chosen_index:
                size, step = _extent(model, name, block)
                part = slice(chosen_index[name] * step, min((chosen_index[name] + 1) * step, size))
        place = next(
            (along_places[chosen_index[name]] for name in PLACES if name in chosen_index),
            along_places[0],
        )
        names = _names(model, site, chosen_index.get("layer"))
        jobs.append(Patch(_with_part(model, names, part), part, place))
    if all(not job.names for job in jobs):  # nowhere: the first layer says why
        model.hook_dict[f"blocks.0.{SITES[site][0]}"]
    return axes, jobs


def _check(site: str, per: tuple[str, ...]) -> None:
    if site not in SITES and site not in WHOLE:
        raise CorelensError(
            f"the site {site!r}", f"one of {', '.join([*SITES, *WHOLE])}", "choose one"
        )
    extra = SITES[site][1] if site in SITES else None
    allowed = [name for name in ("layer" if site in SITES else None, extra, *PLACES) if name]
    wrong = [name for name in per if name not in allowed]
    if wrong or len(set(per)) < len(per) or sum(name in PLACES for name in per) > 1:
        raise CorelensError(
            f"per={per} at the site {site!r}",
            f"axes among {', '.join(allowed)}, none twice, and one of {', '.join(PLACES)} at most",
            "KV heads, not heads, carry k and v"
            if "head" in wrong and extra == "kv_head"
            else "leave out the others",
        )


def _extent(model: Any, axis: str, block: int) -> tuple[int, int]:
    if axis == "neuron":
        return model.cfg.d_mlp or max(block.parts.d_mlp or 0 for block in model.blocks), block
    return (model.cfg.n_heads if axis == "head" else model.cfg.n_kv_heads), 1


def _names(model: Any, site: str, layer: int | None) -> tuple[str, ...]:
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


def _with_part(model: Any, names: tuple[str, ...], part: slice | None) -> tuple[str, ...]:
    """Those of these points that have these heads: layers may have fewer than others."""
    if part is None:
        return names
    counts = {name: model.hook_dict[name].n_heads for name in names}
    return tuple(name for name, count in counts.items() if not count or part.start < count)


def table(where: Where, inputs: Inputs) -> Bool[Tensor, "sample pos"]:
    """True at the positions that `where` means, for each sample."""
    every = torch.arange(inputs.length)
    return member(resolve(where, inputs, every, len(inputs), rows=True), inputs.length)


def _visual(inputs: Inputs) -> Bool[Tensor, "sample pos"]:
    """Every token that stands for picture content."""
    visual = torch.zeros(len(inputs), inputs.length, dtype=torch.bool)
    for row, token_map in zip(visual, inputs.token_maps, strict=True):
        row[token_map.placeholder] = True
    return visual


def places(
    inputs: Inputs,
    per: Sequence[str],
    positions: Any,
    within: Bool[Tensor, "sample pos"] | None = None,
) -> tuple[list[Bool[Tensor, "sample pos"] | None], list[str]]:
    """The positions of each patch along the axis of places (one entry without such an axis), and
    their labels."""
    named = (
        isinstance(positions, list | tuple) and len(positions) > 0 and isinstance(positions[0], str)
    )
    if named and "role" not in per:
        raise CorelensError(
            f"positions={positions!r} with per={per}",
            "one place, or 'role' among `per`",
            "join names with '+'",
        )
    if positions is not None and not named:
        within = table(positions, inputs) if within is None else within & table(positions, inputs)

    def and_within(place: Tensor) -> Tensor:
        return place if within is None else place & within

    if "position" in per:
        real = torch.stack([token_map.real for token_map in inputs.token_maps])
        swept = and_within(real).any(0).nonzero()[:, 0].tolist()
        return [and_within(table(position, inputs)) for position in swept], [
            str(position) for position in swept
        ]
    if "role" in per:
        if named:
            return [and_within(table(label, inputs)) for label in positions], list(positions)
        roles = [table(role, inputs) for role in ROLES[:-1]]
        real = torch.stack([token_map.real for token_map in inputs.token_maps])
        return [and_within(place) for place in (*roles, real & ~torch.stack(roles).any(0))], list(
            ROLES
        )
    if "region" in per:
        return _regions(inputs, and_within)
    return [within], []


def _regions(
    inputs: Inputs, and_within: Any
) -> tuple[list[Bool[Tensor, "sample pos"] | None], list[str]]:
    counts = {len(token_map.regions) for token_map in inputs.token_maps}
    if len(counts) != 1 or counts == {0}:
        raise CorelensError(
            f"samples with {sorted(counts)} regions",
            "the same number of regions, one or more, in each",
            "patch per='role'",
        )
    of_regions: list[Bool[Tensor, "sample pos"] | None] = []
    for number in range(counts.pop()):
        place = torch.zeros(len(inputs), inputs.length, dtype=torch.bool)
        for row, token_map in zip(place, inputs.token_maps, strict=True):
            row[token_map.regions[number]] = True
        of_regions.append(and_within(place))
    return of_regions, [str(number) for number in range(len(of_regions))]
