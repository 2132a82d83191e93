"""What hooks cost: time and peak memory against a plain forward pass with SDPA, and the time
`import corelens` takes.

    python benchmarks/hooks.py                      # 1k to 8k tokens: some 20 minutes on one core
    python benchmarks/hooks.py --tokens 256 --repeats 2

One model of fixed shape (a LLaVA with random weights), one prompt that begins with a picture. All
ways of running it take turns within each repeat, in random order; medians, with the quartiles as
spread. Memory is the peak during a run over what was held before it. Prints a table of ratios and
writes JSON to benchmarks/results/.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "layers": 4,
    "heads": 8,
    "kv_heads": 4,
    "d_head": 64,
    "d_model": 512,
    "d_mlp": 1408,
    "vocabulary": 1024,
}
IMAGE_TOKENS, IMAGE_ID, ROWS = 64, 1000, 32
PLAIN = "Hugging Face, SDPA"
TARGETS = {
    "CoreLens, no hook": 1.02,
    "CoreLens, z of all heads": 1.05,
    "CoreLens, 32 rows of all layers": 1.10,
}
Ways = dict[str, Callable[[dict[str, Any]], Any]]
IMPORTS = {
    "transformer_lens + transformers": "import transformer_lens, transformers",
    "corelens": "import corelens",
}


def build(attention: str = "sdpa") -> Any:
    """The model, the same weights whatever the attention implementation."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
    }
    vision |= {"num_attention_heads": 2, "patch_size": 14, "image_size": 112}
    text = {
        "model_type": "llama",
        "hidden_size": SHAPE["d_model"],
        "intermediate_size": SHAPE["d_mlp"],
    }
    text |= {"num_hidden_layers": SHAPE["layers"], "num_attention_heads": SHAPE["heads"]}
    text |= {
        "num_key_value_heads": SHAPE["kv_heads"],
        "head_dim": SHAPE["d_head"],
        "vocab_size": SHAPE["vocabulary"],
    }
    config = LlavaConfig(
        text_config=text | {"max_position_embeddings": 65536},
        vision_config=vision,
        image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS,
        architectures=["LlavaForConditionalGeneration"],
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def prompt(tokens: int, device: str) -> dict[str, torch.Tensor]:
    """A picture of 64 tokens, then words."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(5, IMAGE_ID, (1, tokens), generator=generator)
    ids[:, 1 : 1 + IMAGE_TOKENS] = IMAGE_ID
    pixels = torch.randn(1, 3, 112, 112, generator=generator)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: x.to(device) for name, x in tensors.items()}


def ways_to_run(device: str, dtype: torch.dtype) -> tuple[Ways, dict[str, str]]:
    """Every way of running the model, and why some are missing."""
    from corelens import HookedMLLM

    hf = build().to(device, dtype)
    eager = build("eager").to(device, dtype)
    model = HookedMLLM(hf)
    layers = range(SHAPE["layers"])
    z = [f"blocks.{n}.attn.hook_z" for n in layers]
    rows = [f"blocks.{n}.attn.hook_pattern_rows" for n in layers]
    patterns = [f"blocks.{n}.attn.hook_pattern" for n in layers]

    def some_rows(tensors: dict[str, Any]) -> Any:
        last = tensors["input_ids"].shape[1]
        with model.pattern_rows(list(range(last - ROWS, last))):
            return model.run_with_cache(tensors, names_filter=rows)

    ways: Ways = {
        PLAIN: lambda tensors: hf(**tensors, use_cache=False),
        "Hugging Face, eager": lambda tensors: eager(**tensors, use_cache=False),
        "CoreLens, no hook": model,
        "CoreLens, z of all heads": lambda tensors: model.run_with_cache(tensors, names_filter=z),
        "CoreLens, 32 rows of all layers": some_rows,
        "CoreLens, one pattern": lambda tensors: model.run_with_cache(
            tensors, names_filter=patterns[1]
        ),
        "CoreLens, all patterns": lambda tensors: model.run_with_cache(
            tensors, names_filter=patterns
        ),
    }
    missing = {}
    for name, make in (("TransformerBridge", _bridge), ("nnsight", _nnsight)):
        try:
            ways |= make(device, dtype)
        except Exception as error:  # the others are measured without it
            missing[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    return ways, missing


def boot_bridge(device: str, dtype: torch.dtype) -> Any:
    """The model in TransformerLens's TransformerBridge, whose attention is eager."""
    import tempfile

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    hf = build("eager").to(device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        _words().save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, hf_model=hf, tokenizer=tokenizer, device=device, dtype=dtype
        )


def _bridge(device: str, dtype: torch.dtype) -> Ways:
    bridge = boot_bridge(device, dtype)
    z = [f"blocks.{n}.attn.hook_z" for n in range(SHAPE["layers"])]

    def run(tensors: dict[str, Any], hooked: bool) -> Any:
        rest = {name: x for name, x in tensors.items() if name != "input_ids"}
        if hooked:
            return bridge.run_with_cache(tensors["input_ids"], names_filter=z, **rest)
        return bridge(tensors["input_ids"], **rest)

    return {
        "TransformerBridge, no hook": lambda tensors: run(tensors, False),
        "TransformerBridge, z of all heads": lambda tensors: run(tensors, True),
    }


def _words() -> Any:
    """A tokenizer, which TransformerBridge wants; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>")
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def _nnsight(device: str, dtype: torch.dtype) -> Ways:
    from nnsight import NNsight  # type: ignore[import-not-found]

    traced = NNsight(build().to(device, dtype))

    def z(tensors: dict[str, Any]) -> Any:
        saved = []
        with traced.trace(**tensors, use_cache=False):
            for layer in traced.model.language_model.layers:
                saved.append(layer.self_attn.o_proj.input.save())
        return saved

    z(prompt(80, device))
    return {"nnsight, z of all heads": z}


# --- measuring


def seconds_of(run: Callable[[dict[str, Any]], Any], tensors: dict[str, Any], device: str) -> float:
    """How long one run takes, what it returns being held."""
    gc.collect()
    start = time.perf_counter()
    with torch.no_grad():
        output = run(tensors)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del output
    return seconds


def memory_of(run: Callable[[dict[str, Any]], Any], tensors: dict[str, Any], device: str) -> float:
    """The peak of memory of one run, over what was held before, in MB."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        _libc().malloc_trim(0)
        # Linux: forget the peak of resident memory so far
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    with torch.no_grad():
        output = run(tensors)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else _status("VmHWM")
    del output
    return (peak - before) / 2**20


def _libc() -> Any:
    return ctypes.CDLL("libc.so.6")


def give_back_memory() -> None:
    """From now on every larger tensor is given back when it is freed: peaks can be told apart, but
    times suffer."""
    _libc().mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD; setting it also keeps it from growing


def _status(field: str) -> float:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "low": quartiles[0], "high": quartiles[2]}


def compare_times(ways: Ways, tokens: int, repeats: int, device: str) -> dict[str, dict[str, Any]]:
    """Seconds of every way at one length, and their ratios to plain SDPA in the same repeat."""
    tensors = prompt(tokens, device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():  # warm-up
        seconds_of(run, tensors, device)
    order = list(ways)
    for number in range(repeats):
        random.Random(number).shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(ways[name], tensors, device))
    ratios = {
        name: [a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)] for name in ways
    }
    return {
        name: {"seconds": summary(seconds[name]), "time_ratio": summary(ratios[name])}
        for name in ways
    }


def compare_memory(ways: Ways, tokens: int, device: str) -> dict[str, dict[str, float]]:
    """Peak memory of every way at one length (the median of three runs), and its ratio to plain
    SDPA's."""
    tensors = prompt(tokens, device)
    peaks = {
        name: statistics.median(memory_of(run, tensors, device) for _ in range(3))
        for name, run in ways.items()
    }
    return {
        name: {"memory_mb": peak, "memory_ratio": peak / max(peaks[PLAIN], 1e-9)}
        for name, peak in peaks.items()
    }


def import_times(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds that a fresh interpreter takes to import, taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(repeats + 1):
        for name, code in IMPORTS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            if number:  # the first one fills the disk cache
                spent[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in spent.items()}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import transformer_lens
    import transformers

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text().splitlines()
                if "model name" in line
            ),
            cpu,
        )
    about = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    about |= {
        "transformers": transformers.__version__,
        "device": device,
        "python": platform.python_version(),
    }
    about["transformer_lens"] = getattr(transformer_lens, "__version__", "4")
    if device != "cpu":
        about["gpu"] = torch.cuda.get_device_name()
    return about


def show(results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """The table: time × and memory × of plain SDPA, a column a length."""
    names = list(next(iter(results.values())))
    width = max(len(name) for name in names)
    print(
        f"{'time × / memory × of plain SDPA':<{width}}"
        + "".join(f"{f'{n} tokens':>24}" for n in results)
    )
    for name in names:
        cells = []
        for result in results.values():
            ratio, memory = result[name]["time_ratio"], result[name]["memory_ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
            cells.append(f"{f'{spread} / {memory:.2f}':>24}")
        target = f"   to reach: {TARGETS[name]:.2f}" if name in TARGETS else ""
        print(f"{name:<{width}}" + "".join(cells) + target)
    plain = "".join(f"{result[PLAIN]['seconds']['median']:>22.3f} s" for result in results.values())
    print(f"{'plain SDPA takes':<{width}}{plain}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--imports", type=int, default=5, help="repeats of the import times; 0 leaves them out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    ways, missing = ways_to_run(options.device, getattr(torch, options.dtype))
    results = {n: compare_times(ways, n, options.repeats, options.device) for n in options.tokens}
    if options.device == "cpu":
        give_back_memory()
    for n, result in results.items():
        for name, memory in compare_memory(ways, n, options.device).items():
            result[name] |= memory
    show(results)
    for name, reason in missing.items():
        print(f"{name} was not measured: {reason}")
    report = {
        "machine": machine(options.device),
        "shape": SHAPE,
        "dtype": options.dtype,
        "repeats": options.repeats,
    }
    report |= {"results": results, "missing": missing, "targets": TARGETS}
    if options.imports:
        report["imports"] = import_times(options.imports)
        base, ours = (report["imports"][name]["median"] for name in IMPORTS)
        print(
            f"import corelens: {ours:.2f} s, {ours / base:.2f}x of {base:.2f} s "
            f"({next(iter(IMPORTS))}); to reach: 1.15"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"hooks-{options.device}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
