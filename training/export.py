"""From a training run to a bundled checkpoint: the best weights, measured once on test scenes, with
a model card."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw
from rich.progress import track
from safetensors import safe_open

from corelens.data.synthetic import synthetic
from corelens.demo import NOT_KEPT, REPOSITORY, sha256
from corelens.inputs.prepare import Sample
from training.build import build_model, build_processor
from training.curve import CURVE, save_curve
from training.heldout import answers, wilson
from training.recipes import Check, as_dict, from_dict, tuples
from training.shards import SHARED, WHOLE, split_tower
from training.train import validation_scenes

_CHUNK = 100
_TEXTS = {".json", ".jinja"}
_GREY = (128, 128, 128)
_LOSS = 0.005  # of validation accuracy, at most, when weights are stored in bfloat16


def export_demo(
    run: str | Path,
    machine: str,
    n: int = 1000,
    root: Path = REPOSITORY,
    notes: tuple[str, ...] = (),
    test_seed: int = 0,
) -> dict[str, Any]:
    """Write the best checkpoint of a run of `train_demo` into `root`/<name>, and return its card.

    Weights are stored in bfloat16 if that costs no accuracy on validation scenes. The accuracy on
    the card is of the stored weights run in float32, on test scenes that neither training nor the
    choice of checkpoint has seen, and beside it controls: the picture made blank (answers must fall
    to chance), the asked digit or value alone turned into another (answers must follow), and where
    a question starts from an anchor, that one hidden under a grey box (answers that stay right did
    without it).

    Args:
        run: the folder that `train_demo` returned.
        machine: on what it was trained, in general words ("one core of a server CPU").
        n: test scenes of each check, at most (the recipe may ask for fewer).
        root: where the checkpoints lie.
        notes: what else a reader must know of this run, for the card.
        test_seed: of the test scenes. Take one that nothing was measured on: who looks twice has
            chosen by them.
    """
    run = Path(run)
    with safe_open(run / "best.safetensors", "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        info = file.metadata()
    name, recipe = info["name"], from_dict(json.loads(info["recipe"]))
    processor = build_processor(name)
    model = build_model(name, processor)
    _put(model, weights)
    model.eval()
    validation = validation_scenes(recipe, int(info["seed"]))
    scenes = sum(map(len, validation))
    _put(model, {key: weight.bfloat16() for key, weight in weights.items()})
    shares = [_mean(_right(model, processor, samples)) for samples in validation]
    stored = "bfloat16" if sum(shares) / len(shares) >= float(info["best"]) - _LOSS else "float32"
    if stored == "float32":
        _put(model, weights)
        shares = [_mean(_right(model, processor, samples)) for samples in validation]
    held_out: list[dict[str, Any]] = []
    controls: list[dict[str, Any]] = []
    for check, samples, share in zip(
        [c for c in recipe.judged if c.n], validation, shares, strict=True
    ):
        where = {"world": check.world} | ({"options": check.options} if check.options else {})
        held_out.append(where | {"split": "validation", "n": len(samples), "accuracy": share})
        samples = synthetic(check.world, min(n, check.test), seed=test_seed, **check.options)
        right = _right(model, processor, samples)
        held_out.append(
            where
            | {"split": "test", "seed": test_seed}
            | _measured(right)
            | _by_form(samples, right)
        )
        controls.append(where | _controls(model, processor, check, min(n, check.blind), test_seed))
        if hidden := [
            _hide_anchor(sample) for sample in samples if sample.meta.get("anchor") is not None
        ]:
            controls[-1]["anchor_hidden"] = _measured(_right(model, processor, hidden))

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    text: Any = model.config.text_config
    model.to(getattr(torch, stored)).save_pretrained(folder)
    processor.save_pretrained(folder)
    owner = recipe.start_tower or name
    weight_files = split_tower(folder, owner) if owner == SHARED else [WHOLE]
    for file in weight_files:
        (folder / file).chmod(0o644)
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
            "worlds": sorted({check.world for check in recipe.judged}),
            "seed": int(info["seed"]),
            "steps": int(info["step"]),
            "hours": round(float(info["seconds"]) / 3600, 2),
            "machine": machine,
            "recipe": as_dict(recipe),
            "notes": list(notes),
        },
        "chosen_by": (
            f"accuracy on {scenes} validation scenes alone, every {recipe.check_every} steps"
        ),
        "held_out": held_out,
        "controls": controls,
        "sha256": {
            file: sha256(folder / file)
            for file in [
                *weight_files,
                *sorted(path.name for path in folder.iterdir() if path.suffix in _TEXTS),
            ]
            if file != "card.json"
        },
    }
    save_curve(folder, held_out)
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(card))
    return card


def model_card(card: dict[str, Any]) -> str:
    """The card as a page."""
    training, recipe = card["training"], card["training"]["recipe"]
    rows, blind, hidden = [], [], ""
    seed = next(row["seed"] for row in card["held_out"] if row["split"] == "test")
    for row in card["held_out"]:
        rows.append(f"| {row['world']} | {_options(row)} | {_found(row, row['split'])} |")
        for form, part in row.get("forms", {}).items():
            rows.append(f"| | of these: {form} | {_found(part, row['split'])} |")
    for row in card["controls"]:
        rates = (
            f"{100 * row['blank']:.1f} % | {100 * row['follows']:.1f} % | {100 * row['stays']:.1f} "
            "%"
        )
        blind.append(f"| {row['world']} | {_options(row)} | {row['n']} | {rates} |")
        if "anchor_hidden" in row:
            part = row["anchor_hidden"]
            low, high = (f"{100 * x:.1f}" for x in part["ci95"])
            options = f" ({_options(row)})" if row.get("options") else ""
            hidden += f"""
Of {part["n"]} questions in `{row["world"]}`{options} that go by way of another shape
{100 * part["accuracy"]:.1f} % ({low}–{high}) are answered right with that shape hidden under a grey
box: what stays right did without it.
"""
    # (the shapes of these worlds lie anywhere)
    free = any(
        part.get("jitter") or part.get("world") in ("refer-hard", "compare", "hop")
        for part in recipe.get("mix", ())
    )
    grids = ["`refer` with `jitter=0`"]
    start = recipe.get("start")
    begun = f"that began as `{start}` and was trained on" if start else "trained from scratch"
    if tower := recipe.get("start_tower"):
        rest = begun if start else "all else trained from scratch"
        where = "\n(its weights lie in that model's folder)" if tower == SHARED else ""
        begun = f"whose vision tower is that of `{tower}`, unchanged{where}, and {rest}"
    if sides := recipe.get("sides"):
        grids.append(
            f"pictures of {sides[0]} px a side, which its processor cuts into tiles and does not "
            "scale"
        )
    limits = "" if free else f", and reads digits on the 16 px grid only\n({' and '.join(grids)})"
    article = ("An " if card["architecture"].startswith("I") else "A ") + card["architecture"]
    worlds = " and ".join(f"`{world}`" for world in training["worlds"])
    else_known = "What else it knows was not measured" if start else "It knows nothing else"
    shown = "" if "refer" in training["worlds"] else "shown "  # (as `video` asks)
    example = f"What digit is {shown}on the red circle?"
    if "hop" in training["worlds"]:
        example = "What digit is on the other shape of the kind of the red shape?"
    notes = "".join(f"- {note}\n" for note in training["notes"])
    after = f" after that of `{start}`" if start else ""
    first = f", after the same for `{start}`, which is not kept" if start in NOT_KEPT else ""
    return f"""# {card["name"]}

{article} of {card["parameters"] / 1e6:.1f} million parameters ({card["layers"]} layers ×
{card["heads"]} heads, {card["kv_heads"]} KV heads), {begun}
by CoreLens on {worlds} (see docs/worlds.md), for instance "{example}"
{else_known}{limits}.
Licence: MIT, as CoreLens.

| world | options | split | scenes | exact match | 95 % interval (Wilson) |
|---|---|---|---|---|---|
{chr(10).join(rows)}

![Loss of batches and accuracy on validation scenes over the steps of training]({CURVE})

Above the loss of batches (of a visual token summed over its dense labels), with the median of nine;
below the accuracy on validation scenes, which falls where harder ones join.

Does it look? With the picture made blank its answers must be right by chance alone (10 % for a
digit); with the asked symbol or value, and nothing else, turned into another, its answers must
follow.

| world | options | scenes | blank: right | turned: follows | turned: stays |
|---|---|---|---|---|---|
{chr(10).join(blind)}
{hidden}
- Chosen by {card["chosen_by"]}; no attention head was looked at before.
- Test scenes: `corelens.synthetic(world, scenes, seed={seed}, **options)`.
- Training{after}: {training["steps"]} steps, {training["hours"]} hours on
  {training["machine"]}, seed {training["seed"]};
  scenes without end from the training split, so none was seen twice. Log: `train_log.jsonl`.
{notes}- Weights are stored in {card["stored_dtype"]};
  `corelens.load_demo("{card["name"]}")` runs them in float32.
- Again: `python -m training {card["name"]} --seed {training["seed"]}`{first}.
"""


def _found(row: dict[str, Any], split: str) -> str:
    """The cells of a row on what was measured."""
    interval = "–".join(f"{100 * x:.1f}" for x in row["ci95"]) if "ci95" in row else ""
    return f"{split} | {row['n']} | {100 * row['accuracy']:.1f} % | {interval}"


def _options(row: dict[str, Any]) -> str:
    """A check's options, as the user would give them."""
    return ", ".join(f"{key}={value}" for key, value in tuples(row.get("options", {})).items())


def _controls(model: Any, processor: Any, check: Check, n: int, seed: int) -> dict[str, Any]:
    """The shares of answers that are right with blank pictures, and, where the asked digit is
    counted on by 3, that follow it, or stay what they were."""
    samples, turned = (
        synthetic(check.world, n, seed=seed, turn=turn, **check.options) for turn in (0, 3)
    )
    blanks = [
        replace(
            s,
            images=[_blank(x) for x in s.images],
            video=[_blank(x) for x in s.video] if s.video else None,
        )
        for s in samples
    ]
    answered = answers(model, processor, turned)
    return {
        "n": n,
        "blank": _mean(_right(model, processor, blanks)),
        "follows": sum(a == twin.answer for a, twin in zip(answered, turned, strict=True)) / n,
        "stays": sum(a == sample.answer for a, sample in zip(answered, samples, strict=True)) / n,
    }


def _hide_anchor(sample: Sample) -> Sample:
    """The same question where a grey box hides the shape that it starts from."""
    picture = sample.images[0].copy()
    ImageDraw.Draw(picture).rectangle(
        sample.meta["objects"][sample.meta["anchor"]]["box"], fill=_GREY
    )
    return replace(sample, images=[picture])


def _blank(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size, _GREY)


def _put(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for key, weight in model.named_parameters():
        weight.data.copy_(weights[key])


def _right(model: Any, processor: Any, samples: list[Sample]) -> list[bool]:
    """Which samples are answered exactly right."""
    answered: list[str] = []
    for start in track(range(0, len(samples), _CHUNK), description="held out"):
        answered += answers(model, processor, samples[start : start + _CHUNK])
    return [a == sample.answer for a, sample in zip(answered, samples, strict=True)]


def _mean(right: list[bool]) -> float:
    return sum(right) / len(right)


def _measured(right: list[bool]) -> dict[str, Any]:
    share, n = _mean(right), len(right)
    return {"n": n, "accuracy": share, "ci95": [round(x, 4) for x in wilson(share, n)]}


def _by_form(samples: list[Sample], right: list[bool]) -> dict[str, Any]:
    """What `_measured` tells, for each form of question where there are several."""
    parts: dict[str, list[bool]] = {}
    for sample, is_right in zip(samples, right, strict=True):
        parts.setdefault(sample.meta.get("form", ""), []).append(is_right)
    return (
        {"forms": {form: _measured(parts[form]) for form in sorted(parts)}}
        if len(parts) > 1
        else {}
    )
