"""Training a demo model from scratch on one CPU core.

Stage A trains the vision tower alone on dense labels: colour, kind and digit of the object at each visual token.
Stage B trains all weights, alternating dense captions with questions, and adds objects (and pixels) as it learns.
The kept checkpoint is the one with the highest accuracy on validation scenes; no attention head is looked at.
"""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn

from corelens.data import synthetic
from corelens.data.synthetic.refer import COLOURS
from corelens.demo.batches import IGNORED, LABELS, Plan, draw_batch
from corelens.demo.build import build_model, build_processor
from corelens.demo.fast import fast_training, patches_of
from corelens.demo.heldout import accuracy
from corelens.demo.state import load_state, read_progress, save_state

LEVELS = {1: (128, 160), 2: (128, 192), 3: (160, 224), 4: (192, 256), 5: (224, 288), 6: (256, 320)}
"""Stage B's curriculum: objects in a scene → smallest and largest side in pixels. The last is the published world."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast. `stage_a`, `stage_b`: steps; `batch`, `last_batch`: scenes a step before and at the last
    level; `twins`: the share of the last level's batches whose scenes have one to three colours only."""

    stage_a: int = 1300
    stage_b: int = 2700
    batch: int = 32
    last_batch: int = 24
    rate: float = 1e-3
    warmup: int = 100
    floor: float = 0.05
    clip: float = 1.0
    ahead: int = 4
    check_every: int = 250
    check_scenes: int = 400
    first_level: int = 2
    twins: float = 0.5
    pass_caption: float = 0.75
    pass_question: float = 0.6

    @property
    def steps(self) -> int:
        return self.stage_a + self.stage_b


def train_demo(
    name: str,
    seed: int = 0,
    out: str | Path | None = None,
    steps: int | None = None,
    recipe: Recipe | None = None,
    resume: bool = True,
    stop_after: int | None = None,
    cores: tuple[int, int] | None = None,
) -> Path:
    """Train the demo model `name` and return the folder with its state, log and best weights.

    Args:
        name: a preset of `corelens.demo.build`.
        seed: of the weights and of the training scenes.
        out: the run's folder; "runs/<name>-<seed>" by default.
        steps: of both stages together, shared out as in the recipe; by default as many as the recipe has.
        recipe: lengths and rates.
        resume: go on from the folder's checkpoint if it has one; the result is that of an uninterrupted run.
        stop_after: end at this step (and leave a checkpoint), for instance to go on later.
        cores: pin training to the first CPU core and the drawing of scenes to the second. Without it scenes are drawn
            in the training process.
    """
    recipe = recipe or Recipe()
    if steps is not None:
        stage_a = round(steps * recipe.stage_a / recipe.steps)
        recipe = replace(recipe, stage_a=stage_a, stage_b=steps - stage_a)
    out = Path(out or f"runs/{name}-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    if cores:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {cores[0]})
    torch.manual_seed(seed)
    processor = build_processor(name)
    model = build_model(name, processor)
    probes = nn.ModuleDict({label: nn.Linear(model.lm_head.in_features, n + 1) for label, n in LABELS.items()})
    modules = nn.ModuleDict({"model": model, "probes": probes})
    progress: dict[str, Any] = {
        "step": 0, "seconds": 0.0, "level": recipe.first_level, "caption": [], "question": [], "best": -1.0,
        "best_step": 0, "planned": [], "recipe": asdict(recipe), "seed": seed, "name": name,
    }  # fmt: skip
    state = out / "state.safetensors"
    optimizer = _optimizer(modules, recipe, stage_b=False)
    if resume and state.exists():
        progress |= read_progress(state) | {"recipe": asdict(recipe)}
        optimizer = _optimizer(modules, recipe, stage_b=progress["step"] > recipe.stage_a)
        load_state(state, modules, optimizer)
    else:
        (out / "train_log.jsonl").unlink(missing_ok=True)
    end = min(recipe.steps, stop_after or recipe.steps)
    scenes = synthetic("refer", recipe.check_scenes, seed=seed, split="validation")
    drawer = ProcessPoolExecutor(1, get_context("spawn"), _settle, (cores[1], os.getpid())) if cores else None
    bar = Progress()
    task = bar.add_task(name, total=recipe.steps, completed=progress["step"])
    bar.start()
    try:
        batches = _batches(progress, recipe, end, drawer)
        while progress["step"] < end:
            started, step = time.time(), progress["step"]
            if step == recipe.stage_a:
                optimizer = _optimizer(modules, recipe, stage_b=True)
            stop = min(end, step - step % recipe.check_every + recipe.check_every)
            if step < recipe.stage_a:
                stop = min(stop, recipe.stage_a)
            model.train()
            with fast_training(model):
                for _ in range(step, stop):
                    _step(modules, optimizer, next(batches), progress, recipe, out, started)
                    bar.advance(task)
            progress["seconds"] += time.time() - started
            if progress["step"] > recipe.stage_a and progress["level"] >= 4 and recipe.check_scenes:
                _check(model, processor, scenes, progress, out)
                bar.update(task, description=f"{name}: {progress['level']} objects, held out {progress['best']:.1%}")
            save_state(state, modules, optimizer, progress)
    finally:
        bar.stop()
        if drawer:
            drawer.shutdown(cancel_futures=True)
    return out


def _optimizer(modules: Any, recipe: Recipe, stage_b: bool) -> torch.optim.Optimizer:
    model = modules["model"]
    weights = model.parameters() if stage_b else [*model.model.visual.parameters(), *modules["probes"].parameters()]
    return torch.optim.AdamW(weights, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def _rate(step: int, recipe: Recipe) -> float:
    """Warm-up, then a cosine to the floor, in each stage anew."""
    stage_b = step >= recipe.stage_a
    at, length = (step - recipe.stage_a, recipe.stage_b) if stage_b else (step, recipe.stage_a)
    fall = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + math.cos(math.pi * at / length))
    return recipe.rate * min(1.0, (at + 1) / recipe.warmup) * fall


def _plan(step: int, progress: dict[str, Any], recipe: Recipe) -> Plan:
    """The batch of a step. It depends on the level at the time of planning, some steps ahead of training."""
    common = {"model": progress["name"], "seed": progress["seed"], "step": step}
    if step < recipe.stage_a:
        return Plan(form="dense", objects=6, sides=(128, 192), batch=recipe.batch, **common)
    rng, level = np.random.default_rng((progress["seed"], step)), progress["level"]
    form = "caption" if step % 2 else "questions"
    last = level == max(LEVELS)
    if last and rng.random() < recipe.twins:
        # Without scenes of few colours a model settles on colour alone and guesses among equals (75 %, for 700 steps);
        # with them from the start it does not find retrieval by colour, which comes first.
        objects, colours = int(rng.integers(2, level + 1)), int(rng.integers(1, 4))
    else:
        objects, colours = (level if rng.random() < 0.75 else int(rng.integers(1, level + 1))), len(COLOURS)
    batch = recipe.last_batch if last else recipe.batch
    return Plan(form=form, objects=objects, sides=LEVELS[objects], colours=colours, batch=batch, **common)


def _batches(
    progress: dict[str, Any], recipe: Recipe, end: int, drawer: ProcessPoolExecutor | None
) -> Iterator[tuple[Plan, dict[str, np.ndarray]]]:
    """Batches in order, planned `ahead` steps before they are used; what is planned is part of the checkpoint."""

    def order(plan: Plan) -> tuple[Plan, Future | None]:
        return plan, drawer.submit(draw_batch, plan) if drawer else None

    queue = deque(order(Plan.from_json(plan)) for plan in progress["planned"])
    planned = progress["step"] + len(queue)
    while True:
        while len(queue) < recipe.ahead and planned < recipe.steps:
            queue.append(order(_plan(planned, progress, recipe)))
            planned += 1
        plan, future = queue.popleft()
        progress["planned"] = [plan.to_json() for plan, _ in queue]
        yield plan, future.result() if future else draw_batch(plan)


def _settle(core: int, parent: int) -> None:
    """The drawing process: on its own core, polite, and gone when training was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    os.sched_setaffinity(0, {core})
    os.nice(10)
    torch.set_num_threads(1)
    threading.Thread(target=watch, daemon=True).start()


def _step(
    modules: Any,
    optimizer: torch.optim.Optimizer,
    planned: tuple[Plan, dict[str, np.ndarray]],
    progress: dict[str, Any],
    recipe: Recipe,
    out: Path,
    started: float,
) -> None:
    """One step of training; writes the log every 25 steps."""
    plan, batch = planned
    step = progress["step"]
    for group in optimizer.param_groups:
        group["lr"] = _rate(step, recipe)
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss, marks = (_dense_loss if plan.form == "dense" else _text_loss)(modules, tensors)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], recipe.clip)
    optimizer.step()
    optimizer.zero_grad()
    progress["step"] = step + 1
    if plan.form != "dense":
        _climb(plan, marks["digit"], progress, recipe)
    if step % 25 < 2 or step == recipe.steps - 1:
        line = {
            "step": step + 1,
            "form": plan.form,
            "objects": plan.objects,
            "colours": plan.colours,
            "level": progress["level"],
        }
        line |= {"loss": round(loss.item(), 4)} | {key: round(value, 4) for key, value in marks.items()}
        _log(out, line | {"seconds": round(progress["seconds"] + time.time() - started, 1)})


def _visual_inputs(images: torch.Tensor) -> dict[str, torch.Tensor]:
    batch, height, width, _ = images.shape
    return {"patches": patches_of(images), "grid": torch.tensor([[1, height // 16, width // 16]] * batch)}


def _dense_loss(modules: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the three probes on every visual token; empty tokens count a fifth."""
    visual = _visual_inputs(batch["images"])
    features = modules["model"].model.visual(visual["patches"], grid_thw=visual["grid"]).pooler_output
    labels = batch["labels"].flatten(0, 1)
    loss, marks = torch.zeros(()), {}
    for i, (name, none) in enumerate(LABELS.items()):
        logits, gold = modules["probes"][name](features).float(), labels[:, i]
        there = gold != none
        weight = torch.ones(none + 1)
        weight[none] = 0.2
        loss = loss + F.cross_entropy(logits, gold, weight)
        marks[name] = (logits.argmax(-1) == gold)[there].float().mean().item()
    return loss, marks


def _text_loss(modules: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy on what the assistant says. Marks: the share of digits right, of first digits, of all words."""
    model, ids = modules["model"], batch["input_ids"]
    visual = _visual_inputs(batch["images"])
    # All rows begin with a picture of one size: the first row's positions are everyone's.
    positions, _ = model.model.get_rope_index(
        ids[:1],
        mm_token_type_ids=(ids[:1] == model.config.image_token_id).int(),
        image_grid_thw=visual["grid"][:1],
    )
    hidden = model.model(
        input_ids=ids,
        pixel_values=visual["patches"],
        image_grid_thw=visual["grid"],
        position_ids=positions.expand(3, *ids.shape),
        use_cache=False,
    ).last_hidden_state
    labels, digits = batch["labels"][:, 1:], batch["answers"][:, 1:]
    said = labels != IGNORED
    logits, gold = model.lm_head(hidden[:, :-1][said]).float(), labels[said]
    right = logits.argmax(-1) == gold
    first = digits & (digits.cumsum(1) == 1)  # later answers of a chat can be guessed by leaving out earlier ones
    marks = {key: right[mask[said]].float().mean().item() for key, mask in (("digit", digits), ("first", first))}
    marks["words"] = right.float().mean().item()
    return F.cross_entropy(logits, gold), marks


def _climb(plan: Plan, digits: float, progress: dict[str, Any], recipe: Recipe) -> None:
    """Add an object once captions and questions at the current number are good enough (mean of the last 8)."""
    if plan.objects != progress["level"] or plan.colours < len(COLOURS):
        return
    form = "caption" if plan.form == "caption" else "question"
    progress[form] = [*progress[form], digits][-8:]
    done = all(
        len(progress[key]) == 8 and sum(progress[key]) / 8 >= bar
        for key, bar in (("caption", recipe.pass_caption), ("question", recipe.pass_question))
    )
    if done and progress["level"] < max(LEVELS):
        progress |= {"level": progress["level"] + 1, "caption": [], "question": []}


def _check(model: Any, processor: Any, scenes: list, progress: dict[str, Any], out: Path) -> None:
    """Validation accuracy at the published difficulty; keeps the weights if it is the best so far."""
    model.eval()
    share = accuracy(model, processor, scenes)
    _log(out, {"step": progress["step"], "form": "validation", "level": progress["level"], "accuracy": share})
    if share >= progress["best"]:
        progress |= {"best": share, "best_step": progress["step"]}
        part = out / "best.part"
        info = {k: str(progress[k]) for k in ("step", "seconds", "best", "seed", "name")}
        info["recipe"] = json.dumps(progress["recipe"])
        save_file({name: weight.detach() for name, weight in model.named_parameters()}, part, metadata=info)
        os.replace(part, out / "best.safetensors")


def _log(out: Path, line: dict[str, Any]) -> None:
    with open(out / "train_log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
