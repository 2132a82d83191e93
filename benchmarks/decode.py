"""What a KV budget saves at decoding: the time of a token and the memory of keys and values, dense
against evicted.

    python benchmarks/decode.py  # 8k to 32k tokens; some minutes on one core
    python benchmarks/decode.py --device cuda --layers 36 --tokens 8192 32768 131072 --batch 1 4 16
    python benchmarks/decode.py --tokens 1024 --batch 2 --repeats 3 --out look.json

Decoder layers of a real model's shape with random weights (a vocabulary of 512: no language-model
head to speak of), and a cache filled with random keys and values, as a prompt of that length leaves
it. One forward is one token of every sample of the batch. Sides, taken in turns after warming up:

    dense     transformers' own cache and SDPA: what generate does (the cache is copied to take a
              token)
    whole     corelens' cache, nothing evicted: the same keys and values, read where they lie
    budget    the same cache under KVBudget(scores, budget), capacities of all sizes (scores are
              random numbers to the eighth power), keys chosen by SnapKV's rule
    short     a cache of 64 tokens: what a token costs without reading keys and values

The speed-up is against the faster of dense and whole. Two limits: by bytes, (weights + keys and
values) of dense over those of budget; by time, if what dense takes above short shrank as the bytes
of keys and values do. `kv_share` is the share of the dense token's time that keys and values take,
1 − short / dense; below a half a token is mostly weights. On CUDA everything is measured eagerly
and again with MLPs, norms and projections compiled, and then beside transformers' static cache with
the whole forward compiled.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen3ForCausalLM, StaticCache

import corelens as cl
from corelens.hooks.rows import Call
from corelens.inputs.prepare import Inputs
from corelens.sparse.prompt import Prompt

RESULTS = Path(__file__).parent / "results"
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
SHAPES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "qwen3vl-4b": (Qwen3ForCausalLM, (2560, 9728, 32, 8, 128)),
    "qwen3vl-8b": (Qwen3ForCausalLM, (4096, 12288, 32, 8, 128)),  # InternVL3.5-8B's too
    "qwen3vl-32b": (Qwen3ForCausalLM, (5120, 25600, 64, 8, 128)),
    "llava-onevision-7b": (Qwen2ForCausalLM, (3584, 18944, 28, 4, 128)),
}
SHORT = 64


def make(shape: str, layers: int, device: str, dtype: torch.dtype) -> cl.HookedMLLM:
    """Decoder layers of this shape, random."""
    build, widths = SHAPES[shape]
    options = dict(zip(WIDTHS, widths, strict=True))
    config = build.config_class(
        **options, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=1 << 18
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            hf = build(config).eval()
        finally:
            torch.set_default_dtype(before)
    return cl.HookedMLLM(hf)


class Side:
    """One way to decode: a cache of random keys and values of `tokens` tokens, and steps on it.

    Args:
        sparse: what evicts them; None: all stay in `cache`.
    """

    def __init__(
        self, model: cl.HookedMLLM, batch: int, tokens: int, sparse: Any = None, cache: Any = None
    ):
        self.model, self.sparse, self.cache = model, sparse, cache
        self.forward = model.hf.forward
        cfg = model.cfg
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=cfg.device)
        if sparse is not None:
            self.plan = sparse.plan(cfg)
            self.cache = self.plan.new_cache()
            first = self.ids[:, 0]
            self.plan.prompt = Prompt(first, first + tokens, tokens)
        random = {
            "generator": torch.Generator(cfg.device).manual_seed(1),
            "device": cfg.device,
            "dtype": cfg.dtype,
        }
        self.evict_seconds: list[float] = []
        for number, block in enumerate(model.layout.decoder(model.hf).layers):  # type: ignore[arg-type]
            key, value = (
                torch.randn(batch, cfg.n_kv_heads, tokens, cfg.d_head, **random) for _ in range(2)
            )
            self.cache.update(key, value, number)
            if sparse is not None:
                # the last rows alone, without causality among them: it moves no bytes
                query = torch.randn(
                    batch, cfg.n_heads, sparse.kv_budget.window, cfg.d_head, **random
                )
                module = block.get_submodule(model.layout.attention)
                began = clock(cfg.device), time.process_time()
                self.cache.evict(
                    number, query, Call(module, None, cfg.d_head**-0.5, False, None, None, None)
                )
                taken = clock(cfg.device) - began[0], time.process_time() - began[1]
                self.evict_seconds.append(taken[0 if cfg.device.type == "cuda" else 1])

    def step(self) -> tuple[float, float]:
        """One token of every sample: seconds on the clock, and of this process."""
        with ExitStack() as stack:
            if self.sparse is not None:
                stack.enter_context(self.model.sparse(self.sparse))
                run = stack.enter_context(
                    self.model._hooked(Inputs({"input_ids": self.ids}, [], []))
                )
                run.sparse_plan = self.plan  # the one that has the cache
            began, used = clock(self.model.device), time.process_time()
            self.forward(input_ids=self.ids, past_key_values=self.cache, use_cache=True)
            return clock(self.model.device) - began, time.process_time() - used

    @property
    def nbytes(self) -> int:
        """Of the keys and values that it holds."""
        nbytes = getattr(self.cache, "nbytes", None)
        return (
            sum(x.keys.nbytes + x.values.nbytes for x in self.cache.layers)
            if nbytes is None
            else nbytes
        )


def clock(device: Any) -> float:
    """Seconds; everything that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(sides: dict[str, Side], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a token, sides in turns, after three rounds of warming up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(-3, repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            seconds = sides[name].step()
            if turn >= 0:
                taken[name].append(seconds)
    times = {}
    for name, seconds in taken.items():
        quartiles = np.quantile(seconds, [0.25, 0.5, 0.75], axis=0).T * 1e3
        times[name] = {
            kind: {"low": round(low, 3), "median": round(middle, 3), "high": round(high, 3)}
            for kind, (low, middle, high) in zip(
                ("clock_ms", "processor_ms"), quartiles.tolist(), strict=True
            )
        }
    return times


@torch.inference_mode()
def cell(
    model: cl.HookedMLLM, tokens: int, batch: int, budget: int, repeats: int, compiled: bool
) -> dict[str, Any]:
    """One prompt length and batch size."""
    cfg, config = model.cfg, model.hf.config
    scores = cl.HeadScores(np.random.default_rng(0).random((cfg.n_layers, cfg.n_heads)) ** 8)
    everything, partial = (cl.KVBudget(budget=tokens), cl.KVBudget(scores, budget=budget))
    sides = {
        "dense": Side(model, batch, tokens, cache=DynamicCache(config=config)),
        "whole": Side(model, batch, tokens, cl.SparseInference(kv_budget=everything)),
        "budget": Side(model, batch, tokens, cl.SparseInference(kv_budget=partial)),
        "short": Side(model, batch, SHORT, cache=DynamicCache(config=config)),
    }
    held = {name: side.nbytes for name, side in sides.items()}
    lengths = [
        len(lengths_kept)
        for layer in range(cfg.n_layers)
        for line in sides["budget"].cache.positions(layer)
        for lengths_kept in line
    ]
    weights = sum(
        p.nbytes for layer in model.layout.decoder(model.hf).layers for p in layer.parameters()
    )  # type: ignore[union-attr]
    result: dict[str, Any] = {
        "tokens": tokens,
        "batch": batch,
        "budget": budget,
        "weight_bytes": weights,
        "kv_bytes": held,
        "kept": {
            "mean": round(float(np.mean(lengths)), 1),
            "min": min(lengths),
            "max": max(lengths),
        },
        "evict_ms_a_layer": round(float(np.median(sides["budget"].evict_seconds)) * 1e3, 2),
        "limit_by_bytes": round((weights + held["dense"]) / (weights + held["budget"]), 3),
        "eager": measure(sides, repeats),
    }
    if compiled:
        static = Side(
            model,
            batch,
            tokens,
            cache=StaticCache(config=config, max_cache_len=tokens + repeats + 8),
        )
        static.forward = torch.compile(model.hf.forward)
        with compiled_parts(model):
            result["compiled"] = measure(sides | {"static": static}, repeats)
    kind = "processor_ms" if cfg.device.type == "cpu" else "clock_ms"
    for mode in ("eager", "compiled"):
        if mode in result:
            middle = {name: side[kind]["median"] for name, side in result[mode].items()}
            best = min(middle[name] for name in ("dense", "whole", "static") if name in middle)
            speedup = best / middle["budget"]
            allowed = best / (
                middle["short"] + (best - middle["short"]) * held["budget"] / held["dense"]
            )
            result[mode] |= {
                "kv_share": round(1 - middle["short"] / best, 3),
                "speedup": round(speedup, 3),
                "speedup_over_transformers": round(middle["dense"] / middle["budget"], 3),
                "limit_by_time": round(allowed, 3),
                "share_of_limit_by_time": round(speedup / allowed, 3),
                "share_of_limit_by_bytes": round(speedup / result["limit_by_bytes"], 3),
            }
    return result


@contextmanager
def compiled_parts(model: cl.HookedMLLM) -> Iterator[None]:
    """Within this context MLPs, norms and projections run compiled; attention's bookkeeping stays
    as it is."""
    kinds = ("MLP", "RMSNorm", "Linear")
    parts = [module for module in model.hf.modules() if type(module).__name__.endswith(kinds)]
    try:
        for module in parts:
            module.compile()
        yield
    finally:
        for module in parts:
            module._compiled_call_impl = None


def machine(device: str) -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    cpu_lines = info.read_text().splitlines() if info.is_file() else []
    cpu = next(
        (line.split(":")[1].strip() for line in cpu_lines if "model name" in line),
        platform.processor(),
    )
    about = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    about |= {
        "transformers": transformers.__version__,
        "load_at_start": [round(x, 1) for x in os.getloadavg()],
    }
    return about | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def main() -> None:
    """Measure, print a line a cell, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen3vl-4b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="by default on CUDA"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    compiled = options.device == "cuda" if options.compile is None else options.compile
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    model = make(options.shape, options.layers, options.device, dtype)
    out = options.out or RESULTS / f"decode-{options.device}.json"
    results = {
        "benchmark": "decode",
        "machine": machine(options.device),
        "shape": options.shape,
        "layers": options.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": options.repeats,
        "cells": [],
    }
    print(
        f"{'':14}{'kv share':>9}{'dense':>9}{'whole':>9}{'budget':>9}{'short':>9} ms a token   "
        "speed-up (limit)   KV MB"
    )
    for tokens in options.tokens:
        for batch in options.batch:
            result = cell(model, tokens, batch, options.budget, options.repeats, compiled)
            results["cells"].append(result)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(
                line(result, "processor_ms" if options.device == "cpu" else "clock_ms"), flush=True
            )


def line(result: dict[str, Any], kind: str) -> str:
    """A row of the table; under it one for what was compiled."""
    rows = []
    for mode in ("eager", "compiled"):
        if mode in result:
            mode_result = result[mode]
            times = "".join(
                f"{mode_result[name][kind]['median']:9.1f}"
                for name in ("dense", "whole", "budget", "short")
            )
            rows.append(
                f"{result['tokens'] // 1024:>4}k × "
                f"{result['batch']:<7}{mode_result['kv_share']:9.2f}{times}{'':14}"
                f"{mode_result['speedup']:.2f}x"
                f" ({mode_result['limit_by_time']:.2f}x, bytes {result['limit_by_bytes']:.2f}x)   "
                f"{result['kv_bytes']['dense'] / 1e6:.0f} → "
                f"{result['kv_bytes']['budget'] / 1e6:.0f} {mode}"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
