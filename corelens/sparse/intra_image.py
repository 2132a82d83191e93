"""IntraImage: a head sees its own picture or frame, the first tokens and a window, as BlindSight's
visual heads do (arXiv 2507.09071): a prefill pattern by head."""

from dataclasses import dataclass

from torch import Tensor

from corelens.errors import CorelensError
from corelens.hooks.rows import Call
from corelens.sparse.patterns import at_least
from corelens.sparse.prompt import Prompt
from corelens.sparse.visible import MaskMod


@dataclass  # (not hashable: what it hides depends on the prompt, and no engine may keep its mask)
class IntraImage:
    """Row i sees key j ≤ i if both are visual tokens of one image (or of one group of frames that
    share tokens), or j is among the first `sink` real keys, or i − window < j.

    A text row sees no picture but through sink and window: such a head reads within pictures. It
    needs inputs with token maps (`model.prepare`), which say which token is of which picture.

    Args:
        sink: how many first keys every row sees.
        window: how many last keys a row sees, itself among them.
    """

    sink: int = 4
    window: int = 64

    def __post_init__(self) -> None:
        at_least("sink", self.sink, 0, "0 leaves the first tokens to the window")
        at_least("window", self.window, 1, "a row sees itself at the least: window=1")

    def sees(self, prompt: Prompt, query: Tensor, key: Tensor, call: Call) -> MaskMod:
        """See `corelens.sparse.patterns`."""
        pictures = prompt.pictures
        if pictures is None:
            raise CorelensError(
                "IntraImage in a run on bare tensors",
                "inputs that know which token is of which picture",
                "run on model.prepare(sample)",
            )
        last = pictures.shape[1] - 1

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # (rows past the prompt, where a plan's pattern is asked for them, are text)
            own, other = pictures[b, q.clamp(max=last)], pictures[b, k.clamp(max=last)]
            same = (own == other) & (own >= 0) & (q <= last) & (k <= last)
            return same | (k - prompt.first[b] < self.sink) | ((q - k).abs() < self.window)

        return mask_mod
