"""The font of the drawn worlds."""

from functools import lru_cache

from PIL import ImageFont

from corelens.errors import CorelensError


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font (Aileron), `size` pixels high.

    Raises:
        CorelensError: where Pillow was built without FreeType and so cannot draw it.
    """
    loaded = ImageFont.load_default(size)
    if not isinstance(loaded, ImageFont.FreeTypeFont):
        raise CorelensError(
            "a Pillow without FreeType",
            "a Pillow that can draw its own font",
            "pip install --force-reinstall pillow",
        )
    return loaded
