"""What scoring costs: every metric of one forward together, against that forward alone, and against
output_attentions.

    python benchmarks/scores.py     # both shapes, 1k to 16k tokens: about an hour on one core
    python benchmarks/scores.py --tokens 1024 2048    # some minutes
    python benchmarks/scores.py --tokens 32768 --repeats 1 --shape small

    forward   the model without CoreLens: SDPA, no cache, no language-model head, the vision tower's
              output given
    scores    the same forward under HookedMLLM with a Record of all metrics below, fetched: as
              score_heads runs it
    eager     the same forward with output_attentions=True; only where its patterns leave room in
              memory

Times are taken in turns in one process, after one round of warming up: on the clock, and as
processor time, which leaves out what other programs took meanwhile. Peak memory is taken in a
process of its own for each: the highest resident size during the forward, less what was resident
before it (weights, inputs, libraries), and beside it the whole process. Pictures of 1,024 tokens
each, one question, and the evidence in the last of them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import corelens as cl
from corelens.metrics.localization import _geometry
from corelens.metrics.record import Record
from corelens.metrics.registry import metric
from corelens.metrics.value_mass import same_norms

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training/` is not installed with the package
from training.build import PRESETS, build_model, build_processor

RESULTS = Path(__file__).parent / "results" / "scores.json"
METRICS = [
    "ram",
    "ram[reduce=max]",
    "ram[rows=last]",
    "ram[rows=answer]",
    "ram[rows=answer,reduce=max]",
    "visual_mass",
    "visual_mass[rows=last]",
    "precision",
    "lift",
    "lift[rows=last]",
    "gaze",
    "random",
    "value_mass",
    "localization",
]
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "deepstack_visual_indexes": [0],
}
SHAPES = {
    "small": (
        "12 layers × 16 heads, width 512",
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 32,
            "mrope_section": [6, 5, 5],
        },
    ),
    "4b": (
        "2 layers of Qwen3-VL-4B's shape (32 heads, 8 KV heads, width 2,560)",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mrope_section": [24, 20, 20],
        },
    ),
}
MODES = ("forward", "scores", "eager")


def make(shape: str) -> cl.HookedMLLM:
    """A random model of this shape in float32, through transformers' Qwen3-VL classes, and its real
    processor."""
    PRESETS["benchmark"] = {"family": "qwen3_vl", "text": SHAPES[shape][1], "vision": VISION}
    processor = build_processor("benchmark")
    torch.manual_seed(0)
    model = build_model("benchmark", processor).eval()
    model.config.text_config.max_position_embeddings = 65536
    return cl.HookedMLLM(model, processor)


def inputs_of(model: cl.HookedMLLM, tokens: int) -> cl.inputs.Inputs:
    """One question about pictures of 1,024 tokens, as many as make about this many tokens,
    encoded."""
    noise = np.random.default_rng(0)
    side = 1024 if tokens >= 1024 else 128
    pages = [
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8))
        for _ in range(max(1, tokens // 1024))
    ]
    region = cl.Box(side // 4, side // 4, side // 2, side // 2, image=len(pages) - 1)
    question = (
        "What digit is on the small red circle in the last of these pictures, left of the blue "
        "star?"
    )
    sample = cl.Sample(pages, question, "7", [region], id="long")
    with torch.no_grad():
        return model.encode(model.prepare(sample, answer=True))


def runs(model: cl.HookedMLLM, inputs: cl.inputs.Inputs) -> dict[str, Callable[[], Any]]:
    """The three things that are compared."""
    w_o = cache(lambda layer: same_norms(model.blocks[layer].attn.W_O))  # once a run of score_heads

    def forward() -> Any:
        return model.hf.base_model(**inputs.tensors, use_cache=False).last_hidden_state

    def scores() -> Any:
        _geometry.cache_clear()  # every sample has its own
        record = Record([metric(name) for name in METRICS], w_o)
        model.run_with_hooks(inputs, fwd_hooks=record.hooks, return_type=None)
        return [record.per_sample(metric) for metric in record.metrics]

    def eager() -> Any:
        model.hf.set_attn_implementation("eager")
        try:
            return model.hf.base_model(
                **inputs.tensors, use_cache=False, output_attentions=True
            ).attentions
        finally:
            model.hf.set_attn_implementation("sdpa")

    return {"forward": forward, "scores": scores, "eager": eager}


def patterns_bytes(shape: str, tokens: int) -> int:
    """What the patterns alone take that output_attentions=True returns."""
    text = SHAPES[shape][1]
    return text["num_hidden_layers"] * text["num_attention_heads"] * tokens**2 * 4


@torch.no_grad()
def times(shape: str, tokens: int, repeats: int, modes: list[str]) -> dict[str, Any]:
    """Seconds of every repetition, in turns."""
    model = make(shape)
    inputs = inputs_of(model, tokens)
    todo = runs(model, inputs)
    clocks = {"clock": time.perf_counter, "processor": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {
        clock: {mode: [] for mode in modes} for clock in clocks
    }
    for number in range(repeats + 1):
        for mode in modes if number % 2 else reversed(modes):
            start = {clock: now() for clock, now in clocks.items()}
            todo[mode]()
            if number:
                for clock, now in clocks.items():
                    seconds[clock][mode].append(now() - start[clock])
    rows = len(
        torch.unique(
            torch.cat(
                [inputs.token_maps[0].positions(r, rows=True) for r in ("question", "answer")]
            )
        )
    )
    return {"length": inputs.length, "rows": rows, "seconds": seconds}


@torch.no_grad()
def peak(shape: str, tokens: int, mode: str) -> dict[str, int]:
    """Bytes: the highest resident size during one run, above what was resident before it, and
    altogether."""
    model = make(shape)
    runs(model, inputs_of(model, 64))[mode]()  # libraries and kernels are loaded
    run = runs(model, inputs_of(model, tokens))[mode]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return {"above": _status("VmHWM") - before, "whole": _status("VmHWM")}


def _status(field: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def in_a_process(shape: str, tokens: int, mode: str) -> dict[str, int]:
    """`peak` in a fresh process that gives freed memory back at once, so that resident is what is
    in use."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
    }
    command = [sys.executable, __file__, "--peak", mode, "--shape", shape, "--tokens", str(tokens)]
    return json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    )


def ratio(above: list[float], below: list[float]) -> list[float]:
    """Median, lowest and highest of the ratios of runs that were neighbours in time."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    return [float(np.median(ratios)), ratios[0], ratios[-1]]


def machine() -> dict[str, Any]:
    """The machine, in words that fit any of its kind."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    names = [entry.split(":")[1].strip() for entry in about if "model name" in entry]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "dtype": "float32",
    }


def main() -> None:
    """Measure, print a line each, and add the results to those that are there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--room", type=float, default=10, help="GB that eager's patterns may take")
    parser.add_argument("--skip", choices=["times", "memory"], help="leave one of them out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.shape[0], options.tokens[0], options.peak)))
        return
    options.out.parent.mkdir(exist_ok=True)
    results = (
        json.loads(options.out.read_text())
        if options.out.exists()
        else {"benchmark": "scores", "metrics": METRICS}
    )
    for shape in options.shape:
        for tokens in options.tokens:
            fits = patterns_bytes(shape, tokens) < options.room * 1e9
            modes = [mode for mode in MODES if mode != "eager" or fits]
            result = {"shape": SHAPES[shape][0], "tokens": tokens, "machine": machine()}
            if options.skip != "times":
                result |= times(shape, tokens, options.repeats, modes)
                result["time_ratio"] = {
                    mode: {
                        clock: ratio(took[mode], took["forward"])
                        for clock, took in result["seconds"].items()
                    }
                    for mode in modes
                    if mode != "forward"
                }
            if options.skip != "memory":
                result["peak_bytes"] = {mode: in_a_process(shape, tokens, mode) for mode in modes}
                base = result["peak_bytes"]["forward"]
                result["memory_ratio"] = {
                    m: {
                        which: result["peak_bytes"][m][which] / base[which]
                        for which in ("above", "whole")
                    }
                    for m in modes
                    if m != "forward"
                }
            known = results.setdefault("runs", {}).setdefault(f"{shape} {tokens}", {})
            known |= result
            options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False))
            print(line(known), flush=True)


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    cells = [f"{result['shape']:<72} {result['tokens']:>6}"]
    for mode in ("scores", "eager"):
        if mode in result.get("time_ratio", {}):
            median, low, high = result["time_ratio"][mode]["clock"]
            processor = result["time_ratio"][mode]["processor"][0]
            cells.append(
                f"{mode}: time {median:.3f}x [{low:.3f}, {high:.3f}], processor {processor:.3f}x"
            )
        if mode in result.get("memory_ratio", {}):
            memory = result["memory_ratio"][mode]
            size = result["peak_bytes"][mode]["above"] / 1e9
            cells.append(
                f"{mode}: memory {memory['above']:.3f}x ({size:.2f} GB; whole process "
                f"{memory['whole']:.3f}x)"
            )
    return " | ".join(cells)


if __name__ == "__main__":
    main()
