"""Data: one loader a file, each yielding Samples; `synthetic` draws its own."""

from corelens.data.folder import load_samples, save_samples
from corelens.data.public import load_data
from corelens.data.synthetic import worlds
from corelens.data.synthetic.shifts import SHIFTS, shifted

__all__ = ["SHIFTS", "load_data", "load_samples", "save_samples", "shifted", "worlds"]
