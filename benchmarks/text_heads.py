"""Do the heads that fetch from a picture fetch from a text, too? For smol-vlm, whose decoder
learned its language from language.

    python benchmarks/text_heads.py        # some minutes a hundred scenes

The same scenes of `refer` are asked twice: shown as a picture, and told as a list ("red circle: 7,
blue star: 3, …") without one. RAM is the same formula in both, on the tokens of the asked object's
shape or of its entry in the list. A third ranking is the decoder's own, with our adapters left out:
what training moved. Of each ranking's top 5% it is measured what masking them costs in pictures and
in lists. An answer is right if the asked object's digit is the likeliest of the ten digits: the
decoder without adapters knows it, but answers in a sentence. Writes JSON to benchmarks/results/.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

import corelens as cl
from corelens.demo import CHECKPOINTS
from corelens.demo.smol import assemble, decoder_file
from corelens.heads.intervals import clopper_pearson

OUT = Path(__file__).parent / "results/text_heads.json"
NAME, SHARE, SEED = "smol-vlm", 0.05, 61


def as_list(sample: cl.Sample) -> tuple[cl.Sample, str]:
    """The sample's objects told in words instead of shown, and the asked one's entry."""
    entries = [f"{s['colour']} {s['kind']}: {s['digit']}" for s in sample.meta["objects"]]
    asked = entries[sample.meta["asked"]]
    words = f"A picture shows these objects. {', '.join(entries)}."
    texts = [{"type": "text", "text": text} for text in (words + "\n", sample.question)]
    return replace(
        sample, images=[], regions=[], messages=[{"role": "user", "content": texts}]
    ), asked


def ram_on_text(
    model: cl.HookedMLLM, samples: list[cl.Sample], rows: str
) -> Float[np.ndarray, "layer head"]:
    """RAM on the asked entry of a list, the mean over samples."""
    total = np.zeros((model.cfg.n_layers, model.cfg.n_heads))
    for sample in samples:
        listed, entry = as_list(sample)
        inputs = model.prepare(listed)
        tokens = model.to_str_tokens(inputs)
        starts = np.cumsum([0, *(len(token) for token in tokens)])
        begin = "".join(tokens).index(entry)
        inside = (starts[1:] > begin) & (starts[:-1] < begin + len(entry))
        columns = torch.tensor(np.flatnonzero(inside))
        with model.pattern_rows(rows):
            _, cache = model.run_with_cache(
                inputs, names_filter=lambda name: name.endswith("hook_pattern_rows")
            )
        for layer in range(model.cfg.n_layers):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern_rows"][0]  # [head, row, key]
            total[layer] += pattern[:, :, columns].sum(-1).mean(-1).float().cpu().numpy()
    return total / len(samples)


def answered(
    model: cl.HookedMLLM, samples: list[cl.Sample], heads: cl.HeadSet | None, batch: int = 20
) -> float:
    """Share of samples whose digit is the likeliest of the ten, with `heads` masked."""
    digits = [
        model.tokenizer(str(digit), add_special_tokens=False)["input_ids"][-1]
        for digit in range(10)
    ]
    hooks = cl.ablate(heads, "zero") if heads else []
    right = 0
    for first in range(0, len(samples), batch):
        part = samples[first : first + batch]
        logits = model.run_with_hooks(model.prepare(part), fwd_hooks=hooks)
        likeliest = logits[:, -1, digits].argmax(-1).tolist()
        right += sum(int(s.answer) == digit for s, digit in zip(part, likeliest, strict=True))
    return right / len(samples)


def measure(scored: int, tested: int, draws: int) -> dict[str, Any]:
    """Rankings, what they have in common, and what masking them costs."""
    model = cl.load_demo(NAME, dtype="bfloat16")
    to_rank = cl.synthetic("refer", scored, seed=SEED)
    to_test = cl.synthetic("refer", tested, seed=SEED + 1)
    lists = [as_list(sample)[0] for sample in to_test]
    keys = {"question": "ram", "last": "ram[rows=last]"}
    shown = cl.score_heads(model, to_rank, list(keys.values()), batch_size=10)
    with tempfile.TemporaryDirectory() as folder:
        assemble(CHECKPOINTS / NAME, decoder_file(), Path(folder) / "bare", scale=0.0)
        bare = cl.HookedMLLM.from_pretrained(Path(folder) / "bare", dtype="bfloat16")

    def without(heads: cl.HeadSet | None) -> dict[str, float]:
        return {
            "pictures": answered(model, to_test, heads),
            "lists": answered(model, lists, heads),
            "lists, before training": answered(bare, lists, heads),
        }

    k = len(shown["ram"].top(SHARE))
    clean = without(None)
    result: dict[str, Any] = {
        "benchmark": "text_heads",
        "model": NAME,
        "scored": scored,
        "tested": tested,
        "heads_masked": k,
        "clean": clean,
        "clean_ci": {
            name: list(clopper_pearson(round(share * tested), tested).ci)
            for name, share in clean.items()
        },
        "random": [without(shown["ram"].random(k=k, seed=seed)) for seed in range(draws)],
        "rows": {},
    }
    print(result, flush=True)
    for rows, key in keys.items():
        rankings = {
            "pictures": shown[key].values.astype(float),
            "lists": ram_on_text(model, to_rank, rows),
            "lists, before training": ram_on_text(bare, to_rank, rows),
        }
        tops = {name: _top(values, k) for name, values in rankings.items()}
        names = list(rankings)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        result["rows"][rows] = {
            "top": {name: heads.to_json() for name, heads in tops.items()},
            "without_top": {name: without(heads) for name, heads in tops.items()},
            "agreement": {
                f"{a} | {b}": {
                    "spearman": float(spearmanr(rankings[a].ravel(), rankings[b].ravel())[0]),
                    "same_of_top": len(tops[a] & tops[b]) / k,
                }
                for a, b in pairs
            },
        }
        print(rows, result["rows"][rows], flush=True)
    return result


def _top(values: Float[np.ndarray, "layer head"], k: int) -> cl.HeadSet:
    order = np.argsort(-values, axis=None)[:k]
    layers, heads = np.unravel_index(order, values.shape)
    return cl.HeadSet(list(zip(layers.tolist(), heads.tolist(), strict=True)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scored", type=int, default=50)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    run = measure(options.scored, options.n, options.draws)
    options.out.write_text(json.dumps(run, indent=1) + "\n")
