"""What CoreLens touches of transformers, accelerate and TransformerLens beyond their documented
calls.

These parts change without notice. Each has a sentence that says why it is needed, and
`tests/test_hf.py` fails with its name when it goes away. No other file touches them. Beside them
stands the range of versions that the tests ran on.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformer_lens import ActivationCache, FactoredMatrix
from transformer_lens.hook_points import HookPoint as LensHookPoint
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities.slice import Slice

# --- versions

# package: (lowest tested version, the next one that is not tested); pyproject.toml says the same,
# and why.
TESTED = {
    "torch": ("2.11", "3"),
    "transformers": ("5.17", "5.25"),
    "transformer-lens": ("4.2", "5"),
}


def untested() -> list[str]:
    """For each installed package outside the tested range a text such as "transformers 5.26.0
    (tested: 5.17 to …)"."""
    outside = []
    for package, (lowest, limit) in TESTED.items():
        try:
            installed = version(package)
        # a module on the path that was never installed says no version
        except PackageNotFoundError:
            continue
        # (releases alone are compared: 5.25.0.dev0 is of the new minor, though it sorts before
        # 5.25)
        if not Version(lowest).release <= Version(installed).release < Version(limit).release:
            outside.append(f"{package} {installed} (tested: {lowest} and later, before {limit})")
    return outside


@cache
def warn_if_untested() -> None:
    """Warn, once a process, if an installed version is outside the tested range."""
    if outside := untested():
        warnings.warn(
            f"CoreLens was not tested with {', '.join(outside)}. Hooked runs may differ from the model: "
            "`corelens doctor` measures it on this machine.",
            stacklevel=3,
        )


# --- the KV cache

# The argument by which a decoder takes its KV cache, and the field by which an output holds it:
# `cache` from transformers 5.24 on, `past_key_values` before. Hooks read it to tell where a step's
# tokens stand.
CACHE_ARGUMENTS = ("cache", "past_key_values")


@cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def cache_argument(module: Any) -> str:
    """The name of the argument by which a model or decoder takes its KV cache."""
    return _cache_argument(type(module).forward) or CACHE_ARGUMENTS[0]


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments, under whichever name it was given; None
    without one."""
    return next(
        (arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None
    )


def cache_of(output: Any) -> Any:
    """The KV cache that a model's output holds; None without one."""
    # (the first name alone is read where it is there: reading the old one is deprecated)
    return next((getattr(output, name) for name in CACHE_ARGUMENTS if hasattr(output, name)), None)


def cached_tensors(kv_cache: Any) -> list[Tensor]:
    """The keys and values of all layers of a KV cache, for counting their bytes; empty where it
    does not show them."""
    held = [
        getattr(layer, name, None)
        for layer in getattr(kv_cache, "layers", ())
        for name in ("keys", "values")
    ]
    return [x for x in held if isinstance(x, Tensor)]


def cache_windows(config: Any) -> list[int | None] | None:
    """The sliding window of each layer's KV cache, None where it holds everything; read off
    transformers' own cache.

    None where a layer's cache is of another kind (linear attention, a cache that layers share,
    chunks).
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=config).layers
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
        return None
    return [getattr(layer, "sliding_window", None) for layer in layers]


# --- attention


def attention_name(config: Any) -> str | None:
    """The name of the attention function that a config asks for."""
    return config._attn_implementation_internal


def set_attention_name(config: Any, name: str | None) -> None:
    """Let one config ask for another attention function.

    The documented setter, `set_attn_implementation`, would switch every sub-config too and refuse
    names by its own rules; each config of a run is switched, and switched back, on its own.
    """
    config._attn_implementation_internal = name


@contextmanager
def attention_set(configs: Iterable[Any], name: str) -> Iterator[None]:
    """Within this context these configs ask for another attention function, then again each for its
    own."""
    before = {id(config): (config, attention_name(config)) for config in configs}.values()
    try:
        for config, _ in before:
            set_attention_name(config, name)
        yield
    finally:
        for config, own in before:
            set_attention_name(config, own)


@cache
def _named_while(config_class: Any, condition: Callable[[], bool], name: str) -> type:
    stored = "_attn_implementation_internal"

    def get(config: Any) -> str | None:
        return name if condition() else vars(config)[stored]

    def set_(config: Any, value: str | None) -> None:
        vars(config)[stored] = value

    body = {
        stored: property(get, set_),
        "__module__": config_class.__module__,
        "__doc__": config_class.__doc__,
    }
    return type(config_class.__name__, (config_class,), body)


@contextmanager
def attention_named(config: Any, condition: Callable[[], bool], name: str) -> Iterator[None]:
    """Within this context a config asks for the attention function `name` where `condition()`
    holds, else for its own.

    The name is read several times in a forward, for masks and for attention: were it set on the
    config, another thread's forward of the same model would get a mask of one kind and a function
    of the other. So the config's class is exchanged for one that answers by thread.
    """
    before = type(config)
    named: Any = _named_while  # (mypy takes a class for no key of a cache)
    config.__class__ = named(before, condition, name)
    try:
        yield
    finally:
        config.__class__ = before


def attention_functions() -> MutableMapping[str, Callable[..., Any]]:
    """The table, name → function, in which transformers' model code looks its attention up at every
    call.

    `AttentionInterface.register` writes below it: an item set here hides the registered function of
    that name from all models of this process, and deleting the item shows it again.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


@contextmanager
def every_attention(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within this context every attention call of every model goes through `around(function)`: for
    timing."""
    table: Any = attention_functions()
    hidden = dict(table._local_mapping)  # what was set here before, above what is registered

    def late(name: str) -> Callable[..., Any]:
        """Whatever is behind the name when it is called: a hooked run may have exchanged it
        meanwhile."""
        return lambda *args, **kwargs: around(hidden.get(name) or table._global_mapping[name])(
            *args, **kwargs
        )

    table._local_mapping.update({name: late(name) for name in table})
    try:
        yield
    finally:
        table._local_mapping.clear()
        table._local_mapping.update(hidden)


def looks_attention_up(module: nn.Module) -> bool:
    """Whether a module's forward looks the attention function up in transformers' table.

    (Read off the names in its code: there is no list of such modules, and a tower cannot be run
    before its pictures are there.)
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ())


def forget_attention(name: str) -> None:
    """Undo `AttentionInterface.register(name, …)`, for which there is no call."""
    from transformers import AttentionInterface

    mapping: Any = AttentionInterface._global_mapping
    mapping.pop(name, None)


@contextmanager
def deepstack_addition(
    decoder: Any, add: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Within this context `add(stream, where, features)` makes the sum of residual stream and
    DeepStack features.

    The decoder adds them between two layers, in a method of its own and in no module: no module
    hook sees them.
    """
    # that of a run inside whose hook function this one is
    before = vars(decoder).get("_deepstack_process")
    # on this instance only: it hides the class's method until it is deleted
    decoder._deepstack_process = add
    try:
        yield
    finally:
        if before is None:
            del decoder._deepstack_process
        else:
            decoder._deepstack_process = before


# --- pictures

# The argument by which a model takes visual features that were computed before, {"image": output,
# "video": output} (transformers 5.17 has no such argument). A model that does not know it swallows
# it, and runs without its pictures.
ENCODED = "mm_encoder_outputs"


def takes_encoded(features: Any) -> bool:
    """Whether a model takes visual features that were computed before."""
    return ENCODED in inspect.signature(inspect.unwrap(type(features).forward)).parameters


def visual_features(output: Any) -> list[Any]:
    """What the decoder gets of an encoder's output: the projector's output (the last hidden state,
    where the projector is the encoder's own end), then what DeepStack adds layer by layer."""
    return [output[_features_in(output)], *(getattr(output, "deepstack_features", None) or [])]


def set_visual_features(output: Any, features: list[Any]) -> None:
    """Write into an encoder's output what `visual_features` read from it."""
    before = output[_features_in(output)]
    # (some outputs hold the same tensor under both names, and the model reads either)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(output, name, None) is before:
            output[name] = features[0]
    if len(features) > 1:
        output.deepstack_features = features[1:]


def _features_in(output: Any) -> str:
    pooled = getattr(output, "pooler_output", None)
    return "last_hidden_state" if pooled is None else "pooler_output"


def image_defaults(processor: Any) -> list[Mapping[str, Any]]:
    """The options for images that a processor sets by itself, the first dict that has one wins.

    They stand in its class's argument type (`_defaults` of `XxxProcessorKwargs`, until transformers
    5.29), later on the processor: token geometry must be computed with the options that its image
    processor was called with.
    """
    by_type = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", None) or {}
    return [by_type.get("images_kwargs") or {}, getattr(processor, "images_kwargs", None) or {}]


# --- accelerate


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module that accelerate has offloaded, loaded to where the module runs; None
    if it holds none."""
    hook: Any = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if getattr(part, "weights_map", None) is not None:
            return part.weights_map[name].to(part.execution_device)
    return None


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate moves this module's inputs before it runs; None for a module that it has not
    dispatched."""
    hook: Any = getattr(module, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), None)


def tied_parameters(model: nn.Module) -> set[str]:
    """The names of parameters that are others' (an unembedding that is the embedding's table): once
    offloaded, both names hold a tensor of their own, and `named_parameters` lists both.
    """
    return set(getattr(model, "all_tied_weights_keys", None) or {})


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within this context the module computes `forward`; accelerate's own replacement is put back
    afterwards."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


# --- a hooked run


def unknown_caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among a decoder's arguments from which positions cannot be read: under a name that
    is not known, or without a length.

    A decoder's cache argument was renamed before (5.24), and continuous batching has a
    PagedAttentionCache, which is no Cache and counts several sequences at once. Reading None
    instead would start positions at 0 at every step.
    """
    from transformers import Cache

    def unknown(name: str, value: Any) -> bool:
        if name in CACHE_ARGUMENTS:
            return value is not None and not hasattr(value, "get_seq_length")
        return isinstance(value, Cache) or type(value).__name__.endswith("AttentionCache")

    return {name: value for name, value in arguments.items() if unknown(name, value)}


@contextmanager
def checkpointing_off(model: Any) -> Iterator[bool]:
    """Within this context no layer of the model is checkpointed; yields whether any was.

    `gradient_checkpointing` is the attribute by which each layer of transformers decides it, at
    every call; the documented switch would forget which layers had it, and its options.
    """
    layers = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    try:
        for module in layers:
            module.gradient_checkpointing = False
        yield any(module.training for module in layers)
    finally:
        for module in layers:
            module.gradient_checkpointing = True


def takes_argument(model: Any, name: str) -> bool:
    """Whether a model's forward has an argument of this name: others are swallowed by its
    `**kwargs`."""
    return name in inspect.signature(inspect.unwrap(type(model).forward)).parameters


# --- TransformerLens


class LensCache(ActivationCache):
    """TransformerLens's ActivationCache, one of whose inner steps may be overridden under a name
    without underscore."""

    def neurons_onto(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        directions: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        """What each neuron adds to `directions` after the norm, without building [d_mlp,
        d_model]."""
        # TransformerLens 4.0 neither knows it nor asks for it
        more = {"mlp_input": True} if mlp_input else {}
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, directions, **more
        )

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        return self.neurons_onto(layer, pos_slice, neuron_slice, project_2d, mlp_input)

    def norm_of(self, layer: int, mlp_input: bool, pos_slice: Slice) -> tuple[Tensor, bool]:
        """The scale [batch, pos, 1] of the norm that reads the residual stream at a layer, and
        whether it centres."""
        scale = self._get_cached_ln_scale(layer, mlp_input=mlp_input, pos_slice=pos_slice)
        # TransformerLens 4.2 asks its config alone
        centring = getattr(self, "_uses_ln_centering", None)
        return scale, self.model.cfg.normalization_type in (
            "LN",
            "LNPre",
        ) if centring is None else centring(layer)


def newest_handle(handles: list[Any]) -> Any:
    """The handle of the hook that was hung last: TransformerLens 4.0's `add_hook` returns
    nothing."""
    return max(handles, key=hung_as)


def hung_as(handle: Any) -> int:
    """A number that grows with every hook that is hung, of a TransformerLens handle: hooks run in
    that order."""
    return handle.hook.id


__all__ = [
    "CACHE_ARGUMENTS", "ENCODED", "TESTED", "FactoredMatrix", "HookedRootModule", "LensCache",
    "LensHookPoint", "Slice", "attention_functions", "attention_name", "attention_named",
    "attention_set", "cache_argument", "cache_in", "cache_of", "cache_windows",
    "cached_tensors", "checkpointing_off", "deepstack_addition", "every_attention",
    "execution_device", "forget_attention", "hung_as", "image_defaults",
    "looks_attention_up", "newest_handle",
    "offloaded", "replaced_forward", "set_attention_name", "set_visual_features",
    "takes_argument", "takes_encoded", "tied_parameters", "unknown_caches", "untested",
    "visual_features", "warn_if_untested",
]  # fmt: skip
