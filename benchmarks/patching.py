"""How fast sweeps of patches are, against one whole forward a patch; and what a knockout costs.

    python benchmarks/patching.py           # 12 layers, 1,024 visual tokens: minutes on one core
    python benchmarks/patching.py --quick   # a small shape, seconds

Three sweeps over every head, and over head × region:

    all rows        z patched everywhere, the pictures differ in one region: a run begins at the
                    layer and at the region
    head × region   z patched in one region after another
    text rows       the questions differ, the picture does not: a run is the rows after the picture

The loop is timed on some patches spread over the layers (its cost does not depend on the patch),
some before and some after the sweep, in seconds of processor time, so that a busy machine does not
matter. Both get pictures that are already encoded; what a loop that runs the vision tower too would
cost stands beside it. `allowed` is the speed-up that counting operations gives: the rows and layers
that a patch can change, against all.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import corelens as cl
from corelens.interventions import activation_patch, counterfactual, knockout, logit_diff
from corelens.interventions.branch import branch
from corelens.interventions.patching import first_row, write
from corelens.interventions.replay import LEAST_PREFIX, Replay
from corelens.interventions.sites import patches
from corelens.tokens.regions import Box

sys.path.insert(0, str(Path(__file__).parents[1]))  # `training/` is not installed with the package
from training.build import PRESETS, build_model, build_processor


def make(layers: int, width: int, heads: int) -> cl.HookedMLLM:
    """A random model of this shape with a small vision tower, and its real processor."""
    PRESETS["benchmark"] = {
        "family": "qwen3_vl",
        "text": {
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": width // heads,
            "mrope_section": [width // heads // 4, width // heads // 8, width // heads // 8],
        },
        "vision": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "deepstack_visual_indexes": [0],
        },
    }
    processor = build_processor("benchmark")
    torch.manual_seed(0)
    return cl.HookedMLLM(build_model("benchmark", processor).eval(), processor)


def scene(side: int) -> cl.Sample:
    """A picture of side × side visual tokens (32 pixels each) with two regions in its lower
    half."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32 * side, 32 * side, 3), dtype=np.uint8)
    edge, low = 32 * side, 32 * (side * 3 // 4)
    regions = [
        Box(0, low, edge // 4, low + edge // 8),
        Box(edge // 2, low, edge * 3 // 4, low + edge // 8),
    ]
    question = "What digit is on the red circle?"
    return cl.Sample(
        images=[Image.fromarray(pixels)], question=question, answer="7", regions=regions
    )


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    return min(taken)


def operations(model: cl.HookedMLLM, length: int, layer: int, row: int) -> float:
    """Multiplications of a forward of the rows from `row` on through the layers from `layer` on."""
    cfg, rows = model.cfg, length - row
    projections = (
        cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
        + 3 * cfg.d_model * cfg.d_mlp
    )
    seen = (length + row) / 2  # keys a row sees, on average
    return (cfg.n_layers - layer) * rows * (projections + 2 * seen * cfg.n_heads * cfg.d_head)


def allowed(
    model: cl.HookedMLLM, base: Any, source: Any, per: Sequence[str], positions: Any
) -> float:
    """Operations of the loop over those that the patches need, the two unpatched runs included: of
    the second only the rows that differ from the first, where nothing else does."""
    _, jobs = patches(model, base, "z", per, positions)
    names = sorted({name for job in jobs for name in job.names})
    with torch.no_grad():
        here, other_kernel = (
            model.run_with_cache(x, names_filter=names)[1].cache_dict for x in (base, source)
        )
    whole = operations(model, base.length, 0, 0)
    needed = 0.0
    for job in jobs:
        row = first_row(job, here, other_kernel)
        if row is not None:
            layer = int(job.names[0].split(".")[1])
            needed += operations(
                model, base.length, layer, row if row >= LEAST_PREFIX * base.length else 0
            )
    replay = Replay(model, base, names=names)
    second = whole
    if branch(replay, source, names) is not None:
        ids = (x.tensors["input_ids"] for x in (base, source))
        second = operations(model, base.length, 0, int(torch.ne(*ids).any(0).nonzero()[0]))
    return (len(jobs) + 2) * whole / (needed + whole + second)


def sweep(
    model: cl.HookedMLLM,
    name: str,
    clean: Any,
    corrupted: Any,
    per: Sequence[str],
    positions: Any,
    n_timed: int,
) -> dict[str, Any]:
    """One sweep, timed, against the loop."""
    base, source = model.encode(corrupted), model.encode(clean)
    _, jobs = patches(model, base, "z", per, positions)
    a, b = model.to_single_token("7"), model.to_single_token("3")
    with torch.no_grad():
        _, cache = model.run_with_cache(
            source, names_filter=sorted({name for job in jobs for name in job.names})
        )
    loop: list[float] = []
    loop_values: list[float] = []

    def run_one(number: int) -> None:
        hooks = [(name, write([jobs[number]], name, cache[name])) for name in jobs[number].names]
        logits = model.run_with_hooks(base, fwd_hooks=hooks, logits_to_keep=1)[0, -1]
        loop_values.append(float(logits[a] - logits[b]))

    timed_jobs = np.linspace(0, len(jobs) - 1, n_timed).round().astype(int).tolist()
    with torch.no_grad():
        for number in timed_jobs[: n_timed // 2]:
            loop.append(seconds(lambda number=number: run_one(number)))
        start = time.process_time()
        result = activation_patch(
            model, source, base, "z", logit_diff("7", "3"), per, positions=positions
        )
        ours = time.process_time() - start
        for number in timed_jobs[n_timed // 2 :]:
            loop.append(seconds(lambda number=number: run_one(number)))
        tower = seconds(lambda: model.encode(corrupted))
    error = float(np.abs(np.array(loop_values) - result.values[0].ravel()[timed_jobs]).max())
    loop_s = float(np.median(loop))
    bound = allowed(model, base, source, per, positions)
    speed_up = (len(jobs) + 2) * loop_s / ours
    return {
        "sweep": name,
        "patches": len(jobs),
        "tokens": base.length,
        "loop_s": len(jobs) * loop_s,
        "ours_s": ours,
        "loop_with_tower_s": len(jobs) * (loop_s + tower),
        "speed_up": speed_up,
        "allowed": bound,
        "of_allowed": speed_up / bound,
        "largest_error": error,
        "effect": float(np.abs(result.effect).max()),
    }


def knocked_out(model: cl.HookedMLLM, tokens: int, repeats: int) -> dict[str, Any]:
    """A forward under a knockout (all heads, 20 rows → 100 columns) against a plain one, in
    turns."""
    torch.manual_seed(0)
    inputs = model.inputs(
        inputs_embeds=torch.randn(1, tokens, model.cfg.d_model),
        attention_mask=torch.ones(1, tokens, dtype=torch.long),
    )
    hooks = knockout(None, rows=list(range(tokens - 20, tokens)), columns=list(range(500, 600)))
    plain, cut = [], []
    with torch.no_grad():
        for _ in range(repeats):
            plain.append(seconds(lambda: model(inputs, return_type=None)))
            cut.append(
                seconds(lambda: model.run_with_hooks(inputs, fwd_hooks=hooks, return_type=None))
            )
    return {
        "tokens": tokens,
        "plain_s": min(plain),
        "knockout_s": min(cut),
        "ratio": min(cut) / min(plain),
    }


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="visual tokens a side")
    parser.add_argument("--knockout-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/patching.json"))
    options = parser.parse_args()
    if options.quick:
        options.layers, options.width, options.heads, options.side, options.knockout_tokens = (
            4,
            64,
            4,
            8,
            1024,
        )
    model = make(options.layers, options.width, options.heads)
    print(model)
    sample = scene(options.side)
    sample.regions, regions = sample.regions[:1], sample.regions
    noised = counterfactual(sample, "noise")
    sample.regions = noised.regions = regions
    asked = counterfactual(sample, "text", other="What digit is on the blue circle?", model=model)
    clean, picture, text = map(model.prepare, (sample, noised, asked))
    n_timed = 4 if options.quick else 12
    rows = [
        sweep(model, "head, all rows", clean, picture, ("layer", "head"), None, n_timed),
        sweep(model, "head × region", clean, picture, ("layer", "head", "region"), None, n_timed),
        sweep(model, "head, text rows", clean, text, ("layer", "head"), None, n_timed),
    ]
    for row in rows:
        print(
            f"{row['sweep']:16} {row['patches']:4} patches of {row['tokens']} tokens: loop "
            f"{row['loop_s']:7.1f} s "
            f"(with tower {row['loop_with_tower_s']:7.1f} s), ours {row['ours_s']:6.1f} s: "
            f"×{row['speed_up']:.1f} of "
            f"×{row['allowed']:.1f} allowed ({row['of_allowed']:.0%}); largest error "
            f"{row['largest_error']:.1e} "
            f"(largest effect {row['effect']:.1e})"
        )
    cut = knocked_out(
        make(min(options.layers, 4), options.width, options.heads), options.knockout_tokens, 3
    )
    print(
        f"knockout at {cut['tokens']} tokens: {cut['ratio']:.3f} of a plain forward "
        f"({cut['plain_s']:.2f} s)"
    )
    shape = {
        "layers": options.layers,
        "width": options.width,
        "heads": options.heads,
        "visual_tokens": options.side**2,
    }
    about = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"shape": shape, "sweeps": rows, "knockout": cut, "about": about}, indent=1)
    )


if __name__ == "__main__":
    main()
