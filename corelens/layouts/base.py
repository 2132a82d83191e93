"""What CoreLens must know of a model family: where its modules are, and which token is which part of which picture.

The defaults fit any decoder built like Llama inside a transformers vision-language model. A family's own file (the
only place that names families) overrides what differs there. See `register_layout` for adding one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.tokens import Cells


class Layout:
    """One model family. Paths are dotted module paths inside a decoder layer (or a vision layer, for `vision_*`)."""

    model_types: ClassVar[tuple[str, ...]] = ()  # values of config.model_type

    attention = "self_attn"
    q_proj, k_proj, v_proj, o_proj = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
    ln1, ln2 = "input_layernorm", "post_attention_layernorm"  # the norms before attention and before the MLP
    attn_out, mlp_out = "self_attn", "mlp"  # the modules whose output is added to the residual stream
    mlp, mlp_gate, mlp_up, mlp_down = "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    norm_weight_offset = 0.0  # 1.0 where a norm multiplies by 1 + weight

    vision_attention = "self_attn"
    vision_q, vision_k, vision_v = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
    vision_qkv: str | None = None  # one fused projection instead of three
    vision_out = "self_attn.out_proj"

    # --- where things are -------------------------------------------------------------------------------------------

    def decoder(self, hf: nn.Module) -> nn.Module:
        """The text decoder: it takes `inputs_embeds` with the visual features merged in, and has `.layers`, `.norm`."""
        inner = getattr(hf, "model", hf)
        find = getattr(inner, "get_decoder", None) or getattr(hf, "get_decoder", None)
        decoder = find() if find else None
        if decoder is None or not hasattr(decoder, "layers"):
            raise CorelensError(
                f"a model of class {type(hf).__name__}, in which no decoder with `.layers` was found",
                "a transformers vision-language model whose get_decoder() returns its text decoder",
                "write a Layout for it with `decoder(hf)` overridden and register it: cl.register_layout(MyLayout)",
            )
        return decoder

    def vision_layers(self, hf: nn.Module) -> Sequence[nn.Module]:
        """The layers of the vision tower, in order; empty if none are found."""
        return ()

    def visual_features(self, hf: nn.Module) -> nn.Module | None:
        """The object whose `get_image_features` and `get_video_features` give the projector's output."""
        return getattr(hf, "model", None)

    def deepstack(self, decoder: nn.Module, fire: Callable[[int, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Within this context `fire(layer, added [batch, pos, d_model])` sees and edits what is added after a layer."""
        return nullcontext()

    def deepstack_layers(self, hf: nn.Module) -> int:
        """After how many of the first decoder layers visual features are added again."""
        return 0

    # --- which token is what ----------------------------------------------------------------------------------------

    answer_type_id = 0  # the token_type_ids value of the answer's tokens, where the family's model needs that tensor
    min_frames = 1  # the processor refuses shorter videos; the last frame is then repeated

    def plain_prompt(self, processor: Any, n_images: int, n_videos: int, text: str) -> str:
        """The prompt of a processor without a chat template: one placeholder a picture, then the text."""
        return (
            getattr(processor, "image_token", "") * n_images + getattr(processor, "video_token", "") * n_videos + text
        )

    def processed_prompt(self, processor: Any, prompt: str) -> str:
        """What the processor itself makes of a prompt before it puts the placeholders in; most leave it as it is."""
        return prompt

    def placeholders(self, config: Any) -> tuple[int, int]:
        """The token ids that stand for image and for video features (equal where a family uses one for both)."""
        image = getattr(config, "image_token_id", None)
        video = getattr(config, "video_token_id", None)
        return (image if image is not None else -1), (video if video is not None else -1)

    def image_cells(
        self, processor: Any, config: Any, features: dict[str, Any], index: int, size: tuple[int, int]
    ) -> Cells:
        """The cells of the batch's image number `index`, of original `size` (width, height).

        `features` is what the processor returned, and under "images_kwargs" the options it was called with.
        """
        raise _no_layout(config)

    def video_cells(
        self, processor: Any, config: Any, features: dict[str, Any], index: int, size: tuple[int, int], n_frames: int
    ) -> Cells:
        """The cells of the batch's video number `index`: `n_frames` frames of original `size` (width, height)."""
        raise _no_layout(config)


def image_option(processor: Any, features: dict[str, Any], name: str) -> Any:
    """An option of the image processor as the call had it: the call's own, else the processor's, else its image half's."""
    defaults = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("images_kwargs", {})
    for source in (features.get("images_kwargs") or {}, getattr(processor, "images_kwargs", None) or {}, defaults):
        if source.get(name) is not None:
            return source[name]
    return getattr(processor.image_processor, name, None)


def grid(columns: int, rows: int, x0: float, y0: float, x1: float, y1: float) -> Float[Tensor, "token 4"]:
    """The boxes of a `rows` × `columns` grid over a rectangle, row by row."""
    xs = torch.linspace(x0, x1, columns + 1, dtype=torch.float64)
    ys = torch.linspace(y0, y1, rows + 1, dtype=torch.float64)
    left, top = xs[:-1].repeat(rows), ys[:-1].repeat_interleave(columns)
    right, bottom = xs[1:].repeat(rows), ys[1:].repeat_interleave(columns)
    return torch.stack([left, top, right, bottom], dim=1)


def _no_layout(config: Any) -> CorelensError:
    return CorelensError(
        f"a model of type {getattr(config, 'model_type', '?')!r}, for which no layout is registered",
        "a family whose token geometry CoreLens knows, when regions, images or cells are asked for",
        "hooks work without it; for regions write a Layout with image_cells() and call cl.register_layout(MyLayout)",
    )
