"""What TransformerLens's analyses ask a model for: weights of all layers, directions of tokens, summed biases."""

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from corelens.errors import CorelensError
from corelens.hf import HookedRootModule
from corelens.model.weights import readable


def _stacked(part: str, name: str, shape: str) -> property:
    def stack(model: Any) -> Tensor:
        return torch.stack([getattr(getattr(block, part), name) for block in model.blocks])

    return property(stack, doc=f"[layer, {shape}]: stacked when it is asked for, a copy.")


class LensModel(HookedRootModule):
    """A hooked model's weights under TransformerLens's names. Those of one layer are views: `blocks[l].attn.W_Q`.

    No weight is folded: the final norm's weight is in `tokens_to_residual_directions`, not in `W_U`.
    """

    hf: Any
    cfg: Any
    blocks: Any
    unembed: Any
    ln_final: Any
    to_single_token: Any

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
        weight = readable(self.hf.get_input_embeddings(), "weight")
        assert weight is not None
        return weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where there is none."""
        return self.unembed.b_U

    @property
    def adapter(self) -> Any:
        """What becomes of logits after the unembedding, for TransformerLens's logit lens: a soft cap in some."""
        cap = getattr(self.hf.config.get_text_config(), "final_logit_softcapping", None)

        def transform(logits: Tensor) -> Tensor:
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return SimpleNamespace(apply_output_logits_transform=transform)

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Float[Tensor, "*tokens d_model"]:
        """The directions in the final residual stream, over its norm's scale, whose products are the tokens' logits.

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
            parts = [(block.attn.b_O, block.attn_post_norm)]
            if include_mlp_biases and number < layer:
                parts.append((block.mlp.b_out, block.mlp_post_norm))
            for bias, norm in parts:
                if norm is not None and bool(bias.any()):
                    raise CorelensError(
                        f"the summed biases of layer {number}, which pass a norm",
                        "biases that are added to the residual stream as they are",
                        "use decompose_resid, which takes a layer's output whole",
                    )
                total = total + bias.to(total.device)
        return total
