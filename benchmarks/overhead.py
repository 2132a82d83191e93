"""Seven ways to look into a model and to change it, in CoreLens and in other tools, in one table.

    python benchmarks/overhead.py                             # 1k tokens: five minutes on one core
    python benchmarks/overhead.py --tokens 128 --repeats 2 --out look.json

The conditions are those of vlm-spectra's own benchmark: nothing asked (baseline), the hidden states
of all layers returned, hooks that read the residual stream of all layers, the attention of all
layers returned, hooks that read the attention of all layers, the residual stream of one layer set
to 0 at the last position, one head's z set to 0 at the last position.

One model (that of benchmarks/hooks.py), the same weights in every tool, one prompt with a picture.
All take turns within each repeat, in random order; medians, quartiles, and ratios to Hugging Face's
baseline of the same repeat. With one thread on a CPU, time is processor time, in which other work
on the machine does not count. Before anything is timed, the logits of each way are compared with
those of Hugging Face under PyTorch's own hooks: what differs is left out, and said.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hooks import SHAPE, boot_bridge, build, machine, prompt, summary

RESULTS = Path(__file__).parent / "results"
CONDITIONS = (
    "baseline", "hidden states", "residual hooks", "attentions", "pattern hooks", "residual patch",
    "head patch",
)  # fmt: skip
LAYERS, PATCHED, HEAD, WIDTH = range(SHAPE["layers"]), 1, 3, SHAPE["d_head"]
OF_HEAD = slice(HEAD * WIDTH, (HEAD + 1) * WIDTH)
RESIDUAL = [f"blocks.{layer}.hook_resid_post" for layer in LAYERS]
PATTERN = [f"blocks.{layer}.attn.hook_pattern" for layer in LAYERS]
PLAIN, BASE = "Hugging Face", ("Hugging Face", "baseline")
Inputs = dict[str, torch.Tensor]
Ways = dict[str, Callable[[Inputs], Any]]


# --- Hugging Face alone, with PyTorch's hooks


def of_transformers(device: str, dtype: torch.dtype) -> Ways:
    """SDPA; eager attention where the pattern is asked for."""
    sdpa, eager = build().to(device, dtype), build("eager").to(device, dtype)

    def layers(model: Any) -> Any:
        return model.model.language_model.layers

    def look(module: Any, arguments: Any, output: Any) -> None:
        (output[1] if isinstance(output, tuple) else output).shape  # noqa: B018

    def patch_residual(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = 0
        return output

    def patch_head(module: Any, arguments: Any) -> Any:
        z = arguments[0].clone()
        z[:, -1, OF_HEAD] = 0
        return (z, *arguments[1:])

    def hooked(model: Any, make: Callable[[], list[Any]]) -> Callable[[Inputs], Any]:
        def run(tensors: Inputs) -> Any:
            with removed(make()):
                return model(**tensors, use_cache=False)

        return run

    return {
        "baseline": lambda t: sdpa(**t, use_cache=False),
        "hidden states": lambda t: sdpa(**t, use_cache=False, output_hidden_states=True),
        "residual hooks": hooked(
            sdpa, lambda: [layer.register_forward_hook(look) for layer in layers(sdpa)]
        ),
        "attentions": lambda t: eager(**t, use_cache=False, output_attentions=True),
        "pattern hooks": hooked(
            eager, lambda: [layer.self_attn.register_forward_hook(look) for layer in layers(eager)]
        ),
        "residual patch": hooked(
            sdpa, lambda: [layers(sdpa)[PATCHED].register_forward_hook(patch_residual)]
        ),
        "head patch": hooked(
            sdpa,
            lambda: [layers(sdpa)[PATCHED].self_attn.o_proj.register_forward_pre_hook(patch_head)],
        ),
    }


@contextmanager
def removed(handles: list[Any]) -> Iterator[None]:
    """Within this context these hooks are there."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- TransformerLens's calls


def read(x: Any, hook: Any) -> None:
    """A hook that looks and changes nothing."""
    x.shape  # noqa: B018


def last_to_zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
    """The last position set to 0."""
    x = x.clone()
    x[:, -1] = 0
    return x


def head_to_zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
    """One head set to 0 at the last position."""
    z = z.clone()
    z[:, -1, HEAD] = 0
    return z


def with_their_calls(run: Any, cached: Any) -> Ways:
    """The seven conditions, given a run with hooks and a run with a cache."""
    return {
        "baseline": lambda t: run(t, []),
        "hidden states": lambda t: cached(t, RESIDUAL),
        "residual hooks": lambda t: run(t, [(name, read) for name in RESIDUAL]),
        "attentions": lambda t: cached(t, PATTERN),
        "pattern hooks": lambda t: run(t, [(name, read) for name in PATTERN]),
        "residual patch": lambda t: run(t, [(RESIDUAL[PATCHED], last_to_zero)]),
        "head patch": lambda t: run(t, [(f"blocks.{PATCHED}.attn.hook_z", head_to_zero)]),
    }


def of_corelens(device: str, dtype: torch.dtype) -> Ways:
    """CoreLens."""
    from corelens import HookedMLLM

    model = HookedMLLM(build().to(device, dtype))
    return with_their_calls(
        lambda t, hooks: model.run_with_hooks(t, fwd_hooks=hooks) if hooks else model(t),
        lambda t, names: model.run_with_cache(t, names_filter=names),
    )


def of_bridge(device: str, dtype: torch.dtype) -> Ways:
    """TransformerLens's TransformerBridge, whose attention is eager."""
    bridge = boot_bridge(device, dtype)

    def rest(tensors: Inputs) -> Inputs:
        return {name: x for name, x in tensors.items() if name != "input_ids"}

    return with_their_calls(
        lambda t, hooks: (
            bridge.run_with_hooks(t["input_ids"], fwd_hooks=hooks, **rest(t))
            if hooks
            else bridge(t["input_ids"], **rest(t))
        ),
        lambda t, names: bridge.run_with_cache(t["input_ids"], names_filter=names, **rest(t)),
    )


# --- nnsight


def of_nnsight(device: str, dtype: torch.dtype) -> Ways:
    """What is saved in a trace, and what is set there; a trace that reads saves what it reads."""
    from nnsight import NNsight  # type: ignore[import-not-found]

    sdpa = NNsight(build().to(device, dtype))
    eager = NNsight(build("eager").to(device, dtype))

    def baseline(tensors: Inputs) -> Any:
        with sdpa.trace(**tensors, use_cache=False):
            output = sdpa.output.save()
        return output

    def states(tensors: Inputs) -> Any:
        saved = []
        with sdpa.trace(**tensors, use_cache=False):
            for layer in sdpa.model.language_model.layers:
                saved.append(layer.output.save())
            output = sdpa.output.save()
        return output, saved

    def patterns(tensors: Inputs) -> Any:
        saved = []
        with eager.trace(**tensors, use_cache=False):
            for layer in eager.model.language_model.layers:
                saved.append(layer.self_attn.output[1].save())
            output = eager.output.save()
        return output, saved

    def residual_patch(tensors: Inputs) -> Any:
        with sdpa.trace(**tensors, use_cache=False):
            sdpa.model.language_model.layers[PATCHED].output[:, -1] = 0
            output = sdpa.output.save()
        return output

    def head_patch(tensors: Inputs) -> Any:
        with sdpa.trace(**tensors, use_cache=False):
            sdpa.model.language_model.layers[PATCHED].self_attn.o_proj.input[:, -1, OF_HEAD] = 0
            output = sdpa.output.save()
        return output

    return {
        "baseline": baseline, "hidden states": states, "residual hooks": states,
        "attentions": patterns, "pattern hooks": patterns, "residual patch": residual_patch,
        "head patch": head_patch,
    }  # fmt: skip


TOOLS = {
    PLAIN: of_transformers,
    "CoreLens": of_corelens,
    "TransformerBridge": of_bridge,
    "nnsight": of_nnsight,
}


# --- measuring


def logits_of(result: Any) -> torch.Tensor:
    """The last row's logits of what a way returned."""
    result = result[0] if isinstance(result, tuple) else result
    return getattr(result, "logits", result)[:, -1].float()


def ways_that_agree(device: str, dtype: torch.dtype, tensors: Inputs) -> tuple[Any, dict[str, str]]:
    """{(tool, condition): its run} of what runs and gives Hugging Face's logits, and what does
    not."""
    ways, missing, right = {}, {}, {}
    for tool, make in TOOLS.items():
        try:
            made = make(device, dtype)
        except Exception as error:  # the others are measured without it
            missing[tool] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        for condition, run in made.items():
            try:
                with torch.no_grad():
                    logits = logits_of(run(tensors))
            except Exception as error:
                missing[f"{tool}, {condition}"] = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            differs = float((logits - right.setdefault(condition, logits)).abs().max())
            if differs > 1e-3:
                missing[f"{tool}, {condition}"] = f"its logits differ by {differs:.2g}"
            else:
                ways[tool, condition] = run
    assert not torch.equal(right["residual patch"], right["baseline"])
    assert not torch.equal(right["head patch"], right["baseline"])
    return ways, missing


def seconds_of(run: Callable[[Inputs], Any], tensors: Inputs, clock: Callable[[], float]) -> float:
    """How long one run takes, what it returns being held."""
    start = clock()
    with torch.no_grad():
        output = run(tensors)
    if next(iter(tensors.values())).is_cuda:
        torch.cuda.synchronize()
    seconds = clock() - start
    del output
    return seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tensors = prompt(options.tokens, options.device)
    by_processor = options.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if by_processor else time.perf_counter
    load = [round(x, 1) for x in os.getloadavg()]
    ways, missing = ways_that_agree(options.device, getattr(torch, options.dtype), tensors)
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    order = list(ways)
    for number in range(options.repeats):
        random.Random(number).shuffle(order)
        for way in order:
            seconds[way].append(seconds_of(ways[way], tensors, clock))
    results = {}
    for (tool, condition), times in seconds.items():
        ratios = [own / base for own, base in zip(times, seconds[BASE], strict=True)]
        results[f"{tool}, {condition}"] = {"seconds": summary(times), "ratio": summary(ratios)}
    print(
        f"{f'time × of baseline, {options.tokens} tokens':<32}" + "".join(f"{t:>20}" for t in TOOLS)
    )
    for condition in CONDITIONS:
        cells = [results.get(f"{tool}, {condition}") for tool in TOOLS]
        print(f"{condition:<32}" + "".join(f"{cell_of(result):>20}" for result in cells))
    for name, reason in missing.items():
        print(f"{name}: {reason}")
    report = {
        "benchmark": "overhead", "machine": machine(options.device) | {"load_at_start": load},
        "nnsight": version_of("nnsight"), "shape": SHAPE, "dtype": options.dtype,
        "tokens": options.tokens, "repeats": options.repeats,
        "timed_by": "processor_s" if by_processor else "clock_s", "missing": missing,
        "results": results,
    }  # fmt: skip
    out = options.out or RESULTS / f"overhead-{options.device}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")


def cell_of(result: dict[str, Any] | None) -> str:
    """A ratio with its quartiles; a dash where nothing was measured."""
    if result is None:
        return "–"
    ratio = result["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def version_of(package: str) -> str | None:
    """Its version, if it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
