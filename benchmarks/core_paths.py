"""Who writes to the CoRe heads' queries, and who reads what they fetch? Path patching on the
bundled model.

    python benchmarks/core_paths.py

The CoRe heads are the top 5% by RAM of the last row (where this model reads the evidence, see the
study). Writers: the question is exchanged for one about another shape; each sender alone carries
the change into the CoRe heads' queries on direct paths. Readers: the asked shape changes places
with another; the CoRe heads together carry the change into the query, key or value of each later
head, or to the logits. Effects are logit differences (right minus wrong), mean over pairs with 95%
bootstrap intervals. Writes benchmarks/results/core_paths.json and docs/images/core_paths.png.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np

import corelens as cl
from corelens.evaluation.evaluate import bootstrap_mean

matplotlib.use("Agg")
from matplotlib.figure import Figure

HERE = Path(__file__).parent


def pairs(n: int, seed: int) -> tuple[list, list, list]:
    """(samples, twins with another question, twins with two shapes exchanged); the answers
    differ."""
    clean, asked, swapped = [], [], []
    for sample in cl.synthetic("refer", 4 * n, seed=seed):
        for shape in sample.meta["objects"]:
            box, digit = cl.Box(*shape["box"]), str(shape["digit"])
            if digit == sample.answer or box == sample.regions[0]:
                continue
            other = cl.counterfactual(
                sample,
                "text",
                other=f"What digit is on the {shape['colour']} {shape['kind']}?",
                answer=digit,
            )
            try:
                swap = cl.counterfactual(sample, "swap", other=box, answer=digit)
            except cl.CorelensError:  # boxes that overlap
                continue
            clean.append(sample)
            asked.append(other)
            swapped.append(swap)
            break
        if len(clean) == n:
            return clean, asked, swapped
    raise SystemExit("too few pairs")


def measured(effect: np.ndarray, names: list[str]) -> dict[str, tuple[float, float, float]]:
    """{name: (mean, low, high)} of effects [sample, name]."""
    return {name: tuple(bootstrap_mean(effect[:, i])) for i, name in enumerate(names)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "core_paths.json")
    parser.add_argument(
        "--figure", type=Path, default=HERE.parent / "docs" / "images" / "core_paths.png"
    )
    arguments = parser.parse_args()
    model = cl.load_demo("qwen3vl-s")
    scores = cl.score_heads(model, cl.synthetic("refer", 100, seed=21), ["ram[rows=last]"])[
        "ram[rows=last]"
    ]
    core = scores.top(0.05)
    last_core = max(head.layer for head in core)
    first_core = min(head.layer for head in core)
    clean, asked, swapped = pairs(arguments.pairs, seed=22)

    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    writers = ["hook_embed"]
    for layer in range(last_core):
        writers += [f"blocks.{layer}.attn.head.{head}.hook_z" for head in range(heads)] + [
            f"blocks.{layer}.hook_mlp_out"
        ]
    queries = [f"blocks.{head.layer}.attn.head.{head.head}.hook_q" for head in core]
    write = cl.path_patch(
        model, clean, asked, writers, queries, cl.logit_diff(), per="sender", progress=True
    )

    senders = [f"blocks.{head.layer}.attn.head.{head.head}.hook_z" for head in core]
    readers = ["hook_logits"]
    for layer in range(first_core + 1, layers):
        readers += [
            f"blocks.{layer}.attn.head.{head}.hook_{kind}"
            for head in range(heads)
            for kind in "qkv"
        ]
        readers += [f"blocks.{layer}.hook_mlp_in"]
    read = cl.path_patch(
        model, clean, swapped, senders, readers, cl.logit_diff(), per="receiver", progress=True
    )

    everything = float((np.asarray(write.other) - np.asarray(write.base)).mean())
    result = {
        "benchmark": "core_paths",
        "model": "qwen3vl-s",
        "core_heads": [str(head) for head in core],
        "pairs": len(clean),
        "direction": "noising",
        "unit": "logit difference (right minus wrong); negative: the path carries the answer",
        "clean_to_other_question": everything,
        "clean_to_swapped": float((np.asarray(read.other) - np.asarray(read.base)).mean()),
        "writers": measured(write.effect, writers),
        "readers": measured(read.effect, readers),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.figure)
    for kind in ("writers", "readers"):
        print(kind)
        for name, (mean, low, high) in sorted(result[kind].items(), key=lambda item: item[1][0])[
            :10
        ]:
            print(f"  {name:34s} {mean:+.2f} [{low:+.2f}, {high:+.2f}]")


def draw(result: dict, path: Path) -> None:
    """The ten strongest writers and readers."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {
        "writers": f"writes to the queries of {', '.join(result['core_heads'])}",
        "readers": "reads what these heads fetch",
    }
    for axes, (kind, title) in zip(panels, titles.items(), strict=True):
        top = sorted(result[kind].items(), key=lambda item: item[1][0])[:10][::-1]
        means = [value[0] for _, value in top]
        spread = np.array([[value[0] - value[1], value[2] - value[0]] for _, value in top]).T
        names = [
            name.replace("blocks.", "L").replace(".attn.head.", "H").replace(".hook_", " ")
            for name, _ in top
        ]
        names = [name.replace("hook_", "") for name in names]
        axes.barh(names, means, xerr=spread, color="#0072b2", ecolor="#555555", height=0.65)
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("effect on the logit difference (95% CI)", fontsize=8.5)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
