"""Data: one loader a file, each yielding Samples; `synthetic` draws its own."""

from corelens.data.synthetic import synthetic, worlds

__all__ = ["synthetic", "worlds"]
