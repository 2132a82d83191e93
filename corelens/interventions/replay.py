"""Many runs that differ little from one base run, each begun as late as is exact.

A patch at layer l changes nothing before layer l, and a patch from row p on changes no row before p
in a causal model. So a run begins at a layer, from the base run's residual stream; on a suffix of
the rows, with the base run's keys and values before it; and several runs share a batch. Everything
goes through the model's own forward: what the decoder is called with is replaced, layers that are
not needed hand their input on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from corelens.hf import CACHE_ARGUMENTS, cache_argument, replaced_forward
from corelens.hooks.points import TOWERS, Hook
from corelens.inputs.prepare import Inputs
from corelens.model.filters import named
from corelens.model.hooked import HookedMLLM

# each has its own way to be cut
CALL = ("inputs_embeds", "attention_mask", "position_ids", "visual_pos_masks")
LEAST_PREFIX = 1 / 8  # of the rows: below that, an explicit mask costs more than is saved


@dataclass
class Start:
    """Where a run begins: at this layer, with this row; and how many runs share its batch."""

    layer: int = 0
    row: int = 0
    runs: int = 1


class Replay:
    """One base run, and further runs of the same batch that begin in the middle of it.

    Args:
        model: a HookedMLLM.
        inputs: the base run's batch of n samples.
        hooks: to run under, in the base run and in all others.
        names: hook points whose base values are kept, in `cache`.
        keep: how many of the last positions' logits are kept; None: all.
        rows: also keep keys and values, so that runs may begin with a later row.
    """

    def __init__(
        self,
        model: HookedMLLM,
        inputs: Inputs,
        hooks: Sequence[Hook] = (),
        names: Sequence[str] = (),
        keep: int | None = None,
        rows: bool = True,
    ):
        self.model, self.inputs, self.keep = model, inputs, keep
        self.hooks = named(model.hook_dict, hooks)
        self.decoder = model.layout.decoder(model.hf)
        layers = range(model.cfg.n_layers)
        wanted = ["hook_embed", *(f"blocks.{layer}.hook_resid_pre" for layer in layers)]
        rows = rows and all(model.cfg.heads)  # what other mixers carry from row to row is not kept
        if rows:
            wanted += [f"blocks.{layer}.attn.hook_rot_k" for layer in layers]
            wanted += [f"blocks.{layer}.attn.hook_v" for layer in layers]
        caching = [*dict.fromkeys([*wanted, *names])]
        self._kwargs: dict[str, Any] = {}
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
        # A layer without a k_proj of its own reads the keys of an earlier layer from the decoder's
        # own bookkeeping: that layer then has to run, so every run begins at the first.
        parts = [block.parts for block in model.blocks]
        self._own_keys = all(p.k_proj or not (p.attention and p.q_proj) for p in parts)
        self.suffixes = rows and self._causal()

    def _capture(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # What the model calls its decoder with (masks, rotary positions, DeepStack's features) is
        # the family's own affair: it is recorded once and cut to size for each run.
        self._kwargs = dict(kwargs)

    def _causal(self) -> bool:
        """Whether no row attends to a later one: then rows before a patch are those of the base
        run. A mask of an unknown kind counts as one that looks ahead."""
        mask = self._kwargs.get("attention_mask")
        masks = list(mask.values()) if isinstance(mask, dict) else [mask]
        for layer_mask in masks:
            if layer_mask is not None and (
                not isinstance(layer_mask, Tensor)
                or (layer_mask.ndim == 4 and _sees_ahead(layer_mask))
            ):
                return False
        return True

    def begin(self, layer: int, row: int, runs: int = 1) -> Start:
        """The latest exact start at or before this layer and row."""
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
        """Run once from `start` under the base hooks and these; row i·runs + j of the batch is run
        j of sample i.

        Args:
            start: what `begin` returned.
            hooks: made for that batch; their layers are not before `start.layer`.
            reading: {name: function} to call at points, after the edits.
            logits: False: the language-model head is not run, and None returned.

        Returns:
            The logits of the last `keep` positions (or of all).
        """
        kwargs = self._called_with(start)
        # The model is called with little, and its decoder with `kwargs`. Position ids are passed
        # all the same: without them some models make their own, from what they remember of the
        # last batch.
        tensors = {
            name: kwargs[name]
            for name in ("inputs_embeds", "position_ids")
            if kwargs.get(name) is not None
        }
        if self._needs_ids():
            tensors["input_ids"] = self._any_text(tensors.pop("inputs_embeds"))
        batch = Inputs(tensors, self.inputs.token_maps, self.inputs.samples)
        base_hooks = [(name, function) for name, function in self.hooks if _fires(str(name), start)]
        every = [*base_hooks, *hooks, *(reading or {}).items()]
        length = self.length - start.row
        wanted = self.length if self.keep is None else self.keep
        with torch.no_grad(), self._begun(start, kwargs):
            if not logits:
                self.model.run_with_hooks(batch, fwd_hooks=every, return_type=None)
                return None
            row_logits = self.model.run_with_hooks(
                batch, fwd_hooks=every, logits_to_keep=min(wanted, length)
            )
        if wanted > length:  # rows before the start are the base run's
            before = self.logits[:, : wanted - length].repeat_interleave(start.runs, dim=0)
            row_logits = torch.cat([before, row_logits], dim=1)
        return row_logits

    # --- how the decoder is called

    def _embeds(self, start: Start) -> Tensor:
        return _repeat(self.cache["hook_embed"], start)

    def _needs_ids(self) -> bool:
        """Whether the model hands its decoder more than embeddings that it made of the ids: then it
        cannot be called with embeddings alone."""
        n = len(self.cache["hook_embed"])
        more = (x for name, x in self._kwargs.items() if name not in CALL and isinstance(x, Tensor))
        made = any(x.is_floating_point() and x.shape[:2] == (n, self.length) for x in more)
        return made and self._kwargs.get("input_ids") is None

    def _any_text(self, embeds: Tensor) -> Int[Tensor, "batch pos"]:
        """Token ids of plain text, to call the model with: what its decoder gets for them is
        replaced."""
        pictures = self.model.layout.placeholders(self.model.hf.config)
        token = next(token for token in range(len(pictures) + 1) if token not in pictures)
        return torch.full(embeds.shape[:2], token, device=embeds.device)

    @contextmanager
    def _begun(self, start: Start, kwargs: dict[str, Any]) -> Iterator[None]:
        """Within this context the decoder begins at `start`, called with `kwargs` whatever it is
        given."""
        with ExitStack() as stack:

            def call(module: nn.Module, args: Any, received: dict[str, Any]) -> Any:
                return (), {**received, **kwargs}

            stack.callback(self.decoder.register_forward_pre_hook(call, with_kwargs=True).remove)
            layers = list(self.decoder.layers)
            for layer in layers[: start.layer]:
                stack.enter_context(_handing_on(layer))
            # (at the first layer, too: what the decoder does before it is in the base run's value
            # already)
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
        """What the base run called its decoder with, cut to the rows from `start.row` on and
        repeated for each run of the batch."""
        kwargs = dict(self._kwargs)
        n = len(self.cache["hook_embed"])
        kwargs["inputs_embeds"] = self._embeds(start)
        for name, value in self._kwargs.items():
            if name in ("cache_position", "input_ids"):
                del kwargs[name]  # made anew; embeddings stand in the place of ids
            elif (
                name not in CALL
                and isinstance(value, Tensor)
                and value.shape[:2] == (n, self.length)
            ):
                kwargs[name] = _repeat(value, start)
        for name in CACHE_ARGUMENTS:
            kwargs.pop(name, None)
        kwargs[cache_argument(self.decoder)] = self._prefix(start) if start.row else None
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
        # DeepStack adds one feature a visual token, stacked without the text tokens between: number
        # the tokens, cut and repeat the numbers as the rows are, and take the features by number.
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
            made: whether the model makes the mask before it calls the decoder: then the decoder
                does not make a causal one of None, and it is built here.
        """
        if mask is None:
            if not made or not start.row:
                return None
            every = torch.arange(self.length, device=self.cache["hook_embed"].device)
            return (every[None] <= every[start.row :, None])[None, None]
        if mask.ndim == 2:
            return mask.repeat_interleave(start.runs, dim=0)
        return mask[:, :, start.row :].repeat_interleave(
            start.runs if mask.shape[0] > 1 else 1, dim=0
        )

    def _prefix(self, start: Start) -> DynamicCache:
        """The base run's keys and values before `start.row`."""
        cache = DynamicCache()
        for layer in range(self.model.cfg.n_layers):
            # The layers before are not run: only the length of their cache is asked for.
            runs = start.runs if layer >= start.layer else 1
            key, value = (
                self.cache[f"blocks.{layer}.attn.{point}"][:, : start.row]
                .transpose(1, 2)
                .repeat_interleave(runs, dim=0)
                for point in ("hook_rot_k", "hook_v")
            )
            cache.update(key, value, layer)
        return cache


def _repeat(x: Tensor, start: Start) -> Tensor:
    """The rows of x [batch, pos, …] from the start on, each sample once for each run."""
    return x[:, start.row :].repeat_interleave(start.runs, dim=0)


def _sees_ahead(mask: Tensor) -> bool:
    """Whether a mask [batch, head, pos, key] lets a row see a later key."""
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(allowed.triu(1).any())


@contextmanager
def _handing_on(layer: nn.Module) -> Iterator[None]:
    """Within this context the layer returns its input."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    with replaced_forward(layer, forward):
        yield


# --- which hooks still fire


def layer_of(name: str, n_layers: int = 1 << 30) -> int:
    """The layer of a hook point: −1 before the first (hook_embed, the vision side), `n_layers`
    behind the last."""
    if name.startswith("blocks."):
        return int(name.split(".")[1])
    return -1 if name == "hook_embed" or name.startswith(TOWERS) else n_layers


def _fires(name: str, start: Start) -> bool:
    """Whether a base hook still has to fire: what it did before the start is in the base run's
    values."""
    if layer_of(name) < 0:
        return False
    return start.layer == 0 or (
        layer_of(name) >= start.layer and name != f"blocks.{start.layer}.hook_resid_pre"
    )
