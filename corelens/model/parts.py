"""The parts of each decoder layer: where its attention, norms and MLP are, and how many heads it
has."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from corelens.errors import CorelensError
from corelens.layouts import Layout


@dataclass(frozen=True)
class Parts:
    """Dotted module paths below one decoder layer (None: it has no such module), and its heads.

    Args:
        mixer: what mixes tokens: the attention module, or a linear-attention, convolution or
            recurrent one.
        attention: the module that attends by heads; None in a layer whose mixer has none.
        q_proj, k_proj, v_proj, o_proj: its projections.
        ln1, ln2: the norms before the mixer and before the MLP.
        attn_out, mlp_out: the modules whose output is added to the residual stream.
        mlp, mlp_gate, mlp_up, mlp_down: the MLP and its projections.
        norm_weight_offset: 1.0 where a norm multiplies by 1 + weight.
        n_heads, n_kv_heads: query heads and KV heads; 0 without attention.
        d_head: the width of a head's queries and keys; 0 without attention.
        d_mlp: the MLP's inner width; None where it has none, or several.
        gated: q_proj gives each head's query, then a gate of its z, side by side.
        cross: the attention's keys are the tower's tokens, not those of the row.
        attn_scale, mlp_scale: what their outputs are multiplied by before they are added.
        extra: the module whose output is added last, after the MLP's; None in most families.
        stream_scale: what the residual stream is multiplied by at the end of the layer.
        unsummed: why the residual stream of this layer is not the sum of its parts; "" where it is.
    """

    mixer: str | None
    attention: str | None
    q_proj: str | None
    k_proj: str | None
    v_proj: str | None
    o_proj: str | None
    ln1: str | None
    ln2: str | None
    attn_out: str | None
    mlp_out: str | None
    mlp: str | None
    mlp_gate: str | None
    mlp_up: str | None
    mlp_down: str | None
    norm_weight_offset: float = 0.0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int | None = None
    gated: bool = False
    cross: bool = False
    attn_scale: float = 1.0
    mlp_scale: float = 1.0
    extra: str | None = None
    stream_scale: float = 1.0
    unsummed: str = ""

    @classmethod
    def of(cls, layout: Layout, layer: nn.Module, text: Any) -> "Parts":
        """As a layout and a text config say, without what this layer has not."""
        names = ("attention", "q_proj", "k_proj", "v_proj", "o_proj", "ln1", "ln2", "attn_out",
                 "mlp_out", "mlp", "mlp_gate", "mlp_up", "mlp_down")  # fmt: skip
        paths: dict[str, Any] = {
            n: path if has(layer, path := getattr(layout, n)) else None for n in names
        }
        try:
            n_heads = text.num_attention_heads
        except RuntimeError:  # of a config whose layers differ: they are measured
            n_heads = 0
        except AttributeError:
            raise CorelensError(
                f"a decoder with a {type(text).__name__}, which says no num_attention_heads",
                "a text decoder that attends by heads",
                "write a Layout for it and register it: cl.register_layout(MyLayout)",
            ) from None
        d_head = _entry(text, "head_dim") or (text.hidden_size // n_heads if n_heads else 0)
        return cls(
            mixer=paths["attention"], **paths, norm_weight_offset=layout.norm_weight_offset,
            n_heads=n_heads,
            n_kv_heads=_entry(text, "num_key_value_heads") or n_heads,
            d_head=d_head, d_mlp=_entry(text, "intermediate_size"),
        )  # fmt: skip


def _entry(config: Any, name: str) -> Any:
    """An entry of a config; None where it has none, or one a layer."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # of a config whose layers differ
        return None
    return value if isinstance(value, int) else None


def has(layer: nn.Module, path: str | None) -> bool:
    """Whether a layer has a module at this path."""
    if path is None:
        return False
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
