"""HookedMLLM: a Hugging Face vision-language model with named hook points, run as TransformerLens
runs its models."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import Slice, cache_argument, warn_if_untested
from corelens.hooks.points import Hook, HookDict, HookPoint, all_points, hook_list
from corelens.hooks.running import turn
from corelens.inputs.encode import encode
from corelens.inputs.prepare import Inputs, Sample, prepare
from corelens.inputs.tensors import from_tensors, widened
from corelens.layouts import layout_for
from corelens.model.arguments import (
    check_forward,
    check_generate,
    check_keywords,
    generate_arguments,
)
from corelens.model.batch import arguments_of, batch_of
from corelens.model.cache import ActivationCache
from corelens.model.config import config_of
from corelens.model.filters import NamesFilter, named, points_of
from corelens.model.hooked_run import hooked_run
from corelens.model.last_logits import logits_of
from corelens.model.loading import load
from corelens.model.measured_parts import parts_of
from corelens.model.probing import measured
from corelens.model.recording import DiskDict, caching_hooks, finite_hooks, of_whole_prompt
from corelens.model.sound_probing import SoundProbing
from corelens.model.stop import residual_before
from corelens.model.tower_hooks import Tower
from corelens.model.towers import KINDS
from corelens.model.transformer_lens_names import LensModel
from corelens.model.verify import Verification, verify
from corelens.model.weights import Block, Embed, Norm, Unembed
from corelens.model.wiring import absent
from corelens.tokens.positions import Where, check_where, with_positions


class HookedMLLM(LensModel):
    """Wrap a Hugging Face vision-language model; it stays as it is, outside of runs with hooks
    untouched.

    Args:
        hf_model: a transformers model for image-text-to-text.
        processor: its processor; None if you make the input tensors yourself.
        check: at the first run under hooks, prove by two forwards that hooks which do nothing
            change nothing (`corelens.model.self_check`).
    """

    hf: Any  # a PreTrainedModel

    def __init__(self, hf_model: Any, processor: Any = None, check: bool = True):
        super().__init__()
        warn_if_untested()
        # not as a submodule: the wrapped model's modules keep their names, and do not know us
        object.__setattr__(self, "hf", hf_model)
        self.processor = processor
        self.layout = measured(
            layout_for(getattr(hf_model, "config", hf_model)).fitted(hf_model), hf_model
        )
        if self.layout.hears is None:
            self.layout.hears = SoundProbing(hf_model, self.layout)
        parts = parts_of(hf_model, self.layout)
        self._cfg = config_of(hf_model, self.layout, parts)

        decoder, deep = self.layout.decoder(hf_model), self.cfg.n_deepstack
        self.towers = [Tower.of(hf_model, self.layout, kind) for kind in KINDS]
        self.vision, self.audio = (tower.points for tower in self.towers)
        missing = {name: why for tower in self.towers for name, why in tower.absent().items()}
        self.embed = Embed(hf_model.get_input_embeddings())
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(
            Block(parts[number], layer, number < deep)
            for number, layer in enumerate(decoder.layers)  # type: ignore[arg-type]
        )
        self.ln_final = Norm(self.layout.final_norm(decoder), self.layout.norm_weight_offset)
        self.unembed = Unembed(hf_model.get_output_embeddings())
        self.hook_logits = HookPoint()
        for number, (block, layer) in enumerate(zip(self.blocks, decoder.layers, strict=True)):  # type: ignore[arg-type]
            gone = absent(block, layer)  # type: ignore[arg-type]
            missing |= {f"blocks.{number}.{name}": reason for name, reason in gone.items()}
        self._missing = missing
        self.checked = not check
        self._rows: Where | None = None
        self._sparse: Any = None
        self.setup()
        super().train(hf_model.training)  # the points' own mode, which some analyses look at

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: str | torch.dtype = "auto",
        device_map: Any = None,
        check: bool = True,
        **kwargs: Any,
    ) -> "HookedMLLM":
        """Load a model and its processor from a folder that `save_pretrained` wrote, or by its name
        on the Hub.

        Args:
            name: folder or Hub name.
            dtype: "auto" (what the checkpoint holds), "float32", "bfloat16", …
            device_map: as in transformers; "auto" splits a model over devices.
            check: as in the constructor.
            kwargs: handed to transformers' `from_pretrained`; `trust_remote_code` is off unless
                given here.
        """
        return cls(*load(name, dtype, device_map, **kwargs), check)

    # --- what is wrapped

    def setup(self) -> None:
        """Name the hook points and index them; per-head names are made when they are asked for."""
        super().setup()
        for held in ("hook_dict", "mod_dict"):
            every = getattr(self, held).items()
            names = {name: module for name, module in every if name not in self._missing}
            setattr(self, held, HookDict(names, self._missing))

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """From now on these hook names are refused, each with the reason that is given for it."""
        if reasons:
            self._missing = {**self._missing, **reasons}
            self.setup()

    def verify(self, inputs: Any = None) -> Verification:
        """Measure on this model, environment and device whether the identities of hooked runs hold.

        Hook points for which one does not hold are refused by name from then on. See
        `corelens.model.verify.verify`.

        Args:
            inputs: what to run on; by default a picture is drawn, for which the model needs its
                processor.
        """
        return verify(self, inputs)

    def hook_points(self) -> Iterator[HookPoint]:  # type: ignore[override]
        """Every hook point, per-head points in use included."""
        return all_points(self.hook_dict)  # type: ignore[arg-type]

    def to(self, *args: Any, **kwargs: Any) -> "HookedMLLM":
        """Move the wrapped model."""
        self.hf.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> "HookedMLLM":
        """Set the wrapped model's mode."""
        self.hf.train(mode)
        return super().train(mode)

    # --- inputs

    def prepare(self, samples: Sample | Sequence[Sample], **options: Any) -> Inputs:
        """Turn a sample, or a list of them, into one batch on the model's device. See
        `corelens.inputs.prepare`."""
        batch = [samples] if isinstance(samples, Sample) else list(samples)
        inputs = prepare(batch, self.processor, self.layout, self.hf.config, **options)
        inputs = widened(inputs, self.cfg.dtype)
        return with_positions(inputs, self.layout.first_position).to(self.device)

    def inputs(self, **tensors: Tensor) -> Inputs:
        """Inputs made of tensors that you prepared yourself, as you would hand them to the Hugging
        Face model."""
        if tensors:
            check_keywords(tensors, arguments_of(self), (HookedMLLM.inputs,))
        return from_tensors(tensors, self.layout, self.hf.config, self.processor).to(self.device)

    def encode(self, inputs: Inputs) -> Inputs:
        """The same batch with its pictures encoded once, for many runs on it. See
        `corelens.inputs.encode`."""
        return encode(self.layout.visual_features(self.hf), inputs)

    # --- running

    def forward(
        self,
        inputs: Any = None,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        logits_to_keep: int | None = None,
        stop_at_layer: int | None = None,
        loss_per_token: bool = False,
        **tensors: Any,
    ) -> Any:
        """Run the model once.

        Args:
            inputs: what `prepare` made, samples, or a dict of the Hugging Face model's arguments.
            return_type: "logits" [batch, pos, d_vocab]; "loss", see `loss_fn`; "both": (logits,
                loss); or None: the language-model head is not run at all.
            logits_to_keep: only the last n positions' logits (those of 32k positions × 150k words
                are 10 GB).
            stop_at_layer: as in TransformerLens: return the residual stream [batch, pos, d_model]
                that enters this layer, and run neither it nor what follows; 0 to n_layers (before
                the final norm), or counted from the end: −1 leaves the last layer out.
            loss_per_token: the loss of every token [batch, pos − 1] instead of its mean.
        """
        batch = batch_of(self, inputs, tensors)
        check_forward(batch.tensors, return_type, logits_to_keep, stop_at_layer, loss_per_token)
        arguments = {"use_cache": False, **batch.tensors}
        with hooked_run(self, batch, self._rows):
            if stop_at_layer is not None:
                decoder, norm = self.layout.decoder(self.hf), self.ln_final.norm
                return residual_before(self.hf, decoder, norm, stop_at_layer, arguments)
            if return_type is None and not self.hook_logits.active:
                self.hf.base_model(**arguments)  # type: ignore[operator]
                return None
            logits = logits_of(self.hf, arguments, logits_to_keep)
        if return_type in ("logits", None):
            return logits if return_type == "logits" else None
        ids, mask = batch.tensors["input_ids"], batch.tensors.get("attention_mask")
        loss = self.loss_fn(logits, ids, mask, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def generate(
        self,
        inputs: Inputs | Sample | list | dict[str, Tensor] | None = None,
        max_new_tokens: int = 8,
        **options: Any,
    ) -> Int[Tensor, "batch new"]:
        """Generate as Hugging Face does, with hooks firing at the prefill and at every decode step.

        Args:
            inputs: what `prepare` made, samples, or the Hugging Face model's tensors.
            max_new_tokens: how many tokens at the most.
            options: handed to Hugging Face's `generate` (do_sample, temperature,
                cache_implementation …).

        Returns:
            The new tokens only; sequences that ended early are padded.
        """
        batch = batch_of(self, inputs, {})
        keywords = arguments_of(self) | generate_arguments(self.hf)
        check_keywords(options, keywords, [HookedMLLM.generate])
        check_generate(self.hf, batch.tensors, options)
        if self._sparse is not None or any(point.active for point in self.hook_points()):
            options.setdefault("disable_compile", True)
        if any(of_whole_prompt(handle) for handle in self.hook_logits.fwd_hooks):
            options.setdefault("logits_to_keep", 0)  # all of the prompt's, as at every other point
        with hooked_run(self, batch, self._rows, generating=True) as run, torch.no_grad():
            cache = None if run.sparse_plan is None else run.sparse_plan.new_cache()
            if cache is not None:
                options[cache_argument(self.hf)] = cache
            ids = self.hf.generate(**batch.tensors, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
        return ids[:, batch.tensors["input_ids"].shape[1] :]

    @contextmanager
    def hooks(
        self, fwd_hooks: Any = (), bwd_hooks: Any = (), *args: Any, **kwargs: Any
    ) -> Iterator[Any]:  # type: ignore[override]
        """TransformerLens's context with hooks; a single (name, function) needs no list.

        A function of names is asked about the decoder's points only. Other threads wait with their
        runs of this model until it ends: the hooks are not theirs.
        """
        forward, backward = (named(self.hook_dict, hook_list(h)) for h in (fwd_hooks, bwd_hooks))
        with turn(self.hf), super().hooks(forward, backward, *args, **kwargs) as model:  # type: ignore[arg-type]
            yield model

    def add_hook(self, name: Any, hook: Any, *args: Any, **kwargs: Any) -> None:
        """TransformerLens's; a function of names is asked about the decoder's points only."""
        for point, function in named(self.hook_dict, [(name, hook)]):
            super().add_hook(point, function, *args, **kwargs)

    def run_with_cache(  # type: ignore[override]
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        to_disk: str | Path | None = None,
        pos_slice: Any = None,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | MutableMapping[str, Tensor]]:
        """Run once and keep activations.

        Args:
            names_filter: a hook name, a list of them (per-head names too), or a function of names;
                by default all but scores, pattern, pattern_rows, result and the vision tower's.
            device: where to keep them; by default each stays on its layer's device.
            to_disk: a new folder: each activation is written there as it comes, and read when it is
                asked for; `ActivationCache.load(folder, model)` opens it again.
            pos_slice: keep only these positions, as in TransformerLens.
            return_cache_object: an ActivationCache, or else a plain mapping.
            remove_batch_dim: for a single sample, drop the batch axis.
            kwargs: all of `forward`'s.
        """
        batch = args[0] if args else kwargs.get("inputs")
        if remove_batch_dim and isinstance(batch, Inputs | list) and len(batch) > 1:
            what = f"remove_batch_dim with {len(batch)} samples"
            raise CorelensError(what, "one sample", "leave it off")
        if incl_bwd:
            raise CorelensError(
                "incl_bwd=True",
                "a forward run: its output is logits, which have no gradient of their own",
                "make a number of them, and call backward() on it, model.hooks(bwd_hooks=…) around",
            )
        held = {} if to_disk is None else DiskDict(to_disk)
        options = {"device": device, "remove_batch_dim": remove_batch_dim, "pos_slice": pos_slice}
        held, forward_hooks, _ = self.get_caching_hooks(names_filter, cache=held, **options)
        with self.hooks(forward_hooks, [], reset_hooks_end, clear_contexts):
            out = self(*args, **kwargs)
        if isinstance(held, DiskDict):
            cfg, batched = self.cfg, not remove_batch_dim
            held.note(model=cfg.model_name, family=cfg.family, has_batch_dim=batched)
        if return_cache_object:
            return out, ActivationCache(held, self, has_batch_dim=not remove_batch_dim)  # type: ignore[arg-type]
        return out, held

    def get_caching_hooks(  # type: ignore[override]
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: MutableMapping[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[MutableMapping[str, Tensor], list[Hook], list[Hook]]:
        """A cache, and the forward and backward hooks that fill it. Over a generation its entries
        grow step by step."""
        cache = {} if cache is None else cache
        pos_slice = None if pos_slice is None else Slice.unwrap(pos_slice)
        return cache, *caching_hooks(
            points_of(self.hook_dict, names_filter),
            cache,
            incl_bwd,
            device,
            remove_batch_dim,
            pos_slice,
        )

    def add_caching_hooks(  # type: ignore[override]
        self, names_filter: NamesFilter = None, **options: Any
    ) -> MutableMapping[str, Tensor]:
        """As get_caching_hooks, and the hooks are added; reset_hooks() takes them away."""
        cache, forward_hooks, backward_hooks = self.get_caching_hooks(names_filter, **options)
        for direction, hooks in (("fwd", forward_hooks), ("bwd", backward_hooks)):
            for name, function in hooks:
                self.add_hook(name, function, dir=direction)  # type: ignore[arg-type]
        return cache

    @contextmanager
    def check_finite(self, names_filter: NamesFilter = None) -> Iterator["HookedMLLM"]:
        """Within this context a run raises at the first hook point that holds NaN or infinity, and
        names it."""
        with self.hooks(finite_hooks(points_of(self.hook_dict, names_filter))):
            yield self

    @contextmanager
    def pattern_rows(self, rows: Where) -> Iterator["HookedMLLM"]:
        """Which rows `hook_pattern_rows` reads within this context: "question", "last+answer", [3,
        4] …

        Outside of it, those that the functions there ask for (`function.rows`, "question" where it
        says nothing).
        """
        with turn(self.hf):
            before, self._rows = self._rows, check_where(rows)
            try:
                yield self
            finally:
                self._rows = before

    @contextmanager
    def sparse(self, sparse: Any) -> Iterator["HookedMLLM"]:
        """Within this context every run attends as `sparse`, a SparseInference, says; hooks work in
        it as ever.

        An inner context takes the place of an outer one.
        """
        if not hasattr(sparse, "plan"):
            call = f"model.sparse({type(sparse).__name__})"
            raise CorelensError(call, "a cl.SparseInference", "say which heads stay full in one")
        sparse.plan(self.cfg)  # heads of another model are refused here, not in the middle of a run
        with turn(self.hf):
            before, self._sparse = self._sparse, sparse
            try:
                yield self
            finally:
                self._sparse = before

    def sparse_plan(self) -> Any:
        """What the sparse inference of this context leaves out, for one run; None outside of
        `sparse`."""
        return None if self._sparse is None else self._sparse.plan(self.cfg)
