"""What must hold of a hooked model, measured on the model itself: one function an identity.

Each returns an `Identity` with the largest error over layers, and names the points that fail. The
reference is always a computation without CoreLens: plain forwards, PyTorch's own module hooks,
eager attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from corelens.hf import attention_set
from corelens.inputs.prepare import Inputs
from corelens.model.filters import kept_by_default
from corelens.model.projections import loaded_tensor
from corelens.model.self_check import OTHER_KERNEL, checked_names, distance, tolerance

# Allowed in float32 and in half precision: absolute for probabilities, relative to the largest
# number for the rest.
PROBABILITY = (1e-5, 0.02)
SUM = (2e-5, 0.03)
NEW_TOKENS = 4


@dataclass(frozen=True)
class Identity:
    """One identity, as it was measured.

    Args:
        name: what must be equal.
        error: how far it is off; None if it could not be measured.
        allowed: up to where it holds; None if it could not be measured.
        note: what the error counts, or why there is none.
        failed: the hook points that it does not hold for.
    """

    name: str
    error: float | None
    allowed: float | None
    note: str = ""
    failed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether it holds; None if it could not be measured."""
        return None if self.error is None or self.allowed is None else self.error <= self.allowed


@dataclass
class Subject:
    """What is measured: a HookedMLLM without hooks of its own, inputs, and the plain model's logits
    on them."""

    model: Any
    inputs: Inputs
    plain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.forward()

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return list(self.model.layout.decoder(self.model.hf).layers)

    @property
    def real(self) -> Tensor | None:
        """Which positions are not padding, [batch, pos]; None: all."""
        mask = self.inputs.tensors.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def forward(self) -> Tensor:
        """The Hugging Face model's logits, [batch, pos, d_vocab]."""
        return self.model.hf(**{"use_cache": False, **self.inputs.tensors}).logits

    def hooked(self, hooks: Sequence[Any]) -> Tensor:
        """The logits under these hooks."""
        return self.model.run_with_hooks(self.inputs, fwd_hooks=list(hooks))

    def of_all_rows(self, logits: Tensor, plain: Tensor) -> float:
        """How far logits differ in the rows that are not padding, relative to their spread."""
        real = self.real
        pairs = (logits, plain) if real is None else (logits[real][None], plain[real][None])
        return distance(pairs[0].flatten(1).float(), pairs[1].flatten(1).float())

    def limit(self, pair: tuple[float, float]) -> float:
        """The first of a pair in float32, the second in half precision."""
        single = next(self.model.hf.parameters()).dtype in (torch.float32, torch.float64)
        return pair[0] if single else pair[1]

    def o_proj(self, name: str) -> nn.Module:
        """The output projection of the layer whose point this is."""
        layer = int(name.split(".")[1])
        return self.layers[layer].get_submodule(self.model.blocks[layer].parts.o_proj)

    def names(self, point: str) -> list[str]:
        """The names of one point in the layers that have it."""
        every = (f"blocks.{layer}.{point}" for layer in range(self.model.cfg.n_layers))
        return [name for name in every if name in self.model.hook_dict]

    def cached(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What passes these points."""
        return self.model.run_with_cache(
            self.inputs, names_filter=list(names), return_cache_object=False
        )[1]


def same(x: Tensor, hook: Any) -> Tensor:
    """Write back what was read."""
    return x.clone()


def unhooked(subject: Subject) -> Identity:
    """model(inputs) is hf(**inputs.tensors), bit for bit where the model gives the same bits
    twice."""
    error = subject.of_all_rows(subject.model(subject.inputs), subject.plain)
    noise = subject.of_all_rows(subject.forward(), subject.plain)
    return Identity(
        "a run without hooks = the Hugging Face model", error, 3 * noise, "of the logits' spread"
    )


def no_ops(subject: Subject) -> Identity:
    """Hooks at all points that write back what they read change nothing."""
    names = [name for name in subject.model.hook_dict if kept_by_default(name)]
    allowed = max(tolerance(subject.model.hf, subject.plain), subject.limit((OTHER_KERNEL, 0.1)))

    def error_of(edited: Sequence[str]) -> float:
        return subject.of_all_rows(subject.hooked([(name, same) for name in edited]), subject.plain)

    error = error_of(names)
    failed = tuple(name for name in names if error_of([name]) > allowed) if error > allowed else ()
    return Identity(
        "hooks that change nothing = no hooks", error, allowed, "of the logits' spread", failed
    )


def patterns(subject: Subject) -> Identity:
    """hook_pattern is what the attention modules return under eager attention."""
    name, layers = "hook_pattern = eager's attention weights", subject.layers
    names = subject.names("attn.hook_pattern")
    returned: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.ndim == 4:
                returned[layer] = weights.detach().float()

        return hook

    with ExitStack() as stack:
        stack.enter_context(_eager(subject))
        for number, layer in enumerate(layers):
            if f"blocks.{number}.attn.hook_pattern" in names:
                attention = layer.get_submodule(subject.model.blocks[number].parts.attention)
                stack.callback(attention.register_forward_hook(keep(number)).remove)
        logits = subject.forward()
    allowed = subject.limit((OTHER_KERNEL, 0.1))
    if subject.of_all_rows(logits, subject.plain) > allowed:
        return Identity(
            name, None, None, "the plain model under eager attention computes something else"
        )
    if not returned:
        return Identity(
            name, None, None, "its attention modules return no weights under eager attention"
        )
    real, errors = subject.real, {}
    for number, weights in returned.items():
        pattern = subject.cached([f"blocks.{number}.attn.hook_pattern"])[
            f"blocks.{number}.attn.hook_pattern"
        ]
        if pattern.shape != weights.shape:
            errors[number] = float("inf")
            continue
        gap = (pattern - weights.to(pattern.device)).abs().amax(-1)  # [batch, head, query]
        errors[number] = float((gap if real is None else gap * real[:, None].to(gap)).max())
    limit = subject.limit(PROBABILITY)
    points = ("attn_scores", "pattern", "pattern_rows")
    wrong_layers = [layer for layer, error in errors.items() if error > limit]
    failed = tuple(f"blocks.{n}.attn.hook_{point}" for n in wrong_layers for point in points)
    return Identity(name, max(errors.values()), limit, f"{len(errors)} layers", failed)


@contextmanager
def _eager(subject: Subject) -> Iterator[None]:
    """Within this context the decoder's layers attend eagerly; the tower goes on as it did."""
    hf, decoder = subject.model.hf, subject.model.layout.decoder(subject.model.hf)
    # (not all modules below the decoder: some decoders hold the tower, too)
    modules = [decoder, *(module for layer in subject.layers for module in layer.modules())]
    inside = [module.config for module in modules if hasattr(module, "config")]
    with attention_set([hf.config.get_text_config(), *inside], "eager"):
        yield


def zeroed_heads(subject: Subject) -> Identity:
    """z of a head set to 0 is that head's part of the output projection's input set to 0."""
    model, names = subject.model, subject.names("attn.hook_z")
    last = model.cfg.n_heads - 1
    widths = {name: x.shape[2:] for name, x in subject.cached(names).items()}

    def error_of(zeroed: Sequence[str]) -> float:
        with ExitStack() as stack:
            for name in zeroed:
                o_proj = subject.o_proj(name)
                stack.callback(
                    o_proj.register_forward_pre_hook(_without_head(*widths[name])).remove
                )
            wanted = subject.forward()
        return subject.of_all_rows(subject.hooked([(name, _zero(last)) for name in zeroed]), wanted)

    names = [name for name in names if name in widths]
    if not names:
        return Identity("zeroed z = zeroed input of o_proj", None, None, "no layer has hook_z")
    allowed = max(tolerance(model.hf, subject.plain), subject.limit((OTHER_KERNEL, 0.1)))
    error = error_of(names)
    failed = [name for name in names if error_of([name]) > allowed] if error > allowed else []
    failed += [name.replace("hook_z", "hook_result") for name in failed]  # made of the same z
    return Identity(
        "zeroed z = zeroed input of o_proj", error, allowed, f"{len(names)} layers", tuple(failed)
    )


def _zero(head: int) -> Callable[..., Tensor]:
    def zero(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, min(head, z.shape[2] - 1)] = 0
        return z

    return zero


def _without_head(n_heads: int, d_head: int) -> Callable[..., Any]:
    """A pre-hook that sets the last head's part of a module's input to 0."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        x[..., (n_heads - 1) * d_head :] = 0
        return (x, *args[1:])

    return hook


def head_results(subject: Subject) -> Identity:
    """Σ_h hook_result + bias is what the output projection returns."""
    names = subject.names("attn.hook_result")
    summed: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}
    title = "sum of hook_result + bias = output of o_proj"

    def add_up(x: Tensor, hook: Any) -> None:
        summed[hook.name] = x.float().sum(-2)

    with ExitStack() as stack:
        for name in names:
            o_proj = subject.o_proj(name)

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
                bias = loaded_tensor(module, "bias")
                returned[name] = output.float() - (0 if bias is None else bias.float())

            stack.callback(o_proj.register_forward_hook(keep).remove)
        subject.hooked([(name, add_up) for name in names])
    if not summed:
        return Identity(title, None, None, "no layer has hook_result")
    limit = subject.limit(SUM)
    errors = {name: _relative(subject, x, returned[name]) for name, x in summed.items()}
    failed = tuple(name for name, error in errors.items() if error > limit)
    return Identity(title, max(errors.values()), limit, f"{len(errors)} layers", failed)


def residuals(subject: Subject) -> Identity:
    """The residual stream adds up, layer by layer; what does not names the points that cannot be
    summed."""
    points = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "deepstack")
    wanted = [name for point in points for name in subject.names(f"hook_{point}")]
    cache, limit = subject.cached(wanted), subject.limit(SUM)
    errors: dict[str, float] = {}

    def held(layer: int, point: str) -> Tensor | None:
        return cache.get(f"blocks.{layer}.hook_{point}")

    for layer in range(subject.model.cfg.n_layers):
        parts = subject.model.blocks[layer].parts
        # (before, added, what their sum is multiplied by, after, points that fail with it)
        steps = [
            ((layer, "resid_pre"), (layer, "attn_out"), 1.0, (layer, "resid_mid"),
            ("attn_out", "resid_mid")),
            ((layer, "resid_post"), (layer, "deepstack"), 1.0, (layer + 1, "resid_pre"),
            ("resid_post",)),
        ]  # fmt: skip
        if (
            parts.extra is None
        ):  # else the layer adds more, which has no point: it is the difference
            mlp = (
                (layer, "resid_mid"),
                (layer, "mlp_out"),
                parts.stream_scale,
                (layer, "resid_post"),
            )
            steps.append((*mlp, ("mlp_out",)))
        for before, added, scale, after, blamed in steps:
            x, y, total = held(*before), held(*added), held(*after)
            if x is None or y is None or total is None:
                continue
            total = total.to(x.device)
            error = _relative(subject, (x + y.to(x.device)) * scale, total)
            for point in blamed:
                name = f"blocks.{layer}.hook_{point}"
                errors[name] = max(error, errors.get(name, 0.0))
    failed = tuple(name for name, error in errors.items() if error > limit)
    note = f"{subject.model.cfg.n_layers} layers"
    return Identity(
        "the residual stream = the sum of what is added",
        max(errors.values(), default=0.0),
        limit,
        note,
        failed,
    )


def _relative(subject: Subject, x: Tensor, wanted: Tensor) -> float:
    """The largest difference in the rows that are not padding, relative to the largest number
    there."""
    if x.shape != wanted.shape:
        return float("inf")
    real = subject.real
    if real is not None and real.shape == x.shape[:2]:
        x, wanted = x[real.to(x.device)], wanted[real.to(wanted.device)]
    return float((x - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def generation(subject: Subject) -> Identity:
    """Greedy tokens under hooks that change nothing are the model's own, and positions go on
    counting."""
    tensors, hf = subject.inputs.tensors, subject.model.hf
    length = tensors["input_ids"].shape[1]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    wanted = hf.generate(**tensors, **options)[:, length:]
    positions: list[int] = []

    def follow(x: Tensor, hook: Any) -> Tensor:
        if hook.name == names[0]:
            positions.extend(hook.ctx["positions"].tolist())
        return x.clone()

    names = checked_names(subject.model)
    with subject.model.hooks(fwd_hooks=[(name, follow) for name in names]):
        tokens = subject.model.generate(subject.inputs, **options)
    error = int((tokens != wanted).sum()) if tokens.shape == wanted.shape else wanted.numel()
    if positions != list(range(length + NEW_TOKENS - 1)):
        return Identity(
            "hooked generate = generate",
            float("inf"),
            0.0,
            "positions do not count on",
            tuple(names),
        )
    return Identity("hooked generate = generate", float(error), 0.0, f"of {wanted.numel()} tokens")


IDENTITIES = (unhooked, no_ops, patterns, zeroed_heads, head_results, residuals, generation)
