"""The model checks itself: at its first run under hooks, a run whose hooks do nothing must be the
plain run.

Versions of transformers and families of models differ in ways that nobody has seen yet. Whatever a
hook's mere presence changes shows in the last row's logits: one plain forward, and one with hooks
on z and the residual stream of all layers that write back what they read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import attention_name, takes_argument
from corelens.hooks.exchange import NAME
from corelens.inputs.prepare import Inputs

# The distance that is allowed, relative to the logits' spread. On the same kernel nothing but the
# order of sums on a GPU may differ; a model that was loaded with another implementation (eager,
# flash) is compared across kernels.
SAME_KERNEL, OTHER_KERNEL = 1e-4, 1e-3
HALF_PRECISION = {SAME_KERNEL: 0.03, OTHER_KERNEL: 0.1}

CHECKED = ("hook_resid_pre", "attn.hook_z", "hook_resid_post")
IN_ATTENTION = ("rot_q", "rot_k", "edges", "attn_scores", "pattern", "pattern_rows", "z", "result")


def self_check(model: Any, batch: Inputs) -> dict[str, str]:
    """Compare one no-op hooked forward with the plain one on this batch.

    Args:
        model: a HookedMLLM; its hooks are not run.
        batch: the inputs at hand.

    Returns:
        The points through which nothing passes, though their layer runs, each with the reason.

    Raises:
        CorelensError: if they differ; it names the first hook point that changes the run by itself.
    """
    twin = type(model)(model.hf, check=False)  # the same model, points of its own
    twin.layout = model.layout
    names = checked_names(twin)
    fired: set[str] = set()
    with torch.no_grad(), evaluating(model.hf):
        plain = last_logits(twin, batch)
        hooked = last_logits(twin, batch, names, fired)
        allowed = tolerance(model.hf, plain)
        error = distance(hooked, plain)
        if error > allowed:
            # a model that differs from itself
            allowed = max(allowed, 3 * distance(last_logits(twin, batch), plain))
        if error > allowed:
            first = _first_that_differs(twin, batch, plain, allowed)
            raise CorelensError(
                f"a run of {type(model.hf).__name__} with hooks that change nothing: its last "
                "row's logits differ from "
                f"the plain run's by {error:.2g} of their spread, from {first!r} on",
                f"the plain run's logits (within {allowed:.2g})",
                "run `corelens doctor` and report it; HookedMLLM(…, check=False) leaves this "
                "check off, and then "
                "hooked runs are wrong",
            )
    return _silent(twin, fired)


def checked_names(model: Any) -> list[str]:
    """The points that the check writes to: z and the residual stream of all layers, in their
    order."""
    layers = range(model.cfg.n_layers)
    names = ["hook_embed", *(f"blocks.{layer}.{point}" for layer in layers for point in CHECKED)]
    return [name for name in names if name in model.hook_dict]


def last_logits(
    model: Any, batch: Inputs, names: Sequence[str] = (), fired: set[str] | None = None
) -> Float[Tensor, "batch d_vocab"]:
    """The last row's logits, with hooks at these points that write back what they read."""

    def same(x: Tensor, hook: Any) -> Tensor:
        if fired is not None:
            fired.add(hook.name)
        return x.clone()

    keep = 1 if takes_argument(model.hf, "logits_to_keep") else None
    with model.hooks(fwd_hooks=[(name, same) for name in names]):
        return model(batch, logits_to_keep=keep)[:, -1].float()


def distance(
    logits: Float[Tensor, "batch d_vocab"], plain: Float[Tensor, "batch d_vocab"]
) -> float:
    """The largest difference of a sample's logits, root mean square over the spread of the plain
    ones."""
    if torch.equal(logits, plain):
        return 0.0
    finite = plain.isfinite()
    if not torch.equal(logits.isfinite(), finite):
        return float("inf")
    gap, plain = (logits - plain).where(finite, 0.0), plain.where(finite, 0.0)
    spread = plain.std(-1).clamp(min=1e-6)
    return float((gap.pow(2).mean(-1).sqrt() / spread).max())


def tolerance(hf: nn.Module, plain: Tensor) -> float:
    """What may differ: rounding."""
    text: Any = hf.config.get_text_config()  # type: ignore[union-attr, operator]
    allowed = SAME_KERNEL if attention_name(text) == NAME else OTHER_KERNEL
    single = (
        next(hf.parameters()).dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled()
    )
    return allowed if single else HALF_PRECISION[allowed]


@contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Within this context the model is in evaluation mode: no dropout, no statistics that are
    updated."""
    training = [module for module in hf.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _first_that_differs(model: Any, batch: Inputs, plain: Tensor, allowed: float) -> str:
    """The first point, in the order of layers, whose hook by itself changes the run."""
    names = checked_names(model)
    for kind in ("hook_embed", *CHECKED):
        of_kind = [name for name in names if name.endswith(kind)]
        if of_kind and distance(last_logits(model, batch, of_kind), plain) > allowed:
            alone = (
                name
                for name in of_kind
                if distance(last_logits(model, batch, [name]), plain) > allowed
            )
            return next(alone, of_kind[0])
    return names[0]


def _silent(model: Any, fired: set[str]) -> dict[str, str]:
    """The attention points of layers that ran without one call of the attention function."""
    reason = "its attention does not call transformers' attention interface"
    silent: dict[str, str] = {}
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        if f"{block}.hook_resid_post" in fired and f"{block}.attn.hook_z" not in fired:
            silent |= {
                name: reason
                for p in IN_ATTENTION
                if (name := f"{block}.attn.hook_{p}") in model.hook_dict
            }
    return silent
