"""The explorer: a page, or a live widget in Jupyter, on which you click a token and see where every
head looks."""

from corelens.explorer.explore import Explorer

__all__ = ["Explorer"]
