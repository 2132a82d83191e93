"""Many runs that differ little from one base run: each computes only what may have changed.

A patch at layer l changes nothing before layer l. In a causal model a patch at row p changes no row
before p. So a run can begin

- at a later layer, from the base run's residual stream;
- at a later row, with the base run's keys and values of the rows before it, which runs share;

and several such runs share one batch. All of them go through the model's own forward: the arguments
of its decoder are replaced, and layers that are not needed return their input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.hf import CACHE_ARGUMENTS, cache_argument, replaced_forward
from corelens.hooks.points import TOWERS, Hook
from corelens.hooks.prefix import SharedPrefix
from corelens.inputs.prepare import Inputs
from corelens.model.filters import named
from corelens.model.hooked import HookedMLLM

# arguments of the decoder that `_called_with` cuts to size one by one; all others by their shape
CALL = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks")
LEAST_PREFIX = 1 / 8  # of the rows: leaving out fewer saves less than an explicit mask costs


@dataclass
class Start:
    """The layer and row at which a run begins, and how many runs share its batch."""

    layer: int = 0
    row: int = 0
    runs: int = 1


class Replay:
    """One base run, and further runs of the same batch that begin in the middle of it.

    Args:
        model: a HookedMLLM.
        inputs: the base run's batch of n samples.
        hooks: to run under, in the base run and in all others.
        names: hook points whose base values are stored in `cache`.
        keep: how many of the last positions' logits are computed; None: all.
    """

    def __init__(
        self,
        model: HookedMLLM,
        inputs: Inputs,
        hooks: Sequence[Hook] = (),
        names: Sequence[str] = (),
        keep: int | None = None,
    ):
        self.model, self.inputs, self.keep = model, inputs, keep
        self.hooks = named(model.hook_dict, hooks)
        self.decoder = model.layout.decoder(model.hf)
        layers = range(model.cfg.n_layers)
        stored = ["hook_embed", *(f"blocks.{layer}.hook_resid_pre" for layer in layers)]
        # Layers without heads (state-space layers, convolutions) pass on a state from row to row
        # that is not stored.
        suffixes = all(model.cfg.heads)
        if suffixes:  # keys and values of the rows before a run's start
            stored += [f"blocks.{layer}.attn.hook_rot_k" for layer in layers]
            stored += [f"blocks.{layer}.attn.hook_v" for layer in layers]
        caching = [*dict.fromkeys([*stored, *names])]
        self._prefix_row, self._shared = 0, SharedPrefix()  # of the last run
        self.arguments: dict[str, Any] = {}  # what the base run calls the decoder with
        handle = self.decoder.register_forward_pre_hook(self._capture, with_kwargs=True)
        try:
            with torch.no_grad(), model.hooks(fwd_hooks=self.hooks):
                self.logits, cache = model.run_with_cache(
                    inputs, names_filter=caching, logits_to_keep=keep, return_cache_object=False
                )
        finally:
            handle.remove()
        self.cache = dict(cache)
        self.length = self.cache["hook_embed"].shape[1]
        # A layer without a k_proj reads the keys of an earlier layer, which the decoder passes on
        # itself. That earlier layer has to run, so every run begins at the first layer.
        parts = [block.parts for block in model.blocks]
        self._own_keys = all(p.k_proj or not (p.attention and p.q_proj) for p in parts)
        self.suffixes = suffixes and self._causal()

    def _capture(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # Each family calls its decoder in its own way (masks, rotary positions, DeepStack's
        # features): the arguments are recorded once and cut to size for each run.
        self.arguments = dict(kwargs)

    def _causal(self) -> bool:
        """Whether no row attends to a later one, so that a patch leaves all rows before it
        unchanged. False for a mask of an unknown kind."""
        mask = self.arguments.get("attention_mask")
        masks = list(mask.values()) if isinstance(mask, dict) else [mask]
        for layer_mask in masks:
            if layer_mask is not None and (
                not isinstance(layer_mask, Tensor)
                or (layer_mask.ndim == 4 and _sees_ahead(layer_mask))
            ):
                return False
        return True

    def begin(self, layer: int, row: int, runs: int = 1) -> Start:
        """The latest start at or before this layer and row from which a run is exact."""
        row = row if self.suffixes and row >= self.length * LEAST_PREFIX else 0
        layer = layer if self._own_keys else 0
        return Start(
            max(0, min(layer, self.model.cfg.n_layers - 1)), min(row, self.length - 1), runs
        )

    def run(
        self,
        start: Start,
        hooks: Sequence[Hook],
        reading: Mapping[str, Callable[..., Any]] | None = None,
        logits: bool = True,
    ) -> Float[Tensor, "batch pos d_vocab"] | None:
        """Run once from `start`, under the base hooks and these. Element i·runs + j of the batch is
        run j of sample i.

        Args:
            start: what `begin` returned.
            hooks: made for that batch, at layers from `start.layer` on.
            reading: {hook point: function} to call with the values after all edits.
            logits: False: the language-model head is not run, and None is returned.

        Returns:
            The logits of the last `keep` positions (or of all).
        """
        kwargs = self._called_with(start)
        # The model gets embeddings only: `_begun` then replaces what it calls its decoder with.
        # Position ids are passed too, because without them some models compute their own from
        # what they remember of the last batch.
        tensors = {"inputs_embeds": kwargs["inputs_embeds"]}
        if kwargs.get("position_ids") is not None:
            tensors["position_ids"] = kwargs["position_ids"]
        if self._needs_ids():
            tensors["input_ids"] = self._any_text(tensors.pop("inputs_embeds"))
        batch = Inputs(tensors, self.inputs.token_maps, self.inputs.samples)
        base_hooks = [(name, function) for name, function in self.hooks if _fires(str(name), start)]
        # Without a hook a layer's attention might not run through CoreLens, which adds the prefix.
        layers = range(start.layer, self.model.cfg.n_layers)
        present = [(f"blocks.{layer}.attn.hook_z", _leave) for layer in layers if start.row]
        all_hooks = [*base_hooks, *hooks, *(reading or {}).items(), *present]
        length = self.length - start.row  # rows that run
        wanted = self.length if self.keep is None else self.keep  # rows of logits to return
        with torch.no_grad(), self._begun(start, kwargs):
            if not logits:
                self.model.run_with_hooks(batch, fwd_hooks=all_hooks, return_type=None)
                return None
            row_logits = self.model.run_with_hooks(
                batch, fwd_hooks=all_hooks, logits_to_keep=min(wanted, length)
            )
        if wanted > length:  # the logits of rows before the start are the base run's
            before = self.logits[:, : wanted - length].repeat_interleave(start.runs, dim=0)
            row_logits = torch.cat([before, row_logits], dim=1)
        return row_logits

    # --- how the decoder is called

    def _needs_ids(self) -> bool:
        """Whether the model must be called with token ids: it computes more of them than embeddings
        (an embedding for each layer, say), and passes that to its decoder."""
        n = len(self.cache["hook_embed"])
        more = (
            x for name, x in self.arguments.items() if name not in CALL and isinstance(x, Tensor)
        )
        by_token = any(x.is_floating_point() and x.shape[:2] == (n, self.length) for x in more)
        return by_token and self.arguments.get("input_ids") is None

    def _any_text(self, embeds: Tensor) -> Int[Tensor, "batch pos"]:
        """Ids of any text token to call the model with; what it computes from them is replaced."""
        placeholders = self.model.layout.placeholders(self.model.hf.config)
        token = next(id for id in range(len(placeholders) + 1) if id not in placeholders)
        return torch.full(embeds.shape[:2], token, device=embeds.device)

    @contextmanager
    def _begun(self, start: Start, kwargs: dict[str, Any]) -> Iterator[None]:
        """Within this context the decoder is called with `kwargs` and begins at `start`."""
        with ExitStack() as stack:

            def call(module: nn.Module, args: Any, received: dict[str, Any]) -> Any:
                return (), {**received, **kwargs}

            stack.callback(self.decoder.register_forward_pre_hook(call, with_kwargs=True).remove)
            layers = list(self.decoder.layers)
            for layer in layers[: start.layer]:
                stack.enter_context(_returning_its_input(layer))
            # At the first layer too, because `hook_embed` includes what the decoder does to its
            # embeddings before that layer.
            name = f"blocks.{start.layer}.hook_resid_pre" if start.layer else "hook_embed"
            stream = _repeat(self.cache[name], start)

            def from_base(module: nn.Module, args: Any, received: dict[str, Any]) -> Any:
                if args:
                    return (stream.clone(), *args[1:]), received
                return args, received | {"hidden_states": stream.clone()}

            stack.callback(
                layers[start.layer].register_forward_pre_hook(from_base, with_kwargs=True).remove
            )
            yield

    def _called_with(self, start: Start) -> dict[str, Any]:
        """The decoder's arguments in the base run, cut to the rows from `start.row` on and repeated
        for each run of the batch."""
        kwargs = dict(self.arguments)
        n = len(self.cache["hook_embed"])
        kwargs["inputs_embeds"] = _repeat(self.cache["hook_embed"], start)
        for name, value in self.arguments.items():
            if name in ("cache_position", "input_ids"):
                del kwargs[name]  # the decoder makes cache positions, and embeddings replace ids
            elif name in CALL or not isinstance(value, Tensor):
                continue
            elif value.shape[:2] == (n, self.length):
                kwargs[name] = _repeat(value, start)
        for name in CACHE_ARGUMENTS:
            kwargs.pop(name, None)
        kwargs[cache_argument(self.decoder)] = self._prefix(start.row) if start.row else None
        kwargs["use_cache"] = False
        mask = kwargs.get("attention_mask")
        make = self._mask
        kwargs["attention_mask"] = (
            {name: make(layer_mask, start) for name, layer_mask in mask.items()}
            if isinstance(mask, dict)
            else make(mask, start, False)
        )
        ids = kwargs.get("position_ids")
        if ids is not None:
            # [batch or 1, pos], or [3, batch, pos] for rotary positions in time, height and width
            if (ids.shape[-2] == n and n > 1) or ids.ndim == 3:
                ids = ids.repeat_interleave(start.runs, dim=-2)
            kwargs["position_ids"] = ids[..., start.row :]
        # DeepStack's features are one row for each visual token of the batch, without gaps for the
        # text. To cut and repeat them as the rows are: number the visual tokens, cut and repeat the
        # numbers, and index the features by them.
        if kwargs.get("visual_pos_masks") is not None:
            where = kwargs["visual_pos_masks"]
            number = torch.zeros_like(where, dtype=torch.long)
            number[where] = torch.arange(int(where.sum()), device=where.device)
            kwargs["visual_pos_masks"] = _repeat(where, start)
            numbers = _repeat(number, start)[kwargs["visual_pos_masks"]]
            if kwargs.get("deepstack_visual_embeds") is not None:
                kwargs["deepstack_visual_embeds"] = [
                    features[numbers.to(features.device)]
                    for features in kwargs["deepstack_visual_embeds"]
                ]
        return kwargs

    def _mask(self, mask: Tensor | None, start: Start, made: bool = True) -> Tensor | None:
        """The attention mask of the rows from `start.row` on, for each run of the batch.

        Args:
            mask: the base run's; None: causal.
            start: where the run begins.
            made: whether the model makes the mask before it calls the decoder. Such a decoder takes
                None as it is and makes no causal mask of it, so the mask is built here.
        """
        if mask is None:
            if not made or not start.row:
                return None
            positions = torch.arange(self.length, device=self.cache["hook_embed"].device)
            return (positions[None] <= positions[start.row :, None])[None, None]
        if mask.ndim == 2:
            return mask.repeat_interleave(start.runs, dim=0)
        return mask[:, :, start.row :].repeat_interleave(
            start.runs if mask.shape[0] > 1 else 1, dim=0
        )

    def _prefix(self, row: int) -> SharedPrefix:
        """The base run's keys and values before this row."""
        if row != self._prefix_row:  # many runs begin at one row
            self._prefix_row, self._shared = row, SharedPrefix()
            for layer in range(self.model.cfg.n_layers):
                points = (f"blocks.{layer}.attn.{point}" for point in ("hook_rot_k", "hook_v"))
                key, value = (self.cache[point][:, :row].transpose(1, 2) for point in points)
                self._shared.hold(layer, key, value)
        return self._shared


def _repeat(x: Tensor, start: Start) -> Tensor:
    """The rows of x [batch, pos, …] from the start on, each sample once for each run."""
    return x[:, start.row :].repeat_interleave(start.runs, dim=0)


def _leave(x: Tensor, hook: Any) -> None:
    """Does nothing."""


def _sees_ahead(mask: Tensor) -> bool:
    """Whether a mask [batch, head, pos, key] lets a row see a later key."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(allowed.triu(1).any())


@contextmanager
def _returning_its_input(layer: nn.Module) -> Iterator[None]:
    """Within this context the layer returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    with replaced_forward(layer, forward):
        yield


# --- which hooks still fire


BEHIND_ALL_LAYERS = 1 << 30


def layer_of(name: str) -> int:
    """The layer of a hook point: −1 before the first (hook_embed, the vision side);
    `BEHIND_ALL_LAYERS` after the last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name == "hook_embed" or name.startswith(TOWERS) else BEHIND_ALL_LAYERS


def _fires(name: str, start: Start) -> bool:
    """Whether a base hook has to fire in a run from `start`: the base run's values include the
    effect of all hooks before it."""
    if layer_of(name) < 0:
        return False
    return start.layer == 0 or (
        layer_of(name) >= start.layer and name != f"blocks.{start.layer}.hook_resid_pre"
    )
