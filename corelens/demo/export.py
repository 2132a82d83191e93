"""From a training run to a bundled checkpoint: the best weights, measured once on test scenes, with a model card."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from safetensors import safe_open

from corelens.data import synthetic
from corelens.demo import CHECKPOINTS, sha256
from corelens.demo.build import build_model, build_processor
from corelens.demo.heldout import answers, wilson

TEST_SEED = 0
_CHUNK = 100
_LOSS = 0.005  # of validation accuracy, at most, when weights are stored in bfloat16


def export_demo(
    run: str | Path, machine: str, n: int = 1000, root: Path = CHECKPOINTS, notes: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Write the best checkpoint of a run of `train_demo` into `root`/<name>, and return its card.

    Weights are stored in bfloat16 if that costs no accuracy on validation scenes. The accuracy on the card is of the
    stored weights run in float32, on `n` test scenes that neither training nor the choice of checkpoint has seen.

    Args:
        run: the folder that `train_demo` returned.
        machine: on what it was trained, in general words ("one core of a server CPU").
        n: test scenes.
        root: where the checkpoints lie.
        notes: what else a reader must know of this run, for the card.
    """
    run = Path(run)
    with safe_open(run / "best.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        info = file.metadata()
    name, recipe = info["name"], json.loads(info["recipe"])
    processor = build_processor(name)
    model = build_model(name, processor)
    _put(model, weights)
    model.eval()
    validation = synthetic("refer", recipe["check_scenes"], seed=int(info["seed"]), split="validation")
    full = _right(model, processor, validation)
    _put(model, {key: weight.bfloat16() for key, weight in weights.items()})
    small = _right(model, processor, validation)
    stored = "bfloat16" if small >= full - _LOSS * len(validation) else "float32"
    if stored == "float32":
        _put(model, weights)
    right = _right(model, processor, synthetic("refer", n, seed=TEST_SEED))

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    text: Any = model.config.text_config
    model.to(getattr(torch, stored)).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    thin = [line for line in log if line["form"] == "validation" or line["step"] % 100 < 27]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in thin))
    card = {
        "name": name,
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "stored_dtype": stored,
        "transformers": transformers.__version__,
        "training": {
            "worlds": ["refer"],
            "seed": int(info["seed"]),
            "steps": int(info["step"]),
            "hours": round(float(info["seconds"]) / 3600, 2),
            "machine": machine,
            "recipe": recipe,
            "notes": list(notes),
        },
        "chosen_by": f"accuracy on {len(validation)} validation scenes alone, every {recipe['check_every']} steps",
        "held_out": [
            {"world": "refer", "split": "validation", "n": len(validation), "accuracy": small / len(validation)},
            {
                "world": "refer",
                "split": "test",
                "seed": TEST_SEED,
                "n": n,
                "accuracy": right / n,
                "ci95": [round(x, 4) for x in wilson(right / n, n)],
            },
        ],
        "sha256": {
            path.name: sha256(path)
            for path in sorted(folder.iterdir())
            if path.suffix in {".safetensors", ".json", ".jinja"} and path.name != "card.json"
        },
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(card))
    return card


def model_card(card: dict[str, Any]) -> str:
    """The card as a page."""
    training, rows = card["training"], []
    notes = "".join(f"- {note}\n" for note in training["notes"])
    for row in card["held_out"]:
        interval = "–".join(f"{100 * x:.1f}" for x in row["ci95"]) if "ci95" in row else ""
        rows.append(f"| {row['world']} | {row['split']} | {row['n']} | {100 * row['accuracy']:.1f} % | {interval} |")
    return f"""# {card["name"]}

A {card["architecture"]} of {card["parameters"] / 1e6:.1f} million parameters ({card["layers"]} layers ×
{card["heads"]} heads, {card["kv_heads"]} KV heads), trained from scratch by CoreLens on the synthetic world
{", ".join(training["worlds"])}: "What digit is on the red circle?" on a picture of six or more coloured shapes.
It knows nothing else, and reads digits on the 16 px grid only, where that world puts them (`jitter=0`).
Licence: MIT, as CoreLens.

| world | split | scenes | exact match | 95 % interval (Wilson) |
|---|---|---|---|---|
{chr(10).join(rows)}

- Chosen by {card["chosen_by"]}; no attention head was looked at before.
- Training: {training["steps"]} steps, {training["hours"]} hours on {training["machine"]}, seed {training["seed"]};
  scenes without end from the training split, so none was seen twice. Log: `train_log.jsonl`.
{notes}- Weights are stored in {card["stored_dtype"]}; `corelens.load_demo("{card["name"]}")` runs them in float32.
- Again: `corelens train-demo {card["name"]} --seed {training["seed"]}`.
"""


def _put(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for key, weight in model.named_parameters():
        weight.data.copy_(weights[key])


def _right(model: Any, processor: Any, samples: list) -> int:
    """How many samples are answered exactly right."""
    right = 0
    for start in track(range(0, len(samples), _CHUNK), description="held out"):
        chunk = samples[start : start + _CHUNK]
        said = answers(model, processor, chunk)
        right += sum(a == sample.answer for a, sample in zip(said, chunk, strict=True))
    return right
