"""The samples of a runner that goes through all of them more than once."""

from collections.abc import Sequence
from typing import Any

from corelens.data import load_data
from corelens.errors import CorelensError
from corelens.inputs.prepare import Inputs
from corelens.inputs.sample import Sample, as_sample


def listed(samples: Any, runner: str, reason: str) -> list[Any]:
    """The samples of a runner that needs all of them at once, as a list. One alone stands for a
    list of one, a string for what `cl.data.load_data` gives.

    Args:
        runner: its name.
        reason: why it needs all of them.

    Raises:
        CorelensError: a stream: a generator, a streaming data set, any iterable that is no
            sequence.
    """
    if isinstance(samples, str):
        return list(load_data(samples))
    if isinstance(samples, Sample | Inputs):
        return [samples]
    if not isinstance(samples, Sequence):
        raise CorelensError(
            f"{runner} over a stream (a {type(samples).__name__})",
            f"a list of samples: {reason}",
            "list(stream), or its first ones; cl.score_heads takes a stream of any length",
        )
    return [value if isinstance(value, Inputs) else as_sample(value) for value in samples]
