"""Ablations of heads. Published code calls different things by one word; here each has its name.

zero      z := 0
mean      z := its mean over a reference set (over samples and positions, or by token role)
resample  z := z of another sample (by position where lengths agree, else drawn by token role)
uniform   rotated q := 0, so that the head looks equally at every key it may see
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM
from corelens.tokens.positions import Where, check_where, member, resolve

KINDS = ("zero", "mean", "resample", "uniform")
# the roles a token can have; "other": template, options, answer
ROLES = ("visual", "question", "other")
Heads = HeadSet | Iterable[Any]
# edit(z [batch, pos, head, d] of the ablated heads, hook, layer, heads) → the same
Edit = Callable[[Tensor, Any, int, list[int]], Tensor]


def ablate(
    heads: Heads,
    kind: str = "zero",
    *,
    reference: Any = None,
    positions: Where | None = None,
    seed: int = 0,
) -> list[Hook]:
    """Hooks that ablate heads: they replace the heads' z, or make their attention uniform.

    Args:
        heads: a HeadSet, or anything that makes one.
        kind: "zero", "mean", "resample" or "uniform"; see the top of this file.
        reference: for "mean" what `mean_z` returned; for "resample" a cache of another run that
            holds `hook_z` of the layers concerned; if its length differs, `reference=(cache, its
            inputs)`, and tokens are drawn by role. A generated token takes what the reference's
            last token had.
        positions: only at these positions ("question", "last", [3, 4] …); everywhere by default.
        seed: of the draws by role in "resample".

    Returns:
        One hook a layer, for run_with_hooks, hooks, evaluate, generate …
    """
    head_set = heads if isinstance(heads, HeadSet) else HeadSet(heads)
    if kind not in KINDS:
        raise CorelensError(
            f"the ablation {kind!r}", f"one of {', '.join(KINDS)}", "for edges use cl.knockout"
        )
    if (kind in ("mean", "resample")) != (reference is not None):
        raise CorelensError(
            f"ablate(…, {kind!r}) {'without' if reference is None else 'with'} a reference",
            "a reference for 'mean' (cl.mean_z(model, samples)) and 'resample' (another run's "
            "cache), none otherwise",
            "add or drop reference=",
        )
    if positions is not None:
        check_where(positions)
    edit: Edit = _zero
    if kind == "mean":
        edit = _mean(reference)
    elif kind == "resample":
        edit = _resample(reference, seed)
    point = "hook_rot_q" if kind == "uniform" else "hook_z"
    return [
        (
            f"blocks.{layer}.attn.{point}",
            _on_heads(edit, layer, numbers, positions, f"ablate_{kind}"),
        )
        for layer, numbers in head_set.by_layer().items()
    ]


def _on_heads(
    edit: Edit, layer: int, numbers: Sequence[int], positions: Where | None, name: str
) -> Callable[..., Any]:
    """A hook function that edits z (or q) of these heads, at these positions."""

    def hook_function(z: Float[Tensor, "batch pos head d"], hook: Any) -> Tensor:
        if max(numbers) >= z.shape[2]:
            raise CorelensError(
                f"head L{layer}H{max(numbers)}",
                f"heads 0 to {z.shape[2] - 1}",
                "take heads of this model",
            )
        old = z[:, :, list(numbers)]
        new = edit(old, hook, layer, list(numbers))
        if positions is not None:
            step_positions = hook.ctx["positions"]
            table = member(
                resolve(positions, hook.ctx["inputs"], step_positions, z.shape[0], rows=True),
                int(step_positions[-1]) + 1,
            )
            new = torch.where(table[:, step_positions, None, None], new, old)
        z = z.clone()
        z[:, :, list(numbers)] = new
        return z

    hook_function.__name__ = name
    return hook_function


def _zero(z: Tensor, hook: Any, layer: int, numbers: list[int]) -> Tensor:
    return torch.zeros_like(z)


def _mean(reference: Mapping[int, Tensor]) -> Edit:
    """Replace z by its mean, or by the mean of its token's role."""

    def edit(z: Tensor, hook: Any, layer: int, numbers: list[int]) -> Tensor:
        try:
            mean = reference[layer][:, numbers].to(z)  # [role or 1, head, d]
        except (KeyError, TypeError, IndexError) as error:
            raise CorelensError(
                f"a reference without the mean of layer {layer}",
                "what cl.mean_z(model, samples) returns for this model",
                "make it with the model that is ablated",
            ) from error
        if len(mean) == 1:
            return mean.expand_as(z)
        return mean[_roles(hook.ctx["inputs"], hook.ctx["positions"], z.shape[0])]

    return edit


def _resample(reference: Any, seed: int) -> Edit:
    """Replace z by that of another run: of the same position, or of a random token of the same
    role."""
    cache, other = reference if isinstance(reference, tuple) else (reference, None)

    def edit(z: Tensor, hook: Any, layer: int, numbers: list[int]) -> Tensor:
        reference_z = cache[f"blocks.{layer}.attn.hook_z"][:, :, numbers].to(
            z
        )  # [sample, pos, head, d]
        step_positions = hook.ctx["positions"]
        if other is None:
            length = reference_z.shape[1]
            if z.shape[0] % reference_z.shape[0] or (
                int(step_positions[-1]) + 1 != length and int(step_positions[0]) < length
            ):
                raise CorelensError(
                    f"a reference run of {list(reference_z.shape[:2])} samples × positions for one "
                    "of "
                    f"{[z.shape[0], int(step_positions[-1]) + 1]}",
                    "the same number of positions, or the reference's inputs, so that tokens are "
                    "drawn by role",
                    "give reference=(cache, inputs)",
                )
            reference_z = reference_z.repeat_interleave(z.shape[0] // reference_z.shape[0], dim=0)
            return reference_z[:, step_positions.clamp(max=length - 1)]
        # The same draw in every layer: a position takes all its heads from one and the same token.
        generator = torch.Generator().manual_seed(seed)
        roles = _roles(hook.ctx["inputs"], step_positions, z.shape[0]).cpu()
        real = torch.stack([token_map.real for token_map in other.token_maps])
        reference_roles = torch.where(
            real, _roles(other, torch.arange(real.shape[1]), len(real)).cpu(), -1
        ).flatten()
        sources = torch.empty(roles.numel(), dtype=torch.long)
        for role in range(len(ROLES)):
            pool = (reference_roles == role).nonzero()[:, 0]
            pool = pool if len(pool) else (reference_roles >= 0).nonzero()[:, 0]
            targets = (roles.flatten() == role).nonzero()[:, 0]
            sources[targets] = pool[torch.randint(len(pool), (len(targets),), generator=generator)]
        return reference_z.flatten(0, 1)[sources.to(z.device)].reshape(z.shape)

    return edit


def _roles(inputs: Inputs, positions: Int[Tensor, " pos"], batch: int) -> Int[Tensor, "batch pos"]:
    """The role of each token, as a number in ROLES; tokens that were generated are "other"."""
    if not getattr(inputs, "token_maps", None):
        raise CorelensError(
            "token roles in a run on bare tensors",
            "inputs with token maps",
            "run on model.prepare(sample)",
        )
    roles = torch.full(
        (batch, int(positions[-1]) + 1), ROLES.index("other"), device=positions.device
    )
    for i in range(batch):
        token_map = inputs.token_maps[i * len(inputs.token_maps) // batch]
        if "question" in token_map.parts:
            roles[i, token_map.question.to(roles.device)] = ROLES.index("question")
        roles[i, token_map.visual.to(roles.device)] = ROLES.index("visual")
    return roles[:, positions]


def mean_z(
    model: HookedMLLM,
    samples: Sequence[Sample],
    *,
    by_role: bool = False,
    positions: Where | None = None,
    hooks: Sequence[Hook] = (),
    batch_size: int = 16,
) -> dict[int, Float[Tensor, "role head d_head"]]:
    """The mean of z over samples and their positions (padding excluded), for `ablate(…, "mean")`.

    Args:
        model: a HookedMLLM.
        samples: the reference set: not the samples that are then evaluated.
        by_role: one mean for each of ROLES instead of one for all; a role without any token gives
            0.
        positions: only these positions ("question", "last", [3, 4] …); all real ones by default.
        hooks: to run under.

    Returns:
        {layer: [1 or role, head, d_head]} of the layers with attention heads, in float32 on the
        CPU; summed in float64.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    n_roles = len(ROLES) if by_role else 1

    def add(z: Float[Tensor, "batch pos head d"], hook: Any) -> None:
        inputs, step_positions, layer = hook.ctx["inputs"], hook.ctx["positions"], hook.layer()
        counted = torch.stack([token_map.real for token_map in inputs.token_maps]).to(z.device)
        if positions is not None:
            counted = counted & member(
                resolve(positions, inputs, step_positions, z.shape[0], rows=True), counted.shape[1]
            )
        roles = (
            _roles(inputs, step_positions, z.shape[0])
            if by_role
            else torch.zeros_like(counted, dtype=torch.long)
        )
        member_of = torch.nn.functional.one_hot(roles, n_roles) * counted[..., None]
        total = torch.einsum("bpr,bphd->rhd", member_of.double(), z.double()).cpu()
        sums[layer] = sums.get(layer, torch.zeros_like(total)) + total
        counts[layer] = counts.get(layer, torch.zeros(n_roles)) + member_of.sum((0, 1)).cpu()

    if not samples:
        raise CorelensError(
            "no samples", "a reference set of one sample or more", "give samples to average over"
        )
    reading: list[Hook] = [
        (f"blocks.{layer}.attn.hook_z", add) for layer, heads in enumerate(model.cfg.heads) if heads
    ]
    with torch.no_grad():
        for start in range(0, len(samples), batch_size):
            inputs = model.prepare(samples[start : start + batch_size])
            model.run_with_hooks(inputs, fwd_hooks=[*hooks, *reading], return_type=None)
    return {
        layer: (sums[layer] / counts[layer].clamp(min=1)[:, None, None]).float() for layer in sums
    }
