"""What CoreLens must know of a model family: where its modules are, and which token is which part
of which picture.

The defaults fit any decoder built like Llama inside a transformers vision-language model. A
family's own file (the only place that names families) overrides what differs there. See
`register_layout` for adding one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import image_defaults, offloaded
from corelens.layouts.refusals import no_decoder, no_layout
from corelens.tokens.cells import Cells

KINDS = ("vision", "audio")  # of towers, in a config's names
GRIDS = ("image_grid_thw", "video_grid_thw")


class Layout:
    """One model family. Paths are dotted module paths inside a decoder layer."""

    model_types: ClassVar[tuple[str, ...]] = ()  # values of config.model_type

    @classmethod
    def for_config(cls, config: Any) -> "Layout":
        """The layout of a model with this config; a family with variants chooses among them
        here."""
        return cls()

    attention = "self_attn"
    q_proj, k_proj, v_proj, o_proj = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    )
    # the norms before attention and before the MLP
    ln1, ln2 = "input_layernorm", "post_attention_layernorm"
    # the modules whose output is added to the residual stream
    attn_out, mlp_out = "self_attn", "mlp"
    mlp, mlp_gate, mlp_up, mlp_down = "mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    norm_weight_offset = 0.0  # 1.0 where a norm multiplies by 1 + weight
    # position id of a row's first real token; None: the model finds positions itself
    first_position: int | None = None

    # measures which seconds each audio token hears: (processor, samples of a sound) → [token, 2]
    hears: Callable[[Any, int], Float[Tensor, "token 2"]] | None = None

    # measures image_cells: (processor, options, size) → Cells, and which placeholders are patches
    probe: Any = None

    def fitted(self, hf: nn.Module) -> "Layout":
        """For a family without a layout of its own: this one, with what its first layer shows of
        its norms."""
        if type(self) is not Layout:
            return self
        if getattr(hf.config, "is_encoder_decoder", False):
            raise CorelensError(
                f"a model of class {type(hf).__name__}, an encoder-decoder: its decoder attends to "
                "another encoder's output, and its picture has no tokens in the row",
                "a model whose decoder reads picture and words in one row, or through "
                "cross-attention layers of its own",
                "use PyTorch's own hooks on it; a registered Layout serves its decoder's "
                "self-attention: cl.register_layout(MyLayout)",
            )
        layer = self.decoder(hf).layers[0]  # type: ignore[index]
        if hasattr(layer, "post_feedforward_layernorm"):  # norms after attention and MLP
            self.ln2 = "pre_feedforward_layernorm"
            self.attn_out, self.mlp_out = "post_attention_layernorm", "post_feedforward_layernorm"
        norm = getattr(layer, self.ln1, None)
        if norm is not None:
            self.norm_weight_offset = weight_offset(norm)
        return self

    # --- where things are

    def decoder(self, hf: nn.Module) -> Any:
        """The text decoder: it takes `inputs_embeds` with the visual features merged in, and has
        `.layers`."""
        inner = getattr(hf, "model", hf)
        find = getattr(inner, "get_decoder", None) or getattr(hf, "get_decoder", None)
        decoder = holder = find() if find else None
        # what is returned may hold the decoder and its head; where no encoder stands beside it, in
        # a `.decoder`
        paired = getattr(getattr(hf, "config", None), "is_encoder_decoder", False)
        while holder is not None and not hasattr(holder, "layers"):
            below = getattr(holder, "decoder", None) if not paired else None
            holder = getattr(holder, "model", None) or below
        if holder is None or self.final_norm(holder) is None:
            raise no_decoder(hf, find is not None, decoder, holder)
        return holder

    def final_norm(self, decoder: nn.Module) -> nn.Module | None:
        """The norm behind the last layer: `.norm`, or the last of the decoder's modules with a
        vector of weights."""
        if (norm := getattr(decoder, "norm", None)) is not None:
            return norm  # type: ignore[return-value]
        # a tower, not a decoder of text
        if not hasattr(getattr(decoder, "config", None), "vocab_size"):
            return None
        vectors = [
            m
            for m in decoder.children()
            if isinstance(w := getattr(m, "weight", None), Tensor) and w.ndim == 1
        ]
        return vectors[-1] if vectors else None

    def visual_features(self, hf: nn.Module) -> nn.Module | None:
        """The object whose `get_image_features` and `get_video_features` give the projector's
        output."""
        inner = getattr(hf, "model", None)
        return (
            hf
            if not hasattr(inner, "get_image_features") and hasattr(hf, "get_image_features")
            else inner
        )

    def deepstack(
        self, decoder: nn.Module, fire: Callable[[int, Tensor], Tensor], n_layers: int = 0
    ) -> AbstractContextManager[None]:
        """Within this context `fire(layer, added [batch, pos, d_model])` sees and edits what is
        added after a layer.

        It fires in every step, after each of the first `n_layers` layers: zeros where nothing is
        added.
        """
        return nullcontext()

    def deepstack_layers(self, hf: nn.Module) -> int:
        """After how many of the first decoder layers visual features are added again."""
        return 0

    # --- which token is what

    # the token_type_ids value of the answer's tokens, where the family's model needs that tensor
    answer_type_id = 0
    min_frames = 1  # the processor refuses shorter videos; the last frame is then repeated

    def plain_prompt(self, processor: Any, n_images: int, n_videos: int, text: str) -> str:
        """The prompt of a processor without a chat template: one placeholder a picture, then the
        text."""
        return (
            getattr(processor, "image_token", "") * n_images
            + getattr(processor, "video_token", "") * n_videos
            + text
        )

    def processed_prompt(self, processor: Any, prompt: str) -> str:
        """What the processor itself makes of a prompt before it puts the placeholders in; most
        leave it as it is."""
        return prompt

    def placeholders(self, config: Any) -> tuple[int, int]:
        """The token ids that stand for image and for video features (equal where a family uses one
        for both)."""
        image = _token(config, "image_token_id", "image_token_index")
        return image, _token(config, "video_token_id", "video_token_index")

    def audio_placeholder(self, config: Any) -> int:
        """The token id that stands for audio features; −1 where there is none."""
        return _token(config, "audio_token_id", "audio_token_index")

    def check_batch(self, pictures: Sequence[Sequence[Any]]) -> None:
        """Raise for samples that the family's processor would mix up in a batch: images or lists of
        frames a sample."""

    def patches_among(
        self, processor: Any, config: Any, tensors: Mapping[str, Any]
    ) -> dict[int, Bool[Tensor, " placeholder"]] | None:
        """Which placeholders of a batch of tensors are patches, of a family that has others
        (newlines) too.

        Per placeholder's token id a mask over all its tokens, row by row; None where all are
        patches. A family whose cells (`image_cells`, `video_cells`) are not all visual overrides
        this, so that "visual" means the same for tensors made by hand; of a family whose cells are
        measured, this is measured too.
        """
        grids = [name for name in GRIDS if tensors.get(name) is not None]
        if self.probe is None or (grids and self.grids_fit(processor, config, tensors)):
            return None
        return self.probe.patches(tensors)

    def grids_fit(self, processor: Any, config: Any, tensors: Mapping[str, Any]) -> bool:
        """Whether a batch has as many placeholders as its grids have tokens: no newlines beside
        them."""
        merged = sum(
            int(tensors[name].prod(1).sum()) for name in GRIDS if tensors.get(name) is not None
        )
        if tensors.get("input_ids") is None:
            return True
        places = torch.isin(tensors["input_ids"].cpu(), torch.tensor(self.placeholders(config)))
        return int(places.sum()) == merged // merge_of(processor, config) ** 2

    def sound_seconds(
        self, processor: Any, config: Any, n_samples: int
    ) -> Float[Tensor, "token 2"]:
        """Which seconds (start, end) each placeholder of a sound of `n_samples` samples hears."""
        if self.hears is not None:
            return self.hears(processor, n_samples)
        raise no_layout(config)

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """The cells of the batch's image number `index`, of original `size` (width, height).

        `features` is what the processor returned, and under "images_kwargs" the options it was
        called with.
        """
        # the processor says how many patches there are
        grids, probed = features.get("image_grid_thw"), self.probe is not None
        if grids is not None and not (probed and not self.grids_fit(processor, config, features)):
            return grid_cells(processor, config, grids[index].tolist(), size)
        if self.probe is not None:
            return self.probe(processor, features.get("images_kwargs") or {}, size)
        raise no_layout(config)

    def video_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
        n_frames: int,
    ) -> Cells:
        """The cells of the batch's video number `index`: `n_frames` frames of original `size`
        (width, height)."""
        if features.get("video_grid_thw") is None:
            raise no_layout(config)
        steps, rows, columns = features["video_grid_thw"][index].tolist()
        cells = grid_cells(processor, config, [1, rows, columns], size)
        paired = -(-n_frames // steps)  # frames that one temporal step joins
        frames = torch.arange(steps * paired).reshape(steps, paired)
        frames[frames >= n_frames] = -1
        return Cells(
            box=cells.box.repeat(steps, 1),
            visual=cells.visual.repeat(steps),
            frames=frames.repeat_interleave(len(cells.visual), dim=0),
            shrunk=cells.shrunk,
        )


def weight_offset(norm: nn.Module) -> float:
    """1.0 if a norm multiplies by 1 + weight, 0.0 if by its weight: measured on one vector."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type == "meta":
        weight = offloaded(norm, "weight")
    if not isinstance(weight, Tensor):
        return 0.0
    x = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        # what it multiplies by its weight, or by 1 + weight
        times = x / x.float().pow(2).mean().sqrt()
        off = [(norm(x) - times * (offset + weight)).abs().sum() for offset in (0.0, 1.0)]
    return float(off[1] < off[0])


def merge_of(processor: Any, config: Any) -> int:
    """How many patches make a token's side, of a picture that is cut into a grid of them."""
    images = getattr(processor, "image_processor", None)
    return getattr(images, "merge_size", None) or config.vision_config.spatial_merge_size


def grid_cells(processor: Any, config: Any, thw: list[int], size: tuple[int, int]) -> Cells:
    """Cells of a picture that is stretched onto a grid of patches, of which merge × merge make a
    token.

    Args:
        thw: temporal steps, rows and columns of patches, as the processor's `image_grid_thw` says.
    """
    images, merge = processor.image_processor, merge_of(processor, config)
    patch = getattr(images, "patch_size", None) or config.vision_config.patch_size
    patch = patch if isinstance(patch, int) else edge(patch, "height", "width")
    (rows, columns), (width, height) = (thw[1] // merge, thw[2] // merge), size
    unlimited = max(1, round(width / (patch * merge))) * max(1, round(height / (patch * merge)))
    shrunk = (columns * merge * patch, rows * merge * patch) if rows * columns < unlimited else None
    return patches(grid(columns, rows, 0, 0, width, height), shrunk=shrunk)


def image_option(processor: Any, features: dict[str, Any], name: str) -> Any:
    """An option of the image processor: the call's own, else the processor's, else its image
    processor's."""
    for source in (features.get("images_kwargs") or {}, *image_defaults(processor)):
        if source.get(name) is not None:
            return source[name]
    return getattr(processor.image_processor, name, None)


def edge(size: Any, *names: str) -> int:
    """The first of these entries that a processor's size has: `edge(size, "height",
    "shortest_edge")`."""
    for name in names:
        value = size.get(name) if isinstance(size, dict) else getattr(size, name, None)
        if value is not None:
            return int(value)
    raise CorelensError(
        f"a processor size {size!r}",
        f"one with {' or '.join(names)}",
        "set the size as checkpoints do",
    )


def grid(
    columns: int, rows: int, x0: float, y0: float, x1: float, y1: float
) -> Float[Tensor, "token 4"]:
    """The boxes of a `rows` × `columns` grid over a rectangle, row by row."""
    xs = torch.linspace(x0, x1, columns + 1, dtype=torch.float64)
    ys = torch.linspace(y0, y1, rows + 1, dtype=torch.float64)
    return cross(torch.stack([xs[:-1], xs[1:]], dim=1), torch.stack([ys[:-1], ys[1:]], dim=1))


def cross(
    columns: Float[Tensor, "column 2"], rows: Float[Tensor, "row 2"]
) -> Float[Tensor, "token 4"]:
    """The boxes of a grid with these column spans (x0, x1) and row spans (y0, y1), row by row."""
    x, y = columns.repeat(len(rows), 1), rows.repeat_interleave(len(columns), dim=0)
    return torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)


def patches(
    *boxes: Float[Tensor, "_ 4"],
    shrunk: tuple[int, int] | None = None,
    views: Sequence[int] | None = None,
) -> Cells:
    """Cells of which every token is a patch: these boxes, one view after the other.

    `views` are the numbers of the views where there are several, THUMBNAIL for the whole picture.
    """
    box = torch.cat(boxes)
    number = (
        None
        if views is None
        else torch.tensor(views).repeat_interleave(torch.tensor([len(b) for b in boxes]))
    )
    return Cells(
        box=box, visual=torch.ones(len(box), dtype=torch.bool), shrunk=shrunk, views=number
    )


def in_frames(box: Float[Tensor, "token 4"], n_frames: int) -> Cells:
    """Cells of a video that shows every frame by itself, one after the other, all cut alike."""
    frames = torch.arange(n_frames).repeat_interleave(len(box))[:, None]
    return Cells(box.repeat(n_frames, 1), torch.ones(len(frames), dtype=torch.bool), frames)


def shrunk_to(size: tuple[int, int], seen: tuple[float, float]) -> tuple[int, int] | None:
    """`seen` (width, height) if a picture of `size` has lost more than three quarters of its
    pixels, else None."""
    return (round(seen[0]), round(seen[1])) if 4 * seen[0] * seen[1] < size[0] * size[1] else None


def _token(config: Any, *names: str) -> int:
    """The first of these token ids that a config, or that of one of its towers, has; −1 without
    one."""
    for holder in (config, *(getattr(config, f"{kind}_config", None) for kind in KINDS)):
        for name in names:
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return -1
