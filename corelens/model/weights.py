"""Weights in TransformerLens's shapes: views of the Hugging Face model's own, never copies where a
view can do.

`model.blocks[l].attn.W_Q` [head, d_model, d_head] (W_K, W_V with KV heads), `W_O` [head, d_head,
d_model], `b_Q` …; `model.blocks[l].mlp.W_gate`, `W_in` [d_model, d_mlp], `W_out` [d_mlp, d_model];
norms have `w`. Writing into a view writes into the model. Weights that are offloaded are read from
where they lie. A projection with an adapter, or of another kind than nn.Linear, has no view: its
matrix is computed, a copy (see `corelens.model.projections`).
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import FactoredMatrix
from corelens.hooks.points import AttentionPoints, BlockPoints, MLPPoints, NormPoints
from corelens.model.parts import Parts
from corelens.model.projections import embedding, loaded_tensor, projection, projection_bias


def norm_eps(norm: nn.Module) -> float:
    """A norm's ε, under either of the names it has."""
    eps = getattr(norm, "variance_epsilon", None)
    return float(norm.eps if eps is None else eps)  # type: ignore[arg-type]


def centres(norm: nn.Module) -> bool:
    """Whether a norm takes the mean off its input (LayerNorm), and does not only scale it: measured
    on one vector."""
    weight = loaded_tensor(norm, "weight")
    if isinstance(norm, nn.LayerNorm) or weight is None or weight.device.type == "meta":
        return isinstance(norm, nn.LayerNorm)
    x = torch.linspace(-1, 1, weight.shape[-1], dtype=torch.float32, device=weight.device).to(
        weight.dtype
    )
    with torch.no_grad():
        moved, still = norm(x[None] + 1).float(), norm(x[None]).float()
    return bool((moved - still).abs().max() <= 0.05 * still.abs().max())


def norm_weight(norm: nn.Module, offset: float) -> Float[Tensor, " d_model"]:
    """What a norm multiplies by: its weight, or 1 + weight where the family's norms do that."""
    weight = loaded_tensor(norm, "weight")
    assert weight is not None
    return weight if not offset else offset + weight


# --- the points with their weights beside them


class Norm(NormPoints):
    """A norm's points, its weight `w` [d_model], and itself: calling it norms."""

    norm: Any

    def __init__(self, norm: nn.Module | None, offset: float):
        super().__init__()
        # not a submodule: the weights stay the wrapped model's
        object.__setattr__(self, "norm", norm)
        self.offset = offset
        self.centres = norm is not None and centres(norm)

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """What the norm multiplies by."""
        return norm_weight(self.norm, self.offset)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm itself, without firing its points."""
        return self.norm(x)  # type: ignore[operator]


def _module(of: tuple[Parts, nn.Module], name: str) -> nn.Module:
    """A layer's module by the name of the attribute of its parts that says where it is."""
    parts, layer = of
    if (path := getattr(parts, name)) is None:
        attends = parts.attention is not None or name.startswith("mlp")
        raise CorelensError(
            f"weights of a layer without a module for {name!r}" if attends
            else f"{name!r} of a layer without attention heads: its mixer is a "
                f"{_mixer(parts, layer)}",
            "a layer with one MLP and a projection each for q, k, v and z",
            "read the weights of experts, of fused projections and of other mixers from model.hf",
        )  # fmt: skip
    return layer.get_submodule(path)


def _mixer(parts: Parts, layer: nn.Module) -> str:
    return (
        "unknown module" if parts.mixer is None else type(layer.get_submodule(parts.mixer)).__name__
    )


def _bias(module: nn.Module) -> Float[Tensor, " out"]:
    """A projection's bias; zeros where it has none."""
    bias = projection_bias(module)
    if bias is not None:
        return bias
    weight = projection(module)
    return torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)


class Attention(AttentionPoints):
    """The points of one layer's attention, and its weights."""

    _of: tuple[Parts, nn.Module]

    def __init__(self, parts: Parts, layer: nn.Module):
        super().__init__(parts.n_heads, parts.n_kv_heads, parts.gated, parts.cross)
        object.__setattr__(self, "_of", (parts, layer))
        self.n_heads, self.n_kv_heads, self.d_head = parts.n_heads, parts.n_kv_heads, parts.d_head

    def module(self, name: str) -> nn.Module:
        """One of the layer's modules: "q_proj", "k_proj", "v_proj", "o_proj"."""
        return _module(self._of, name)

    def _in(self, name: str, heads: int) -> Float[Tensor, "head d_model d_head"]:
        return rearrange(
            projection(self.module(name)), "(head d) model -> head model d", head=heads
        )

    def _b(self, name: str, heads: int) -> Float[Tensor, "head d_head"]:
        return rearrange(_bias(self.module(name)), "(head d) -> head d", head=heads)

    @property
    def W_gate(self) -> Float[Tensor, "head d_model d_head"]:
        """What makes `hook_gate`, in layers whose q_proj gives a gate beside the query."""
        if not self._of[0].gated:
            raise CorelensError(
                "W_gate of a layer without a gate", "a layer with gated attention", "see hook_gate"
            )
        return self._in("q_proj", self.n_heads)[..., self.d_head :]

    W_Q = property(
        lambda self: self._in("q_proj", self.n_heads)[..., : self.d_head],
        doc="[head, d_model, d_head]",
    )
    W_K = property(
        lambda self: self._in("k_proj", self.n_kv_heads), doc="[kv_head, d_model, d_head]"
    )
    W_V = property(
        lambda self: self._in("v_proj", self.n_kv_heads), doc="[kv_head, d_model, d_head]"
    )
    b_Q = property(
        lambda self: self._b("q_proj", self.n_heads)[:, : self.d_head], doc="[head, d_head]"
    )
    b_K = property(lambda self: self._b("k_proj", self.n_kv_heads), doc="[kv_head, d_head]")
    b_V = property(lambda self: self._b("v_proj", self.n_kv_heads), doc="[kv_head, d_head]")
    b_O = property(lambda self: _bias(self.module("o_proj")), doc="[d_model]")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """From a head's z to the residual stream (before the norm after attention, where there is
        one)."""
        return rearrange(
            projection(self.module("o_proj")), "model (head d) -> head d model", head=self.n_heads
        )

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q · W_Kᵀ, [head, d_model, d_model], as TransformerLens's factored matrix; a KV head for
        each query head."""
        return FactoredMatrix(self.W_Q, self._expanded(self.W_K).transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V · W_O, [head, d_model, d_model], as TransformerLens's factored matrix; a KV head for
        each query head."""
        return FactoredMatrix(self._expanded(self.W_V), self.W_O)

    def _expanded(self, weight: Tensor) -> Float[Tensor, "head d_model d_head"]:
        return weight.repeat_interleave(self.n_heads // self.n_kv_heads, dim=0)


class MLP(MLPPoints):
    """The points of one layer's MLP, and its weights (a mixture of experts has none of these)."""

    def __init__(self, parts: Parts, layer: nn.Module):
        super().__init__()
        object.__setattr__(self, "_of", (parts, layer))

    W_gate = property(
        lambda self: projection(_module(self._of, "mlp_gate")).T, doc="[d_model, d_mlp]"
    )
    W_in = property(lambda self: projection(_module(self._of, "mlp_up")).T, doc="[d_model, d_mlp]")
    W_out = property(
        lambda self: projection(_module(self._of, "mlp_down")).T, doc="[d_mlp, d_model]"
    )
    b_in = property(lambda self: _bias(_module(self._of, "mlp_up")), doc="[d_mlp]")
    b_out = property(lambda self: _bias(_module(self._of, "mlp_down")), doc="[d_model]")


class Block(BlockPoints):
    """The points of one decoder layer, and its weights."""

    hook_out_is_single_residual_stream = True  # TransformerLens's logit lens asks for it

    parts: Parts
    ln1: Norm
    ln2: Norm

    def __init__(self, parts: Parts, layer: nn.Module, deepstack: bool):
        super().__init__(parts.n_heads, parts.n_kv_heads, deepstack, parts.gated)
        self.parts = parts
        self.attn = Attention(parts, layer)
        self.mlp = MLP(parts, layer)
        self.ln1, self.ln2 = (
            Norm(_find(layer, path), parts.norm_weight_offset) for path in (parts.ln1, parts.ln2)
        )
        for name, path, body in (
            ("attn", parts.attn_out, parts.mixer),
            ("mlp", parts.mlp_out, parts.mlp),
        ):
            # a norm between a sublayer and the residual stream, where the family has one
            object.__setattr__(
                self, f"{name}_post_norm", _find(layer, path) if path != body else None
            )
        self.norm_weight_offset = parts.norm_weight_offset


def _find(layer: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else layer.get_submodule(path)


class Embed(nn.Module):
    """`model.embed(ids)`: the token embeddings, before pictures are merged in."""

    module: Any

    def __init__(self, module: Any):
        super().__init__()
        object.__setattr__(self, "module", module)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The table (before the factor by which some families multiply embeddings)."""
        return embedding(self.module)

    def forward(self, ids: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos d_model"]:
        """The embeddings of token ids, as the decoder gets them."""
        return self.module(ids)


class Unembed(nn.Module):
    """`model.unembed(x)`: the language-model head."""

    head: Any

    def __init__(self, head: Any):
        super().__init__()
        object.__setattr__(self, "head", head)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return projection(self.head).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Its bias; zeros where there is none."""
        return _bias(self.head)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of normed residual vectors."""
        return self.head(x)
