"""Dense and sparse generations timed in turns, on the same prompts, on any device.

One generation gives every phase. The clock is read (on a GPU after synchronising) where the decoder
begins and where the language-model head does, and around each call of attention: there by events
that wait for nothing.
"""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from corelens.hf import cache_of, cached_tensors, every_attention
from corelens.hooks.points import Hook
from corelens.inputs.prepare import Inputs, Sample
from corelens.model.hooked import HookedMLLM

# bytes; below that a process keeps what it frees, and its peak says nothing
MIN_RESIDENT = 64 * 2**20


@dataclass
class Timed:
    """The runs of one side: phase → seconds of each run, and what memory they took."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None
    kv_bytes: int | None = None


def time_in_turns(
    model: HookedMLLM,
    samples: Sequence[Sample],
    sparse: Any,
    hooks: Sequence[Hook] = (),
    rounds: int = 5,
    new_tokens: int = 8,
    progress: bool = False,
) -> tuple[Timed, Timed, list[Inputs]]:
    """(dense, sparse, the prompts): each sample by itself, `rounds` times under both, who begins
    taking turns.

    Every sample is run once under both before anything is timed (masks built, kernels chosen and
    compiled).

    Args:
        new_tokens: how many tokens every run writes (2 or more), whatever they are.
    """
    sides = Timed(), Timed()
    prompts = [model.prepare(sample) for sample in samples]
    plans = (None, sparse)
    bar = tqdm(total=2 * len(prompts) * (rounds + 1), disable=not progress, desc="timing")
    with torch.no_grad(), bar:
        for turn in range(-1, rounds):
            for number, prompt in enumerate(prompts):
                order = (0, 1) if (turn + number) % 2 else (1, 0)
                for which in order:
                    by_phase, cache = _run(model, prompt, plans[which], hooks, new_tokens)
                    bar.update()
                    if turn < 0:
                        sides[which].kv_bytes = kv_bytes(cache)
                        continue
                    for phase, seconds in by_phase.items():
                        sides[which].seconds.setdefault(phase, []).append(seconds)
                    del cache
        for side, plan in zip(sides, plans, strict=True):
            side.peak_bytes = _peak(model, prompts[-1], plan, hooks, new_tokens)
    # attention that no interface is called for
    for phase in set(sides[0].seconds) ^ set(sides[1].seconds):
        for side in sides:
            side.seconds.pop(phase, None)
    return *sides, prompts


def _run(
    model: HookedMLLM, prompt: Inputs, sparse: Any, hooks: Sequence[Hook], new_tokens: int
) -> tuple[dict[str, float], Any]:
    """Seconds of each phase of one generation, and the cache it left."""
    clock = _Clock(model)
    with _under(model, sparse, hooks), clock.watching():
        start = clock.now()
        model.encode(prompt)
        vision = clock.now() - start
        start = clock.now()
        _generate(model, prompt, new_tokens)
        end = clock.now()
    by_phase = {
        "vision": vision,
        "prefill": clock.lm_head_starts[0] - clock.decoder_starts[0],
        "end_to_end": end - start,
    }
    by_phase["decode"] = (end - clock.decoder_starts[1]) / (len(clock.decoder_starts) - 1)
    attention = clock.attention_seconds()
    if attention is not None:
        by_phase["attention"] = attention
    return by_phase, clock.cache


@contextmanager
def _under(model: HookedMLLM, sparse: Any, hooks: Sequence[Hook]) -> Iterator[None]:
    with (
        model.sparse(sparse) if sparse is not None else nullcontext(),
        model.hooks(fwd_hooks=list(hooks)) if hooks else nullcontext(),
    ):
        yield


def _generate(model: HookedMLLM, prompt: Inputs, new_tokens: int) -> None:
    model.generate(prompt, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


class _Clock:
    """Reads the time where the decoder and the head begin, and sums the prefill's attention."""

    def __init__(self, model: HookedMLLM):
        self.decoder = model.layout.decoder(model.hf)
        self.head = model.hf.get_output_embeddings()
        attends = [
            (layer, block.parts.attention)
            for layer, block in zip(self.decoder.layers, model.blocks, strict=True)
        ]
        self.attention_of = {
            layer.get_submodule(path) for layer, path in attends if path is not None
        }
        self.devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        self.decoder_starts: list[float] = []
        self.lm_head_starts: list[float] = []
        self.calls: list[tuple[Any, Any]] = []
        self.cache: Any = None

    def now(self) -> float:
        """Seconds, all work given to the GPUs so far being done."""
        for device in self.devices:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context runs of the model leave their times here."""
        with ExitStack() as stack:
            for module, marks in (
                (self.decoder, self.decoder_starts),
                (self.head, self.lm_head_starts),
            ):
                handle = module.register_forward_pre_hook(
                    lambda *_, marks=marks: marks.append(self.now())
                )
                stack.callback(handle.remove)
            stack.callback(self.decoder.register_forward_hook(self._ended).remove)
            stack.enter_context(every_attention(self._around))
            yield

    def _ended(self, module: Any, args: Any, output: Any) -> None:
        self.cache = cache_of(output)

    def _around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(module: Any, *args: Any, **kwargs: Any) -> Any:
            if module not in self.attention_of or self.lm_head_starts:
                return function(module, *args, **kwargs)
            start = self._mark(args[0])
            out = function(module, *args, **kwargs)
            self.calls.append((start, self._mark(args[0])))
            return out

        return timed

    def _mark(self, like: torch.Tensor) -> Any:
        if like.device.type != "cuda":
            return time.perf_counter()
        with torch.cuda.device(like.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def attention_seconds(self) -> float | None:
        """The prefill's attention; None for a model whose attention calls no function of the
        interface ("eager")."""
        if not self.calls:
            return None
        return sum(
            b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in self.calls
        )


# --- memory


def kv_bytes(cache: Any) -> int | None:
    """What the keys and values of a cache take; None for a cache that does not show them."""
    own_count = getattr(cache, "nbytes", None)
    if own_count is not None:
        return int(own_count() if callable(own_count) else own_count)
    tensors = cached_tensors(cache)
    return sum(x.nbytes for x in tensors) if tensors else None


def _peak(
    model: HookedMLLM, prompt: Inputs, sparse: Any, hooks: Sequence[Hook], new_tokens: int
) -> int | None:
    """The peak of memory during a generation, over what was held before; None where it cannot be
    told."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    gc.collect()
    with _under(model, sparse, hooks):
        if devices:
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
            before = sum(torch.cuda.memory_allocated(device) for device in devices)
            _generate(model, prompt, new_tokens)
            return sum(torch.cuda.max_memory_allocated(device) for device in devices) - before
        try:
            ctypes.CDLL(None).malloc_trim(0)
            # Linux: forget the peak of resident memory so far
            Path("/proc/self/clear_refs").write_text("5")
            held = _resident("VmRSS")
            _generate(model, prompt, new_tokens)
            peak = _resident("VmHWM") - held
        except (OSError, AttributeError):
            return None
    return peak if peak >= MIN_RESIDENT else None


def _resident(name: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def evenly_spaced(samples: Sequence[Sample], n: int) -> list[Sample]:
    """`n` of the samples, evenly spaced."""
    return [
        samples[i]
        for i in np.unique(
            np.linspace(0, len(samples) - 1, min(n, len(samples))).round().astype(int)
        )
    ]
