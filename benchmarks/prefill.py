"""What sparse heads save at prefill: attention alone, and whole decoder layers, dense against
sparse.

    python benchmarks/prefill.py    # 16k tokens on a CPU, one shape
    python benchmarks/prefill.py --tokens 512 --window 64 --sink 16 --repeats 2 --decoder \\
        --out look.json
    python benchmarks/prefill.py --device cuda --layers 4 --decoder \\
        --tokens 4096 16384 32768 65536 131072 \\
        --shapes qwen3vl-4b qwen3vl-8b qwen3vl-32b llava-onevision-7b

Layers of a real model's shape with random weights; 5% of the heads of these layers, drawn at
random, attend fully, the others under Streaming(sink=128, window=1024). Dense is transformers' own
call of SDPA (FlashAttention where torch has it), `laid out` the same on keys and values copied into
one piece a head first, which a CPU prefers; sparse is what the attention function does under the
plan. All get the same q, k and v as a model leaves them, and take turns when warm. On a CPU
processor time stands beside clock time, and ratios are of processor time where threads are one.

`limit` is what the operation count allows: pairs of query and key of the dense run over those that
are left. For whole decoder layers only attention shrinks, so the limit is Amdahl's: with the dense
attention's measured share s of the dense time, 1 / (1 − s + s / limit). `share` is the speed-up
reached over the limit.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from decode import RESULTS, clock, machine, make
from torch import nn
from transformers import AttentionInterface

import corelens as cl
from corelens.evaluation.sparse_account import left_pairs
from corelens.hooks.points import AttentionPoints
from corelens.hooks.rows import Call
from corelens.sparse.prefill import engine_for

SHAPES = {  # heads, KV heads, d_head of the decoders that decode.py makes
    "qwen3vl-4b": (32, 8, 128),
    "qwen3vl-8b": (32, 8, 128),  # InternVL3.5-8B's too
    "qwen3vl-32b": (64, 8, 128),
    "llava-onevision-7b": (28, 4, 128),
}


class Layer(nn.Module):
    """What transformers' function and ours look at of an attention module."""

    is_causal = True

    def __init__(self, number: int, group: int):
        super().__init__()
        self.layer_idx, self.num_key_value_groups = number, group


def shape_of(name: str, layers: int) -> Any:
    """n_layers, n_heads, n_kv_heads, d_head and the heads of each layer, of a shape."""
    heads, kv_heads, d_head = SHAPES[name]
    return SimpleNamespace(
        n_layers=layers, n_heads=heads, n_kv_heads=kv_heads, d_head=d_head, heads=(heads,) * layers
    )


def some_heads(cfg: Any, share: float) -> cl.HeadSet:
    """A seeded draw of full heads."""
    every = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    return cl.HeadSet(random.Random(0).sample(every, round(share * len(every))))


def attention_sides(
    cfg: Any, sparse: cl.SparseInference, tokens: int, device: str, dtype: torch.dtype
) -> Any:
    """{side: a run of the attention of all layers}, on the same random q, k and v."""
    generator = torch.Generator(device).manual_seed(tokens)
    q, k, v = (
        torch.randn(
            1, tokens, heads, cfg.d_head, generator=generator, device=device, dtype=dtype
        ).transpose(1, 2)
        for heads in (cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads)
    )
    layers = [Layer(number, cfg.n_heads // cfg.n_kv_heads) for number in range(cfg.n_layers)]
    points, scaling, sdpa = (
        AttentionPoints(cfg.n_heads, cfg.n_kv_heads),
        cfg.d_head**-0.5,
        AttentionInterface()["sdpa"],
    )

    def dense() -> None:
        for layer in layers:
            sdpa(layer, q, k, v, None, scaling=scaling)

    def laid_out() -> None:
        for layer in layers:
            sdpa(layer, q, k.contiguous(), v.contiguous(), None, scaling=scaling)

    def under_the_plan() -> None:
        plan = sparse.plan(cfg)
        plan.begin(None, 0, tokens, 1, q.device, None)
        for layer in layers:
            key, value, call = plan.restrict(
                q, k, v, Call(layer, None, scaling, True, None, None, None), points
            )
            if plan.attend(q, key, value, call) is None:  # every head of this layer is full
                sdpa(layer, q, k, v, None, scaling=scaling)

    return {"dense": dense, "laid out": laid_out, "sparse": under_the_plan}


def decoder_sides(model: cl.HookedMLLM, sparse: cl.SparseInference, tokens: int) -> Any:
    """{side: a forward of the decoder}."""
    ids = torch.randint(512, (1, tokens), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )

    def dense() -> None:
        model(input_ids=ids, logits_to_keep=1)

    def under_the_plan() -> None:
        with model.sparse(sparse):
            model(input_ids=ids, logits_to_keep=1)

    return {"dense": dense, "sparse": under_the_plan}


def measure(sides: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, Any]:
    """Seconds of each side, in turns; the speed-up is the median of each turn's own. On CUDA a
    first turn warms up."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(-1 if device == "cuda" else 0, repeats):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            began, used = clock(device), time.process_time()
            sides[name]()
            seconds = clock(device) - began, time.process_time() - used
            if turn >= 0:
                taken[name].append(seconds)
    kinds = ("clock_s", "processor_s")
    result: dict[str, Any] = {
        name: {
            kind: spread([sample_times[i] for sample_times in rounds], 4)
            for i, kind in enumerate(kinds)
        }
        for name, rounds in taken.items()
    }
    by = 1 if device == "cpu" and torch.get_num_threads() == 1 else 0
    result["timed_by"] = kinds[by]
    for name in taken.keys() - {"sparse"}:
        ratios = [
            dense[by] / other[by] for dense, other in zip(taken[name], taken["sparse"], strict=True)
        ]
        result["speedup" if name == "dense" else f"speedup over {name}"] = spread(ratios, 3)
    return result


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": round(middle, digits), "low": round(low, digits), "high": round(high, digits)}


@torch.inference_mode()
def cell(
    options: argparse.Namespace, name: str, tokens: int, model: cl.HookedMLLM | None
) -> dict[str, Any]:
    """One shape at one length."""
    cfg, dtype = shape_of(name, options.layers), getattr(torch, options.dtype)
    heads = some_heads(cfg, options.full)
    pattern = cl.Streaming(options.sink, options.window)
    sparse = cl.SparseInference(heads, pattern, engine=options.engine)
    left = left_pairs(sparse, cfg, [tokens])
    assert left is not None
    result: dict[str, Any] = {
        "shape": name,
        "tokens": tokens,
        "full_heads": len(heads),
        "heads": cfg.n_layers * cfg.n_heads,
        "sink": options.sink,
        "window": options.window,
        "engine": engine_for(options.engine, torch.device(options.device)),
    }
    # kernels and memory pools need no more than a short prompt to be warm
    if options.device == "cpu":
        short = max(tokens // 8, 256)
        warm = attention_sides(cfg, sparse, short, options.device, dtype)
        # (the first hooked run of a model also checks it)
        for run in [
            *warm.values(),
            *(decoder_sides(model, sparse, short).values() if model else ()),
        ]:
            run()
    attention = measure(
        attention_sides(cfg, sparse, tokens, options.device, dtype), options.repeats, options.device
    )
    result["attention"] = attention | against(attention, 1 / left)
    if model is not None:
        decoder = measure(decoder_sides(model, sparse, tokens), options.repeats, options.device)
        whole_s = decoder["dense"][decoder["timed_by"]]["median"]
        attention_s = attention["dense"][attention["timed_by"]]["median"]
        attends = min(attention_s / whole_s, 1.0)
        result["decoder"] = decoder | {"attention_share": round(attends, 3)}
        result["decoder"] |= against(decoder, 1 / (1 - attends + attends * left))
    return result


def against(result: dict[str, Any], limit: float) -> dict[str, float]:
    """The limit, and the share of it that was reached."""
    shares = {
        name.replace("speedup", "share"): result[name]["median"] / limit
        for name in result
        if "speedup" in name
    }
    return {"limit": round(limit, 3)} | {name: round(share, 3) for name, share in shares.items()}


def main() -> None:
    """Measure, print a line a cell, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", default=["qwen3vl-4b"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--full", type=float, default=0.05, help="share of full heads")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--decoder", action="store_true", help="whole decoder layers too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="by default float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    out = options.out or RESULTS / f"prefill-{options.device}.json"
    results: dict[str, Any] = {
        "benchmark": "prefill",
        "machine": machine(options.device),
        "dtype": options.dtype,
        "layers": options.layers,
        "repeats": options.repeats,
        "cells": [],
    }
    print(f"{'':28}{'dense':>10}{'sparse':>10}   speed-up (quartiles) of limit = share")
    for name in options.shapes:
        model = (
            make(name, options.layers, options.device, getattr(torch, options.dtype))
            if options.decoder
            else None
        )
        for tokens in options.tokens:
            result = cell(options, name, tokens, model)
            results["cells"].append(result)
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
            for part in ("attention", "decoder"):
                if part in result:
                    print(line(name, tokens, part, result[part]), flush=True)
    print(f"written: {out}")


def line(name: str, tokens: int, part: str, result: dict[str, Any]) -> str:
    """A row of the table."""
    dense, sparse = (result[side][result["timed_by"]]["median"] for side in ("dense", "sparse"))
    gain = result["speedup"]
    return (
        f"{name:<18}{tokens:>7} {part:<9}{dense:>9.3f}s{sparse:>9.3f}s   {gain['median']:.2f}x"
        f" ({gain['low']:.2f}–{gain['high']:.2f}) of {result['limit']:.2f}x = {result['share']:.0%}"
        + (
            f" ({result['share over laid out']:.0%} over keys laid out)"
            if "share over laid out" in result
            else ""
        )
    )


if __name__ == "__main__":
    main()
