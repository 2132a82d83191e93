"""The Qwen-VL families: native resolution, 2 × 2 patches a token, frames in pairs; Qwen3-VL adds
DeepStack."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from corelens.hf import deepstack_addition
from corelens.layouts.base import Layout, grid, patches
from corelens.tokens.cells import Cells


class Qwen2VL(Layout):
    """Qwen2-VL and Qwen2.5-VL (windowed attention in the tower changes the order of computation,
    not of tokens)."""

    model_types = ("qwen2_vl", "qwen2_5_vl")

    def image_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
    ) -> Cells:
        """The picture is stretched onto whole tokens, so cells divide it evenly."""
        return self._cells(config, features["image_grid_thw"][index].tolist(), size)

    def video_cells(
        self,
        processor: Any,
        config: Any,
        features: dict[str, Any],
        index: int,
        size: tuple[int, int],
        n_frames: int,
    ) -> Cells:
        """One grid a temporal step, step after step; a step holds two frames, an odd last one is
        repeated."""
        steps, rows, columns = features["video_grid_thw"][index].tolist()
        cells = self._cells(config, [1, rows, columns], size)
        paired = config.vision_config.temporal_patch_size
        frames = torch.arange(steps * paired).reshape(steps, paired)
        frames[frames >= n_frames] = -1
        return Cells(
            box=cells.box.repeat(steps, 1),
            visual=cells.visual.repeat(steps),
            frames=frames.repeat_interleave(len(cells.visual), dim=0),
            shrunk=cells.shrunk,
        )

    def _cells(self, config: Any, thw: list[int], size: tuple[int, int]) -> Cells:
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        (rows, columns), (width, height) = (thw[1] // merge, thw[2] // merge), size
        unlimited = max(1, round(width / (patch * merge))) * max(1, round(height / (patch * merge)))
        shrunk = (
            (columns * merge * patch, rows * merge * patch) if rows * columns < unlimited else None
        )
        return patches(grid(columns, rows, 0, 0, width, height), shrunk=shrunk)


class Qwen3VL(Qwen2VL):
    """Qwen3-VL, dense and mixture of experts: features of middle tower layers are added after the
    first layers."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    min_frames = 2

    @contextmanager
    def deepstack(
        self, decoder: nn.Module, fire: Callable[[int, Tensor], Tensor], n_layers: int = 0
    ) -> Iterator[None]:
        """Call `fire(layer, added)` for each addition; what it returns, at any position, is what is
        added.

        In a step without a picture (a decode step, a prompt of text) zeros are added.
        """
        calls, pictures = 0, False

        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal calls, pictures
            calls, pictures = 0, kwargs.get("deepstack_visual_embeds") is not None

        def after(layer: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                if pictures:
                    return None
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden + fire(layer, torch.zeros_like(hidden))
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        def process(
            hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor
        ) -> Tensor:
            nonlocal calls
            layer, calls = calls, calls + 1
            added = torch.zeros_like(hidden_states)
            added[visual_pos_masks.to(added.device)] = visual_embeds.to(added.device, added.dtype)
            return hidden_states + fire(
                layer, added
            )  # x + 0 is x: bit for bit the model's own sum where nothing is edited

        handles = [decoder.register_forward_pre_hook(begin, with_kwargs=True)]
        for layer, module in enumerate(list(decoder.layers)[:n_layers]):  # type: ignore[arg-type]
            handles.append(module.register_forward_hook(after(layer)))
        try:
            with deepstack_addition(decoder, process):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def deepstack_layers(self, hf: nn.Module) -> int:
        """As many decoder layers as tower layers whose features are taken."""
        config: Any = hf.config
        return len(config.vision_config.deepstack_visual_indexes)
