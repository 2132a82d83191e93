"""The cache of a run: TransformerLens's, told of DeepStack, of norms behind sublayers, and of
per-head names."""

import copy
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hf import LensCache, Slice
from corelens.hooks.points import PER_HEAD
from corelens.model.projections import head_results
from corelens.model.recording import DiskDict
from corelens.model.weights import norm_eps, norm_weight


class ActivationCache(LensCache):
    """TransformerLens's ActivationCache, whose methods work here as they do there, on image
    positions too.

    Added: `blocks.3.attn.head.5.hook_z` reads a slice where only `blocks.3.attn.hook_z` was kept.
    What DeepStack adds is a component of its own ("0_deepstack"). Where a family norms what
    attention and MLP give before it is added, head and neuron results are what reaches the residual
    stream: multiplied by the norm's weight over its scale in this run.
    """

    def __getitem__(self, key: Any) -> Tensor:
        """An activation by its full name, a per-head name, or TransformerLens's shorthand ("z",
        3)."""
        if (
            isinstance(key, str)
            and key not in self.cache_dict
            and (match := PER_HEAD.fullmatch(key))
        ):
            whole = f"{match['attn']}.{match['point']}"
            if whole in self.cache_dict:
                point = self.model.hook_dict[whole]  # type: ignore[attr-defined]
                # raises for a head that is not there
                point.per_head(match["kind"], int(match["index"]), key)
                part = int(match["index"]) // (point.group if match["kind"] == "head" else 1)
                return self.cache_dict[whole].select(
                    point.head_axis - (0 if self.has_batch_dim else 1), part
                )
        # names of ours too
        if isinstance(key, tuple) and f"blocks.{key[1]}.attn.hook_{key[0]}" in self.cache_dict:
            return self.cache_dict[f"blocks.{key[1]}.attn.hook_{key[0]}"]
        try:
            return super().__getitem__(key)
        except KeyError:
            name = (
                f"blocks.{key[1]}.attn.hook_{key[0]}"
                if isinstance(key, tuple) and len(key) > 1
                else str(key)
            )
            near = get_close_matches(name, list(self.cache_dict), n=3, cutoff=0.5)
            raise CorelensError(
                f"{key!r}, which this cache does not hold",
                f"one of its {len(self.cache_dict)} names; the nearest: "
                f"{', '.join(near) or 'none'}",
                "name it in names_filter: scores, pattern, rows, result and vision points are "
                "kept only when named",
            ) from None

    def __contains__(self, key: object) -> bool:
        """Whether a full or per-head name can be read."""
        if key in self.cache_dict:
            return True
        match = PER_HEAD.fullmatch(key) if isinstance(key, str) else None
        return match is not None and f"{match['attn']}.{match['point']}" in self.cache_dict

    @classmethod
    def load(cls, folder: str | Path, model: Any, device: Any = None) -> "ActivationCache":
        """A cache that `run_with_cache(…, to_disk=folder)` wrote; tensors are read when they are
        asked for."""
        held = DiskDict(folder, device=device, new=False)
        if not len(held):
            raise CorelensError(
                f"the folder {str(folder)!r} without tensors",
                "what to_disk= wrote",
                "check the path",
            )
        return cls(held, model, has_batch_dim=held.facts().get("has_batch_dim", True))  # type: ignore[arg-type]

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "ActivationCache":
        """As in TransformerLens."""
        part = super().apply_slice_to_batch_dim(batch_slice)
        return ActivationCache(part.cache_dict, self.model, has_batch_dim=part.has_batch_dim)

    # --- the residual stream, taken apart

    def decompose_resid(
        self, layer: int | None = None, mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False, pos_slice: Any = None, incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:  # fmt: skip
        """As in TransformerLens, with what DeepStack adds after a layer behind that layer's MLP
        (mode "all"), and what a layer adds beside both ("0_extra").

        Where layers scale the residual stream at their end, each component is what of it reaches
        `layer`.
        """
        if mode == "all":
            self._check_sums(self._depth(layer))
        parts: Any
        labels: Any
        parts, labels = super().decompose_resid(
            layer, mlp_input, mode, False, pos_slice, incl_embeds, return_labels=True
        )
        layer = self._depth(layer)
        if mode == "all":
            for added, label in self._extras(layer, pos_slice) + self._deepstack(layer, pos_slice):
                number, _ = label.split("_", 1)
                behind = [i for i, other in enumerate(labels) if other.split("_", 1)[0] == number]
                parts = torch.cat([parts[: behind[-1] + 1], added[None], parts[behind[-1] + 1 :]])
                labels.insert(behind[-1] + 1, label)
        factors = [self._reaching(label, layer) for label in labels]
        if any(factor != 1.0 for factor in factors):
            shape = (-1, *([1] * (parts.ndim - 1)))
            parts = parts * torch.tensor(factors, dtype=parts.dtype, device=parts.device).reshape(
                shape
            )
        if apply_ln:
            parts = self.apply_ln_to_stack(parts, layer, pos_slice=pos_slice, mlp_input=mlp_input)
        return (parts, labels) if return_labels else parts

    def stack_head_results(
        self, layer: int = -1, return_labels: bool = False, incl_remainder: bool = False,
        pos_slice: Any = None,
        apply_ln: bool = False,
    ) -> Any:  # fmt: skip
        """As in TransformerLens; behind a norm after attention, what of each head reaches the
        residual stream.

        Layers without attention heads, and heads that a layer lacks, are left out: their output is
        in the remainder.
        """
        scaled_stream = any(block.parts.stream_scale != 1.0 for block in self.model.blocks)
        if len(set(self.model.cfg.heads)) > 1 or scaled_stream:  # type: ignore[attr-defined]
            return self._stack_of_some(layer, return_labels, incl_remainder, pos_slice, apply_ln)
        for number, block in enumerate(self.model.blocks):
            self._check_gate(number, block)
        there = self
        if any(
            b.attn_post_norm is not None or b.parts.attn_scale != 1.0 for b in self.model.blocks
        ):
            there = copy.copy(self)
            scaled = {
                f"blocks.{n}.attn.hook_result": self._result(n)
                for n in range(self.model.cfg.n_layers)
            }
            there.cache_dict = {**self.cache_dict, **scaled}
        return super(ActivationCache, there).stack_head_results(
            layer, return_labels, incl_remainder, pos_slice, apply_ln
        )

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: Any = None,
        pos_slice: Any = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """As in TransformerLens; behind a norm after the MLP, what of each neuron reaches the
        residual stream.

        With `project_output_onto` [d_model] or [d_model, output] neither case builds [pos, d_mlp,
        d_model].
        """
        block = self.model.blocks[layer]
        if block.mlp_post_norm is None:
            results = super().get_neuron_results(
                layer, neuron_slice, pos_slice, project_output_onto
            )
            return results if block.parts.mlp_scale == 1.0 else results * block.parts.mlp_scale
        weight, scale = self._mlp_norm(layer, pos_slice)
        acts, w_out = self._neurons(layer, neuron_slice, pos_slice)
        if project_output_onto is None:
            return acts[..., None] * w_out * (weight / scale).to(acts.dtype)[..., None, :]
        # Σ_m W_out[n, m] · weight[m] / scale · direction[m]: weight goes to the direction, scale to
        # the activation
        onto = project_output_onto.mT if project_output_onto.ndim > 1 else project_output_onto
        onto = onto * weight.to(onto.dtype)
        projected, acts = w_out @ (onto.mT if onto.ndim > 1 else onto), acts / scale.to(acts.dtype)
        return acts * projected if projected.ndim == 1 else acts[..., None] * projected

    def neurons_onto(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        directions: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        """As in TransformerLens; behind a norm after the MLP, of what each neuron adds to the
        residual stream."""
        plain = (b.mlp_post_norm is None and b.parts.mlp_scale == 1.0 for b in self.model.blocks)
        if not layer or all(plain):
            return super().neurons_onto(layer, pos_slice, neuron_slice, directions, mlp_input)
        scale, centres = self.norm_of(layer, mlp_input, _slice(pos_slice))
        onto = directions - directions.mean(0) if centres else directions
        results = [self.get_neuron_results(n, neuron_slice, pos_slice, onto) for n in range(layer)]
        return (torch.cat(results, dim=-2) / scale[..., None]).movedim(-2, 0)

    def get_full_resid_decomposition(
        self, layer: int | None = None, mlp_input: bool = False, expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None, return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """As in TransformerLens, with what DeepStack adds as the last components."""
        depth = self._depth(layer)
        self._check_sums(depth, every_head=True)
        if expand_neurons:
            self._check_neurons(depth)
        parts: Any
        labels: Any
        parts, labels = super().get_full_resid_decomposition(
            layer, mlp_input, expand_neurons, apply_ln, pos_slice, True, project_output_onto
        )
        for added, label in self._deepstack(depth, pos_slice):
            added = added[None]
            if apply_ln:
                added = self.apply_ln_to_stack(
                    added, depth, pos_slice=pos_slice, mlp_input=mlp_input
                )
            added = added if project_output_onto is None else added @ project_output_onto
            parts = torch.cat([parts, added])
            labels.append(label)
        return (parts, labels) if return_labels else parts

    # --- inside

    def _depth(self, layer: int | None) -> int:
        return self.model.cfg.n_layers if layer is None or layer == -1 else layer

    def _check_sums(self, depth: int, every_head: bool = False) -> None:
        """Raise where the residual stream before layer `depth` is not the sum of its parts."""
        for number, block in enumerate(list(self.model.blocks)[:depth]):
            why = block.parts.unsummed
            if not why and every_head and (block.parts.extra or block.parts.stream_scale != 1.0):
                why = "it scales the stream or adds a third output: decompose_resid adds up"
            if not why and every_head and block.parts.attention is None:
                why = "it has no attention heads: decompose_resid takes its mixer's output whole"
            if why:
                raise CorelensError(
                    f"a sum of what layer {number} and the layers before add to the residual "
                    f"stream: {why}",
                    "layers whose attention and MLP outputs are all that is added (measured at "
                    "wrap time)",
                    "take accumulated_resid or logit_lens, which read the stream itself, or an "
                    "earlier layer",
                )

    def _check_gate(self, number: int, block: Any) -> None:
        if block.parts.gated and f"blocks.{number}.attn.hook_result" not in self.cache_dict:
            raise CorelensError(
                f"head results of layer {number}, whose z is gated, without hook_result",
                "a cache that holds it: z · W_O leaves the gate out",
                "name blocks.{l}.attn.hook_result in names_filter beside what is kept",
            )

    def _stack_of_some(
        self, layer: int, return_labels: bool, incl_remainder: bool, pos_slice: Any, apply_ln: bool
    ) -> Any:
        """stack_head_results of a model whose layers differ in how many heads they have."""
        depth, positions = self._depth(layer), _slice(pos_slice)
        parts, labels = [], []
        for number, count in enumerate(self.model.cfg.heads[:depth]):  # type: ignore[attr-defined]
            if count:
                self._check_gate(number, self.model.blocks[number])
                result = self._result(number) * self._reaching(f"{number}_head", depth)
                parts += [positions.apply(x, dim=-2) for x in result.unbind(-2)]
                labels += [f"L{number}H{head}" for head in range(count)]
        like = positions.apply(
            self["resid_post", depth - 1] if depth else self["hook_embed"], dim=-2
        )
        stack = torch.stack(parts) if parts else like.new_zeros(0, *like.shape)
        if incl_remainder:
            stack, labels = torch.cat([stack, (like - stack.sum(0))[None]]), [*labels, "remainder"]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, depth, pos_slice=pos_slice)
        return (stack, labels) if return_labels else stack

    def _deepstack(self, layer: int, pos_slice: Any) -> list[tuple[Tensor, str]]:
        """What is added after the layers before `layer`, and its label."""
        count = min(layer, self.model.cfg.n_deepstack)  # type: ignore[attr-defined]
        held = [
            (self[f"blocks.{number}.hook_deepstack"], f"{number}_deepstack")
            for number in range(count)
        ]
        # of a family that has no point for it
        for number in range(count, min(layer, self.model.cfg.n_layers - 1)):
            before = f"blocks.{number}.hook_resid_post"
            after = f"blocks.{number + 1}.hook_resid_pre"
            if before in self.cache_dict and after in self.cache_dict:
                added = self[after] - self[before].to(self[after].device)
                if bool(added.any()):
                    held.append((added, f"{number}_deepstack"))
        return [(_slice(pos_slice).apply(added, dim=-2), label) for added, label in held]

    def _extras(self, layer: int, pos_slice: Any) -> list[tuple[Tensor, str]]:
        """What layers before `layer` add beside attention and MLP, and its label: what their sums
        lack."""
        held = []
        for number, block in enumerate(list(self.model.blocks)[:layer]):
            if block.parts.extra is not None:
                after = self["resid_post", number] / block.parts.stream_scale
                added = after - self["resid_mid", number] - self["mlp_out", number]
                held.append((_slice(pos_slice).apply(added, dim=-2), f"{number}_extra"))
        return held

    def _reaching(self, label: str, layer: int) -> float:
        """By what a component of the stream is multiplied on its way to `layer`."""
        number, _, name = label.partition("_")
        first = int(number) if number.isdigit() else 0
        # (what is added between two layers is added to a stream that is scaled already)
        first += name == "deepstack"
        scales = [block.parts.stream_scale for block in list(self.model.blocks)[first:layer]]
        return math.prod(scales)

    def _result(self, layer: int) -> Tensor:
        """Head results of a layer with a norm after attention, as they reach the residual
        stream."""
        block, name = self.model.blocks[layer], f"blocks.{layer}.attn.hook_result"
        o_proj = block.attn.module("o_proj")
        raw = (
            self.cache_dict[name]
            if name in self.cache_dict
            else head_results(o_proj, self["z", layer])
        )
        if block.parts.attn_scale != 1.0:
            raw = raw * block.parts.attn_scale
        if block.attn_post_norm is None:
            return raw
        return (
            raw
            * self._factor(block.attn_post_norm, block, raw.sum(-2) + block.attn.b_O)[..., None, :]
        )

    def _neurons(self, layer: int, neuron_slice: Any, pos_slice: Any) -> tuple[Tensor, Tensor]:
        """The activations [batch, pos, neuron] and the rows of W_out [neuron, d_model] of some
        neurons."""
        acts = _slice(pos_slice).apply(self["post", layer], dim=-2)
        w_out = _slice(neuron_slice).apply(self.model.blocks[layer].mlp.W_out, dim=0)
        return _slice(neuron_slice).apply(acts, dim=-1), w_out

    def _mlp_norm(self, layer: int, pos_slice: Any) -> tuple[Tensor, Tensor]:
        """The weight [d_model] of the norm after a layer's MLP, and its scale [batch, pos, 1] in
        this run."""
        block = self.model.blocks[layer]
        out = (
            _slice(pos_slice).apply(self["post", layer], dim=-2) @ block.mlp.W_out + block.mlp.b_out
        )
        return norm_weight(block.mlp_post_norm, block.norm_weight_offset), _norm_scale(
            block.mlp_post_norm, out
        )

    def _factor(self, norm: Any, block: Any, x: Tensor) -> Tensor:
        """What a norm multiplies its input `x` by, number by number."""
        return (norm_weight(norm, block.norm_weight_offset) / _norm_scale(norm, x)).to(x.dtype)

    def _check_neurons(self, layer: int) -> None:
        absent = self.model.hook_dict.absent  # type: ignore[attr-defined]
        missing = [n for n in range(layer) if f"blocks.{n}.mlp.hook_post" in absent]
        if missing:
            raise CorelensError(
                f"single neurons of layers {missing}, which are mixtures of experts", "layers with "
                    "one MLP",
                "pass expand_neurons=False",
            )  # fmt: skip


def _norm_scale(norm: Any, x: Tensor) -> Tensor:
    return (x.float().pow(2).mean(-1, keepdim=True) + norm_eps(norm)).sqrt()


def _slice(pos_slice: Any) -> Slice:
    return pos_slice if isinstance(pos_slice, Slice) else Slice(pos_slice)
