"""What a call is given, checked before it runs: a keyword that nothing reads is refused by name.

A misspelt `fwd_hook=` would give clean logits without a word.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from transformers import GenerationConfig
from transformers.utils import TransformersKwargs

from corelens.errors import CorelensError
from corelens.inputs.processing import PER_TOKEN
from corelens.inputs.tensors import MEDIA

# Keywords of TransformerLens's calls that have no meaning in this one, and what to do instead.
ELSEWHERE = {
    "fwd_hooks": "model.run_with_hooks(inputs, fwd_hooks=…), or, also around generate: "
    "with model.hooks(fwd_hooks=…): …",
    "prepend_bos": "the chat template writes the special tokens: look at "
    "model.to_str_tokens(inputs)",
    "padding_side": "padding is prepare's: model.prepare(samples, padding_side=…)",
    "tokens": "tokens alone have no picture: bind the inputs, cl.bind(model, inputs)",
    "start_at_layer": "write the residual stream there: a hook at blocks.{l}.hook_resid_pre",
    "past_kv_cache": "model.generate keeps a cache of its own",
    "stop_at_eos": "generation stops at the end-of-sequence token: eos_token_id= says which",
    "verbose": "leave it out",
}
# What `generate` takes beside its signature and the fields of GenerationConfig.
GENERATE = (
    "tokenizer",
    "assistant_tokenizer",
    "trust_remote_code",
    "use_model_defaults",
    "use_cache",
)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """The names in a function's signature, `*args` and `**kwargs` apart."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind not in kinds) - {"self"}


def model_arguments(hf: Any, decoder: Any, processor: Any) -> set[str]:
    """Every keyword that a forward of the model reads, or its processor makes."""
    whole = hf.get_base_model() if hasattr(hf, "get_base_model") else hf  # inside PEFT's wrapper
    modules = [hf, whole, getattr(whole, "model", None), decoder]
    names = {*PER_TOKEN, *MEDIA, "position_ids", "labels", "return_dict", "use_cache"}
    names |= set(TransformersKwargs.__annotations__) | {"output_attentions", "output_hidden_states"}
    for module in modules:
        if module is not None:
            names |= _parameters(inspect.unwrap(type(module).forward))
            for method in ("get_image_features", "get_video_features"):
                if hasattr(type(module), method):
                    names |= _parameters(inspect.unwrap(getattr(type(module), method)))
    return names | set(getattr(processor, "model_input_names", ()))


def generate_arguments(hf: Any) -> set[str]:
    """Every keyword that transformers' `generate` reads."""
    return {*_parameters(inspect.unwrap(type(hf).generate)), *vars(GenerationConfig()), *GENERATE}


def check_keywords(
    names: Iterable[str], known: set[str], ours: Iterable[Callable[..., Any]]
) -> None:
    """Raise for a keyword that neither the model nor CoreLens reads, with the nearest that is read.

    Args:
        names: the keywords that a call was given.
        known: those that the model reads.
        ours: functions of CoreLens through which the call came; their keywords are named as near
            ones, too.
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    known_names = known.union(*(_parameters(function) for function in ours))
    near = {
        name: difflib.get_close_matches(name, sorted(known_names), n=2, cutoff=0.6)
        for name in unknown
    }
    nearest = "; ".join(f"near {name!r}: {', '.join(near[name]) or 'none'}" for name in unknown)
    hints = [ELSEWHERE[name] for name in unknown if name in ELSEWHERE]
    raise CorelensError(
        f"the keyword{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}, which "
        "nothing reads",
        f"a keyword of this call, or an argument of the model ({nearest})",
        "; ".join(hints) or "correct it, or leave it out",
    )


def check_forward(
    tensors: Mapping[str, Any],
    return_type: Any,
    logits_to_keep: int | None,
    stop_at_layer: int | None,
    loss_per_token: bool,
) -> None:
    """Raise for a `return_type` that there is not, and for options that it would leave unread."""
    if return_type not in ("logits", "loss", "both", None):
        raise CorelensError(
            f"return_type={return_type!r}", "'logits', 'loss', 'both' or None", "take one of these"
        )
    loss = return_type in ("loss", "both")
    if loss and (logits_to_keep is not None or "input_ids" not in tensors):
        raise CorelensError(
            f"return_type={return_type!r} with logits_to_keep, or without input_ids",
            "the logits and the ids of all positions",
            "compute the loss from the logits that you have: model.loss_fn",
        )
    if loss_per_token and not loss:
        raise CorelensError(
            f"loss_per_token with return_type={return_type!r}",
            "return_type='loss' or 'both'",
            "ask for the loss",
        )
    if stop_at_layer is not None and (loss or logits_to_keep is not None):
        raise CorelensError(
            "stop_at_layer with return_type='loss' or logits_to_keep",
            "a run that makes no logits: it returns the residual stream",
            "leave one of them out",
        )


def check_generate(hf: Any, tensors: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise for generation in which hooks would speak of other samples, or of padding."""
    mask = tensors.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise CorelensError(
            "generate on rows that are padded on the right: new tokens would follow the padding",
            "rows padded on the left, as prepare makes them",
            "prepare(samples, padding_side='left'), or move the padding of your own tensors",
        )
    if (options.get("num_beams") or hf.generation_config.num_beams or 1) > 1:
        raise CorelensError(
            "num_beams > 1",
            "greedy decoding or sampling: beams change places between steps",
            "set num_beams=1",
        )
    if options.get("cache_implementation") == "paged":
        raise CorelensError(
            'cache_implementation="paged"',
            "one batch: continuous batching mixes requests in one row",
            "leave it out, or call model.hf.generate_batch",
        )
