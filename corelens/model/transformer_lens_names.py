"""What TransformerLens's analyses ask a model for: weights of all layers, directions of tokens,
summed biases."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import FactoredMatrix, HookedRootModule
from corelens.layouts import Layout
from corelens.model.config import Config
from corelens.model.projections import home


def _stacked(part: str, name: str, shape: str) -> property:
    def stack(model: Any) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in model.blocks])

    return property(stack, doc=f"[layer, {shape}]: stacked when it is asked for, a copy.")


class LensModel(HookedRootModule):
    """A hooked model's weights under TransformerLens's names. Those of one layer are views:
    `blocks[l].attn.W_Q`.

    No weight is folded: the final norm's weight is in `tokens_to_residual_directions`, not in
    `W_U`.
    """

    hf: Any
    processor: Any
    layout: Layout
    blocks: Any
    embed: Any
    unembed: Any
    ln_final: Any
    _cfg: Config

    # --- what is wrapped

    @property
    def cfg(self) -> Config:
        """The model's shape, and the dtype and device that its input embeddings have now."""
        embeddings: Any = self.hf.get_input_embeddings()  # type: ignore[operator]
        self._cfg.device = home(embeddings)
        self._cfg.dtype = next(embeddings.parameters()).dtype
        return self._cfg

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are; if they are offloaded, where they are computed."""
        return self.cfg.device

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    def hook_names(self, pattern: str | None = None) -> list[str]:
        """The hook names, all of them or those that contain `pattern`; per-head names go without
        saying."""
        return [name for name in self.hook_dict if pattern is None or pattern in name]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The wrapped model's parameters."""
        return self.hf.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The wrapped model's parameters under its own names."""
        return self.hf.named_parameters(*args, **kwargs)

    def __repr__(self) -> str:
        c = self.cfg
        return (
            f"HookedMLLM({c.family}: {c.n_layers} layers × {c.n_heads} heads of {c.d_head}, "
            f"{c.n_kv_heads} KV heads, "
            f"width {c.d_model}, {str(c.dtype).removeprefix('torch.')} on {c.device})"
        )

    # --- weights

    W_Q = _stacked("attn", "W_Q", "head, d_model, d_head")
    W_K = _stacked("attn", "W_K", "kv_head, d_model, d_head")
    W_V = _stacked("attn", "W_V", "kv_head, d_model, d_head")
    W_O = _stacked("attn", "W_O", "head, d_head, d_model")
    b_Q = _stacked("attn", "b_Q", "head, d_head")
    b_K = _stacked("attn", "b_K", "kv_head, d_head")
    b_V = _stacked("attn", "b_V", "kv_head, d_head")
    b_O = _stacked("attn", "b_O", "d_model")
    W_gate = _stacked("mlp", "W_gate", "d_model, d_mlp")
    W_in = _stacked("mlp", "W_in", "d_model, d_mlp")
    W_out = _stacked("mlp", "W_out", "d_mlp, d_model")
    b_in = _stacked("mlp", "b_in", "d_mlp")
    b_out = _stacked("mlp", "b_out", "d_model")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embeddings (before the factor by which some families multiply them)."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where there is none."""
        return self.unembed.b_U

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q · W_Kᵀ of all layers, [layer, head, d_model, d_model], as TransformerLens's factored
        matrix."""
        parts = [block.attn.QK for block in self.blocks]
        return FactoredMatrix(torch.stack([p.A for p in parts]), torch.stack([p.B for p in parts]))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V · W_O of all layers, [layer, head, d_model, d_model], as TransformerLens's factored
        matrix."""
        parts = [block.attn.OV for block in self.blocks]
        return FactoredMatrix(torch.stack([p.A for p in parts]), torch.stack([p.B for p in parts]))

    @property
    def adapter(self) -> Any:
        """What becomes of logits after the unembedding, for TransformerLens's logit lens: a soft
        cap in some."""
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)

        def transform(logits: Tensor) -> Tensor:
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return SimpleNamespace(apply_output_logits_transform=transform)

    def tokens_to_residual_directions(
        self, tokens: str | int | Tensor
    ) -> Float[Tensor, "*tokens d_model"]:
        """The directions in the final residual stream, over its norm's scale, whose products are
        the tokens' logits.

        Args:
            tokens: a text of one token, an id, or ids of any shape.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        ids = torch.as_tensor(ids, device=self.W_U.device)
        return self.W_U.T[ids] * self.ln_final.w.to(self.W_U.device)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of the biases that the layers before `layer` add to the residual stream.

        Args:
            layer: as in TransformerLens, 0 to n_layers.
            mlp_input: with the attention bias of `layer` itself.
            include_mlp_biases: with those of the MLPs.
        """
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device, dtype=self.cfg.dtype)
        for number in range(layer + (1 if mlp_input else 0)):
            block = self.blocks[number]
            parts = [(block.attn.b_O * block.parts.attn_scale, block.attn_post_norm)]
            if include_mlp_biases and number < layer:
                parts.append((block.mlp.b_out * block.parts.mlp_scale, block.mlp_post_norm))
            for bias, norm in parts:
                if norm is not None and bool(bias.any()):
                    raise CorelensError(
                        f"the summed biases of layer {number}, which pass a norm",
                        "biases that are added to the residual stream as they are",
                        "use decompose_resid, which takes a layer's output whole",
                    )
                total = total + bias.to(total.device)
        return total

    # --- text

    def to_tokens(self, text: Any = None, *args: Any, **kwargs: Any) -> Int[Tensor, "batch pos"]:
        """Raises: a prompt with a picture is not its text alone. Says what to call instead."""
        raise CorelensError(
            "model.to_tokens(…)",
            "inputs: tokens and picture together",
            "model.prepare(sample) makes a prompt; model.to_single_token(text) is the id of a "
            "word; "
            "functions that call to_tokens themselves run on cl.bind(model, inputs)",
        )

    def to_str_tokens(self, inputs: Any) -> list[str] | list[list[str]]:
        """The tokens as strings; one list for a single sample, row or text, else a list a row.

        Args:
            inputs: what `prepare` made, a text, or ids [pos] or [batch, pos].
        """
        if isinstance(inputs, str):
            inputs = self.tokenizer(inputs, add_special_tokens=False)["input_ids"]
        ids = torch.as_tensor(inputs.tensors["input_ids"] if hasattr(inputs, "tensors") else inputs)
        rows = ids.reshape(-1, ids.shape[-1]).tolist()
        strings = [[self.tokenizer.decode([token]) for token in row] for row in rows]
        return strings[0] if len(strings) == 1 else strings

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of ids [pos], or the texts of ids [batch, pos]; special tokens are written
        out."""
        ids = torch.as_tensor(tokens)
        if ids.ndim < 2:
            return self.tokenizer.decode(ids.reshape(-1).tolist())
        return [self.tokenizer.decode(row) for row in ids.tolist()]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            parts = [self.tokenizer.decode([i]) for i in ids]
            raise CorelensError(
                f"{text!r}, which is {len(ids)} tokens: {parts}",
                "a text of one token",
                "take another text, or one of these tokens by its id",
            )
        return ids[0]

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Float[Tensor, ""] | Float[Tensor, "batch pos-1"]:
        """Cross entropy of the next token, in nats: TransformerLens's, over tokens that are words.

        Tokens that stand for picture content are not predicted by anybody: as next tokens they are
        left out, as padding is (0 with `per_token`).

        Args:
            attention_mask: [batch, pos]; padding and what it predicts is left out.
            per_token: the loss of every next token instead of the mean.
        """
        tokens = tokens.to(logits.device)
        log_probs = logits[:, :-1].float().log_softmax(-1)
        loss = -log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        pictures = torch.tensor(self.layout.placeholders(self.hf.config), device=tokens.device)
        counted = ~torch.isin(tokens[:, 1:], pictures)
        if attention_mask is not None:
            real = attention_mask.to(logits.device).bool()
            counted = counted & real[:, 1:] & real[:, :-1]
        loss = loss.masked_fill(~counted, 0.0)
        return loss if per_token else loss.sum() / counted.sum()

    # --- TransformerLens's switches

    def set_use_attn_result(self, use: bool) -> None:
        """Does nothing: `hook_result` is there, and made only where something is hooked to it."""

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Does nothing: there is no `hook_mlp_in`; hook `hook_resid_mid` or
        `ln2.hook_normalized`."""

    def set_use_attn_in(self, use: bool) -> None:
        """Does nothing: there is no `hook_attn_in`; `cl.path_patch` writes the input of one
        head."""

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Does nothing: there is no `hook_q_input`; `cl.path_patch` writes the q, k or v of one
        head."""
