"""Model families: the only place that knows them. `register_layout` adds one, `layout_for` finds
one by its config."""

from typing import Any

from corelens.errors import CorelensError
from corelens.layouts.base import (
    Layout,
    cross,
    edge,
    grid,
    image_option,
    in_frames,
    patches,
    shrunk_to,
)
from corelens.layouts.gemma import Gemma3, PaliGemma
from corelens.layouts.idefics import Idefics3, SmolVLM
from corelens.layouts.internvl import InternVL
from corelens.layouts.llava import Llava, LlavaNext, LlavaOnevision
from corelens.layouts.qwen import Qwen2VL, Qwen3VL
from corelens.tokens.cells import Cells

_LAYOUTS: dict[str, type[Layout]] = {}


def register_layout(layout: type[Layout]) -> type[Layout]:
    """Make a Layout class known for its `model_types`; a later one replaces an earlier one. Usable
    as a decorator."""
    if not layout.model_types:
        raise CorelensError(
            f"{layout.__name__} without model_types",
            "a class attribute model_types = ('…',) with values of config.model_type",
            "name the model types that the layout describes",
        )
    for model_type in layout.model_types:
        _LAYOUTS[model_type] = layout
    return layout


def layout_for(config: Any) -> Layout:
    """The layout of a model's config; for an unknown family one whose hooks work and whose geometry
    raises."""
    if isinstance(config, str):
        raise CorelensError(
            f"the text {config!r} to wrap", "a transformers model",
            f"for a name or a folder: HookedMLLM.from_pretrained({config!r})",
        )  # fmt: skip
    return _LAYOUTS.get(getattr(config, "model_type", None) or "", Layout).for_config(config)


for _layout in (
    Qwen2VL,
    Qwen3VL,
    Llava,
    LlavaNext,
    LlavaOnevision,
    InternVL,
    Gemma3,
    PaliGemma,
    Idefics3,
    SmolVLM,
):
    register_layout(_layout)

__all__ = [
    "Cells", "Layout", "cross", "edge", "grid", "image_option", "in_frames", "layout_for",
    "patches",
    "register_layout", "shrunk_to",
]  # fmt: skip
