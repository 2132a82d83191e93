"""What holds of CoreLens on a tiny model of one type: a row of the table of families.

The reference is always a computation without CoreLens: plain forwards, PyTorch's own module hooks,
eager attention. A check gives "exact", or how far it is off, or the reason why there is nothing to
check.
"""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import corelens as cl
from corelens.errors import CorelensError
from corelens.hf import attention_set
from corelens.model.sums import is_norm
from families.shrink import TYPES, build
from families.tensors import tensors_for

CLOSE, SUM, ROUNDING = 5e-5, 2e-4, 2e-6  # of the largest number; of probabilities absolute
EXACT = "exact"


def row_of(model_type: str) -> dict[str, Any]:
    """Every check of one type; a type that is refused has the reason, and no check."""
    row: dict[str, Any] = {"type": model_type, "class": TYPES[model_type]}
    hf = build(model_type)
    try:
        model = cl.HookedMLLM(hf)
    except CorelensError as error:
        return row | {"refused": reason(error)}
    except Exception as error:
        return row | {"broken": raised(error)}
    try:
        tensors, row["image_tokens"] = tensors_for(model_type, hf)
        with torch.no_grad():
            plain = _logits(hf, tensors)
    except Exception as error:
        return row | {"unrunnable": raised(error)}
    subject = Subject(model, tensors, plain)
    row |= {"heads": list(model.cfg.heads), "tower": model.cfg.n_vision_layers}
    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                row[name] = check(subject)
        except CorelensError as error:
            row[name] = f"refused: {reason(error)}"
        except Exception as error:
            row[name] = f"raised: {raised(error)}"
    return row


class Subject:
    """A wrapped model, what it is run on, and the plain model's logits there."""

    def __init__(self, model: Any, tensors: dict[str, Any], plain: Tensor):
        self.model, self.tensors, self.plain = model, tensors, plain
        self.layers: list[nn.Module] = list(model.layout.decoder(model.hf).layers)

    def hooked(self, *hooks: Any) -> Tensor:
        """The logits under these hooks."""
        return self.model.run_with_hooks(self.tensors, fwd_hooks=list(hooks))

    def cached(self, names: list[str]) -> dict[str, Tensor]:
        """What passes these points."""
        return self.model.run_with_cache(
            self.tensors, names_filter=names, return_cache_object=False
        )[1]

    def names(self, point: str) -> list[str]:
        """The names of one point in the layers that have it."""
        every = (f"blocks.{layer}.{point}" for layer in range(len(self.layers)))
        return [name for name in every if name in self.model.hook_dict]


def unhooked(subject: Subject) -> str:
    """A run without hooks is the plain model's, bit for bit."""
    return _same(subject.model(subject.tensors), subject.plain)


def no_op(subject: Subject) -> str:
    """A hook on every z and every residual stream that does nothing changes no bit."""
    names = subject.names("attn.hook_z") + subject.names("hook_resid_post")
    logits = subject.hooked(*((name, lambda x, hook: None) for name in names))
    off = _distance(logits, subject.plain)
    plain_kernel = subject.model.hf.config._attn_implementation
    if 0 < off < ROUNDING and plain_kernel != "sdpa":  # (ours sums in another order)
        return f"exact but for rounding ({off:.0e})"
    return _same(logits, subject.plain)


def pattern(subject: Subject) -> str:
    """hook_pattern is what the attention modules return under eager attention."""
    names = subject.names("attn.hook_pattern")
    if not names:
        return "no layer attends by heads"
    try:
        weights = eager_weights(subject)
    except Exception as error:
        return f"the plain model under eager attention: {raised(error)}"
    cached = subject.cached(names)
    errors, without = [], []
    for layer in range(len(subject.layers)):
        own = cached.get(f"blocks.{layer}.attn.hook_pattern")
        alike = [w for w in weights.get(layer, ()) if own is not None and w.shape == own.shape]
        if weights.get(layer) and own is None:
            without.append(layer)
        elif weights.get(layer) and not alike:
            errors.append(math.inf)  # of another shape
        elif alike and own is not None:
            errors.append(min(float((w - own).abs().max()) for w in alike))
    if not errors:
        return "its layers give no weights under eager attention"
    if max(errors) >= CLOSE:
        return f"off by {max(errors):.1e}"
    return f"exact, and refused in layers {without}" if without else EXACT


def written_z(subject: Subject) -> str:
    """z of a head set to 0 is that head's part of the output projection's input set to 0."""
    off, tried = 0.0, 0
    for name in subject.names("attn.hook_z"):
        layer = int(name.split(".")[1])
        parts = subject.model.blocks[layer].parts
        if _projection(subject, layer) is None:
            return f"layer {layer} has no output projection of its own"
        heads = parts.n_heads
        entrance = _entrance(subject, layer)
        with _handles(entrance.register_forward_pre_hook(_without_last(heads))):
            wanted = _logits(subject.model.hf, subject.tensors)
        head = f"blocks.{layer}.attn.head.{heads - 1}.hook_z"
        logits = subject.hooked((head, lambda z, hook: torch.zeros_like(z)))
        off, tried = max(off, _distance(logits, wanted)), tried + 1
    if not tried:
        return "no layer attends by heads"
    return EXACT if off < CLOSE else f"off by {off:.1e}"


def written_pattern(subject: Subject) -> str:
    """A head's pattern halved is its part of the output projection's input halved.

    Where z passes a norm before the projection, halving it is not halving the projection's input:
    there it is a run with z halved.
    """
    off = 0.0
    names = subject.names("attn.hook_pattern")
    for name in names:
        layer = int(name.split(".")[1])
        parts = subject.model.blocks[layer].parts
        if _projection(subject, layer) is None:
            return f"layer {layer} has no output projection of its own"
        entrance = _entrance(subject, layer)
        with _handles(entrance.register_forward_pre_hook(_without_last(parts.n_heads, 0.5))):
            wanted = _logits(subject.model.hf, subject.tensors)
        head = f"blocks.{layer}.attn.head.{parts.n_heads - 1}"
        halved_z = subject.hooked((f"{head}.hook_z", lambda z, hook: z * 0.5))
        if _distance(halved_z, wanted) > CLOSE:
            wanted = halved_z
        halved = subject.hooked((f"{head}.hook_pattern", lambda x, hook: x * 0.5))
        off = max(off, _distance(halved, wanted))
    return (
        "no layer attends by heads" if not names else EXACT if off < CLOSE else f"off by {off:.1e}"
    )


def residual(subject: Subject) -> str:
    """The parts of the residual stream add up to it, or the sum is refused by name."""
    _, cache = subject.model.run_with_cache(subject.tensors)
    last = cache["resid_post", len(subject.layers) - 1]
    try:
        total = cache.decompose_resid().sum(0)
    except CorelensError as error:
        return f"refused: {reason(error)}"
    off = float((total - last).abs().max() / last.abs().max())
    return EXACT if off < SUM else f"off by {off:.1e}"


def generated(subject: Subject) -> str:
    """Greedy tokens under hooks are the plain model's."""
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    hf, model = subject.model.hf, subject.model
    if "decoder_input_ids" in subject.tensors or subject.tensors["input_ids"].ndim > 2:
        return "not tried: an encoder-decoder, or codes a token"
    try:
        wanted = hf.generate(**subject.tensors, **options)
    except Exception as error:
        return f"the plain model does not: {raised(error)}"
    wanted = wanted[:, subject.tensors["input_ids"].shape[1] :] if wanted.shape[1] > 4 else wanted
    hooks = [(name, lambda x, hook: x.clone()) for name in subject.names("attn.hook_z")]
    fired: list[int] = []
    hooks.append((subject.names("hook_resid_post")[-1], lambda x, hook: fired.append(x.shape[1])))
    with model.hooks(fwd_hooks=hooks):
        tokens = model.generate(subject.tensors, **options)
    tokens = tokens if tokens.shape == wanted.shape else tokens[:, -wanted.shape[1] :]
    if not torch.equal(tokens, wanted):
        return f"other tokens: {tokens.tolist()} for {wanted.tolist()}"
    return EXACT if len(fired) >= 3 else f"hooks fired {len(fired)} times in 3 steps"


def untouched(subject: Subject) -> str:
    """After all of it the plain model is as it was."""
    return _same(_logits(subject.model.hf, subject.tensors), subject.plain)


CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__: check
    for check in (
        unhooked,
        no_op,
        pattern,
        written_z,
        written_pattern,
        residual,
        generated,
        untouched,
    )
}
# a check that gives another number than the plain model's, and no error: silently wrong
SILENT = ("off by", "other tokens", "hooks fired")


def verdict(row: dict[str, Any]) -> str:
    """ "served", "refused", "broken" (an error that names nothing) or "silently wrong"."""
    if "refused" in row:
        return "refused"
    if "broken" in row:
        return "broken"
    if "unrunnable" in row:
        return "not run"
    if str(row.get("no_op", "")).startswith("refused"):  # by the model's check of itself
        return "refused"
    values = [str(row.get(name, "")) for name in CHECKS]
    if any(value.startswith(SILENT) for value in values):
        return "silently wrong"
    return "broken" if any(value.startswith("raised") for value in values) else "served"


# --- inside


def _logits(hf: nn.Module, tensors: dict[str, Any]) -> Tensor:
    return hf(**tensors, use_cache=False).logits


def _same(logits: Tensor, wanted: Tensor) -> str:
    return EXACT if torch.equal(logits, wanted) else f"off by {_distance(logits, wanted):.1e}"


def _distance(logits: Tensor, wanted: Tensor) -> float:
    return float((logits - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))


def _without_last(heads: int, factor: float = 0.0) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0].clone()
        width = x.shape[-1] // heads
        x[..., (heads - 1) * width :] *= factor
        return (x, *args[1:])

    return hook


def _projection(subject: Subject, layer: int) -> nn.Module | None:
    """The module that takes z: the output projection, or one that holds it with its gate."""
    parts, module = subject.model.blocks[layer].parts, subject.layers[layer]
    if parts.o_proj is not None:
        return module.get_submodule(parts.o_proj)
    return getattr(module.get_submodule(parts.attention), "o_proj", None)


def _entrance(subject: Subject, layer: int) -> nn.Module:
    """The module whose input is z: the output projection, or the norm that stands before it."""
    parts = subject.model.blocks[layer].parts
    o_proj = _projection(subject, layer)
    assert o_proj is not None
    attention = subject.layers[layer].get_submodule(parts.attention)
    seen: dict[nn.Module, Tensor] = {}
    norms = [module for module in attention.modules() if is_norm(module)]
    handles = [
        norm.register_forward_hook(lambda m, a, out: seen.update({m: out})) for norm in norms
    ]
    handles.append(o_proj.register_forward_pre_hook(lambda m, a: seen.update({m: a[0]})))
    with _handles(*handles):
        _logits(subject.model.hf, subject.tensors)
    x = seen.pop(o_proj)
    before = [norm for norm, y in seen.items() if y.shape == x.shape and torch.equal(y, x)]
    return before[0] if before else o_proj


@contextlib.contextmanager
def _handles(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def eager_weights(subject: Subject) -> dict[int, list[Tensor]]:
    """By layer, the weights [batch, head, query, key] that modules return under eager attention."""
    hf = subject.model.hf
    weights: dict[int, list[Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not (isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point()):
                return
            if float((x.sum(-1) - 1).abs().max()) < 1e-3:  # (a recurrent state is 4-D, too)
                weights.setdefault(layer, []).append(x.detach().float())

        return hook

    handles = [
        module.register_forward_hook(keep(number))
        for number, layer in enumerate(subject.layers)
        for name, module in layer.named_modules()
        if name
    ]
    held = [getattr(module, "config", None) for module in hf.modules()]
    configs = {id(c): c for c in held if hasattr(c, "_attn_implementation_internal")}
    with _handles(*handles), attention_set(configs.values(), "eager"):
        logits = _logits(hf, subject.tensors)
    if _distance(logits, subject.plain) > 1e-3:
        return {}  # the plain model computes something else under eager attention
    return weights


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def raised(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({where})"
