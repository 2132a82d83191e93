"""Which keys a sparse head sees. A pattern only takes away: what the model itself hides stays
hidden.

A pattern's `sees` gives a function of (sample, head, query position, key position), index tensors
that broadcast, to bool: the form of FlexAttention's `mask_mod`, so that a user's own function of
that form is a pattern too. Positions are those of the padded row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.rows import Call
from corelens.sparse.prompt import Prompt
from corelens.sparse.visible import MaskMod


def at_least(name: str, value: Any, least: int, do: str) -> None:
    """Refuse anything but a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CorelensError(f"{name}={value!r}", f"a whole number from {least} on", do)


@dataclass(frozen=True)
class Streaming:
    """Attention sinks and a window: StreamingLLM (arXiv 2309.17453), as a prefill pattern by head:
    DuoAttention (arXiv 2410.10819).

    Row i sees key j ≤ i if j is among the first `sink` real (not padding) keys, or i − window < j,
    or i is among the last `last` real rows of the prompt. Where a model lets a row look ahead (a
    bidirectional prefix), it sees the sinks there and the keys j < i + window.

    Args:
        sink: how many first keys every row sees.
        window: how many last keys a row sees, itself among them.
        last: how many last rows of the prompt see everything. If they cover the question, every
            head can fetch what the question asks for, and the choice of full heads says little.
    """

    sink: int = 128
    window: int = 1024
    last: int = 0

    @classmethod
    def of(cls, scores: Any) -> "Streaming":
        """The sink and window that scores were made for: those of DuoAttention's config.json.

        Raises:
            CorelensError: scores that do not say it.
        """
        sizes = scores.meta.get("streaming")
        if sizes is None:
            raise CorelensError(
                "scores that say nothing of a sink and window",
                "HeadScores.from_duo_attention of a folder with its config.json",
                "give them: cl.Streaming(sink=128, window=1024)",
            )
        return cls(sizes["sink"], sizes["window"])

    def __post_init__(self) -> None:
        at_least("sink", self.sink, 0, "0 leaves the first tokens to the window")
        at_least(
            "window",
            self.window,
            1,
            "a row sees itself at the least: window=1; to leave heads out use cl.Pruned",
        )
        at_least("last", self.last, 0, "0 gives no row of the prompt full attention")

    def sees(self, prompt: Prompt, query: Tensor, key: Tensor, call: Call) -> MaskMod:
        """See the top of this file."""

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k - prompt.first[b] < self.sink) | ((q - k).abs() < self.window)
            if self.last:
                seen = seen | ((q >= prompt.end[b] - self.last) & (q < prompt.end[b]))
            return seen

        return mask_mod


@dataclass(frozen=True)
class Pruned:
    """The head is left out: neither computed nor cached. Its z is a constant.

    Args:
        mean_z: what `cl.mean_z(model, samples)` returned: the head's mean; None: zero.
    """

    mean_z: Mapping[int, Tensor] | None = None

    def constant(self, layer: int) -> Tensor | None:
        """z of every head of this layer, [head, d_head]; None is zero."""
        if self.mean_z is None:
            return None
        try:
            mean = self.mean_z[layer]
        except (KeyError, TypeError, IndexError):
            mean = None
        if not isinstance(mean, Tensor) or mean.ndim != 3 or len(mean) != 1:
            raise CorelensError(
                f"no mean z of layer {layer} in Pruned(mean_z)",
                "one mean for all tokens, [1, head, d_head] a layer: what cl.mean_z(model, "
                "samples) returns",
                "make it with the model that is run, without by_role",
            )
        return mean[0]
