"""Training a demo model on one CPU core or on a GPU, from scratch or from a bundled model (its
recipe says which).

Stage A trains the vision tower alone on dense labels: what object lies at each visual token and
what stands on it, key and value of the line there, and where the token lies. Stage B trains all
weights, alternating dense captions with questions, and adds objects (and pixels) as it learns;
where a recipe says so some batches still have dense labels, judged by the probes as stage A left
them. The kept checkpoint is the one with the highest accuracy on validation scenes; no attention
head is looked at.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from corelens.data.synthetic import synthetic
from corelens.data.synthetic.refer import COLOURS
from corelens.demo import checkpoint
from corelens.errors import CorelensError
from corelens.inputs.prepare import Sample
from training.batches import Plan, draw_batch
from training.blind import HeadDropout, Sight, answered_at, is_blind, share_blind
from training.build import build_model, build_processor
from training.dense import IGNORED, LABELS
from training.families import family_of
from training.fast import fast_training
from training.heldout import accuracy
from training.optimizer import Optimizer
from training.qk_clip import QKClip
from training.recipes import LEVELS, RECIPES, RETRIEVES, Recipe, as_dict, learning_rate, plan_step
from training.state import load_state, read_progress, save_state


def train_demo(
    name: str,
    seed: int = 0,
    out: str | Path | None = None,
    steps: int | None = None,
    recipe: Recipe | None = None,
    resume: bool = True,
    stop_after: int | None = None,
    cores: tuple[int, int] | None = None,
    device: str | None = None,
) -> Path:
    """Train the demo model `name` and return the folder with its state, log and best weights.

    Args:
        name: a preset of `training.build`.
        seed: of the weights and of the training scenes.
        out: the run's folder; "runs/<name>-<seed>" by default.
        steps: of both stages together, shared out as in the recipe; by default as many as the
            recipe has. (What begins or ends at a step of its own, as slices of a mix do, stays
            there.)
        recipe: lengths, rates and what to train on; by default the model's entry in `RECIPES`.
        resume: go on from the folder's checkpoint if it has one; on a CPU the result is that of an
            uninterrupted run.
        stop_after: end at this step (and leave a checkpoint), for instance to go on later.
        cores: pin training to the first CPU core and the drawing of scenes to the second. Without
            it scenes are drawn in the training process.
        device: "cpu", "cuda" …; by default a GPU where there is one. Products of matrices are of
            bfloat16 on either, weights and their moments of float32. A run may go on elsewhere than
            where it began.
    """
    where = place(device)
    recipe = recipe or RECIPES.get(name, Recipe())
    if steps is not None:
        stage_a = round(steps * recipe.stage_a / recipe.steps)
        recipe = replace(recipe, stage_a=stage_a, stage_b=steps - stage_a)
    out = Path(out or f"runs/{name}-{seed}")
    out.mkdir(parents=True, exist_ok=True)
    if cores:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {cores[0]})
    torch.manual_seed(seed)
    processor: Any = build_processor(name)
    model = build_model(name, processor)
    if recipe.start:
        _begin_with(model, [model], checkpoint(recipe.start))
    if recipe.start_tower:
        _begin_with(model, family_of(model).tower(model), checkpoint(recipe.start_tower))
    probes = nn.ModuleDict(
        {label: nn.Linear(model.lm_head.in_features, n + 1) for label, n in LABELS.items()}
    )
    modules = nn.ModuleDict({"model": model, "probes": probes}).to(where)
    progress: dict[str, Any] = {
        "step": 0,
        "seconds": 0.0,
        "level": recipe.first_level,
        "caption": [],
        "question": [],
        "best": -1.0,
        "best_step": 0,
        "skipped": 0,
        "planned": [],
        "recipe": as_dict(recipe),
        "seed": seed,
        "name": name,
    }
    state = out / "state.safetensors"
    optimizer = _optimizer(modules, recipe, step=0)
    if resume and state.exists():
        progress |= read_progress(state) | {"recipe": as_dict(recipe)}
        optimizer = _optimizer(modules, recipe, progress["step"] - 1)
        load_state(state, modules, optimizer)
    else:
        (out / "train_log.jsonl").unlink(missing_ok=True)
    learns = 0 if recipe.start_tower else recipe.stage_b if recipe.rests is None else recipe.rests
    still = recipe.stage_a + learns  # from this step on the tower stays as it is
    qk_clip = QKClip(model, recipe.logits) if recipe.logits else None
    sight = Sight(
        processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    )
    text: Any = model.config.text_config
    dropout = HeadDropout(model.model.language_model, text.num_attention_heads, recipe.dropped)
    scenes = validation_scenes(recipe, seed)
    drawer = (
        ProcessPoolExecutor(1, get_context("spawn"), _settle, (cores[1], os.getpid()))
        if cores
        else None
    )
    bar = Progress()
    task = bar.add_task(name, total=recipe.steps, completed=progress["step"])
    bar.start()
    try:
        batches = _batches(progress, recipe, drawer)
        while progress["step"] < (end := _end(progress, recipe, stop_after)):
            started, step = time.time(), progress["step"]
            if step == recipe.stage_a:
                optimizer = _optimizer(modules, recipe, step)
            probes.requires_grad_(step < recipe.stage_a)  # in stage B they stay as they are
            for part in family_of(model).tower(model):
                part.requires_grad_(step < still)
            stop = min(end, step - step % recipe.check_every + recipe.check_every)
            stop = min(turn for turn in (recipe.stage_a, still, stop) if turn > step)
            model.train()
            with fast_training(model, sight.mask):
                for _ in range(step, stop):
                    _step(modules, optimizer, next(batches), progress, recipe, out, started, sight)
                    if qk_clip:
                        qk_clip.step()
                    bar.advance(task)
            progress["seconds"] += time.time() - started
            if (
                progress["step"] > recipe.stage_a
                and (progress["level"] >= 4 or recipe.start)
                and scenes
            ):
                shares = _check(model, processor, scenes, progress, out)
                if step + progress["skipped"] < recipe.retrieval and shares[0] >= RETRIEVES:
                    progress |= {"skipped": recipe.retrieval - progress["step"], "planned": []}
                    batches = _batches(progress, recipe, drawer)
                bar.update(
                    task,
                    description=(
                        f"{name}: {progress['level']} objects, held out {progress['best']:.1%}"
                    ),
                )
            save_state(state, modules, optimizer, progress)
    finally:
        bar.stop()
        dropout.close()
        if qk_clip:
            qk_clip.close()
        if drawer:
            drawer.shutdown(cancel_futures=True)
    return out


def place(device: str | None) -> torch.device:
    """A device by name, or the best there is."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CorelensError(
            f"device={name!r}",
            "a device that torch can use here",
            "leave the device out: a GPU where there is one, else the CPU",
        ) from error


def validation_scenes(recipe: Recipe, seed: int) -> list[list[Sample]]:
    """The scenes that choose the checkpoint: a list for each check."""
    lists = [
        synthetic(c.world, c.n, seed=seed, split="validation", **c.options) for c in recipe.judged
    ]
    return [samples for samples in lists if samples]


def _begin_with(model: nn.Module, parts: list[nn.Module], folder: Path) -> None:
    """Put a bundled model's weights into these parts of a model."""
    # (files may use other names than modules do, as InternVL's)
    bundled = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    weights = dict(bundled.named_parameters())
    begun = {id(weight) for part in parts for weight in part.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in begun:
            weight.data.copy_(weights[name])


def _optimizer(modules: Any, recipe: Recipe, step: int) -> Optimizer:
    """Of what a step trains: in stage A the tower and its probes, then the whole model."""
    model, probes = modules["model"], modules["probes"]
    if step >= recipe.stage_a:
        return Optimizer(model, recipe.muon)
    seeing = nn.ModuleDict(
        {"model": nn.ModuleList(family_of(model).tower(model)), "probes": probes}
    )
    return Optimizer(seeing, recipe.muon, spared=probes)


def _batches(
    progress: dict[str, Any], recipe: Recipe, drawer: ProcessPoolExecutor | None
) -> Iterator[tuple[Plan, dict[str, np.ndarray]]]:
    """Batches in order, planned `ahead` steps before they are used; what is planned is part of the
    checkpoint."""

    def order(plan: Plan) -> tuple[Plan, Future | None]:
        return plan, drawer.submit(draw_batch, plan) if drawer else None

    queue = deque(order(Plan.from_json(plan)) for plan in progress["planned"])
    planned = progress["step"] + len(queue)
    while True:
        while len(queue) < recipe.ahead and planned + progress["skipped"] < recipe.steps:
            queue.append(order(plan_step(planned, progress, recipe)))
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
    optimizer: Optimizer,
    planned: tuple[Plan, dict[str, np.ndarray]],
    progress: dict[str, Any],
    recipe: Recipe,
    out: Path,
    started: float,
    sight: Sight,
) -> None:
    """One step of training; writes the log every 25 steps."""
    plan, batch = planned
    step = progress["step"]
    clock = step + progress["skipped"]
    where = modules["model"].device
    tensors = {key: torch.from_numpy(value).to(where) for key, value in batch.items()}
    if not recipe.first_steps:
        tensors.pop("found", None)
    sight.open()
    share = share_blind(clock - recipe.stage_a, recipe.blind, recipe.opens, recipe.opened)
    if plan.form == "questions" and is_blind(step, progress["seed"], share):
        sight.close(tensors["input_ids"])
    with torch.autocast(where.type, torch.bfloat16):
        if plan.form == "dense":
            loss, marks = _dense_loss(modules, tensors)
        else:
            loss, marks = _text_loss(modules, tensors, sight if sight.mask() is not None else None)
    loss.backward()
    sight.open()
    optimizer.step(learning_rate(clock, recipe), recipe.clip)
    progress["step"] = step + 1
    if plan.form != "dense":
        _climb(plan, marks["digit"], progress, recipe)
    if step % 25 < 2 or clock == recipe.steps - 1:
        line = {
            "step": step + 1,
            "form": plan.form,
            "world": plan.world,
            "objects": plan.objects,
            "colours": plan.colours,
            "level": progress["level"],
        }
        line |= {"loss": round(loss.item(), 4)} | {
            key: round(value, 4) for key, value in marks.items()
        }
        _log(out, line | {"seconds": round(progress["seconds"] + time.time() - started, 1)})


def _dense_loss(
    modules: Any, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy of the probes, one a label, on every visual token; empty tokens count a
    fifth."""
    model = modules["model"]
    features = family_of(model).features(model, batch["images"])
    labels = batch["labels"].flatten(0, 1)
    loss, marks = features.new_zeros((), dtype=torch.float32), {}
    for i, (name, none) in enumerate(LABELS.items()):
        logits, gold = modules["probes"][name](features).float(), labels[:, i]
        if (gold == IGNORED).all():
            continue
        labelled = (gold != none) & (gold != IGNORED)
        weight = logits.new_ones(none + 1)
        weight[none] = 0.2
        loss = loss + F.cross_entropy(logits, gold, weight)
        marks[name] = (logits.argmax(-1) == gold)[labelled].float().mean().item()
    return loss, marks


def _text_loss(
    modules: Any, batch: dict[str, torch.Tensor], sight: Sight | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy on what the assistant says; in a blind batch (which has a `sight`) half as much
    again on answers as the last tokens of their questions foretell them, and in one that has what
    first steps "found" half as much on that, as the decoder's first half holds it. Marks: the share
    of digits right, of first digits, of all words.
    """
    model, ids = modules["model"], batch["input_ids"]
    inputs = family_of(model).inputs(model, ids, batch["images"])
    decoder = model.model.language_model
    with _halfway(decoder) as middle:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    labels, digits = batch["labels"][:, 1:], batch["answers"][:, 1:]
    spoken = labels != IGNORED
    logits, gold = model.lm_head(hidden[:, :-1][spoken]).float(), labels[spoken]
    right = logits.argmax(-1) == gold
    # later answers of a chat can be guessed by leaving out earlier ones
    first = digits & (digits.cumsum(1) == 1)
    marks = {
        key: right[mask[spoken]].float().mean().item()
        for key, mask in (("digit", digits), ("first", first))
    }
    marks["words"] = right.float().mean().item()
    loss = F.cross_entropy(logits, gold)
    if "found" in batch:
        named = batch["found"] != IGNORED
        logits, gold = model.lm_head(decoder.norm(middle[0][named])).float(), batch["found"][named]
        marks["found"] = (logits.argmax(-1) == gold).float().mean().item()
        loss = loss + 0.5 * F.cross_entropy(logits, gold)
    if sight is not None:
        rows, positions, golds = answered_at(sight.asked(ids), batch["answers"])
        foretold = model.lm_head(hidden[rows, positions]).float()
        marks["foretold"] = (foretold.argmax(-1) == ids[rows, golds]).float().mean().item()
        loss = loss + 0.5 * F.cross_entropy(foretold, ids[rows, golds])
    return loss, marks


@contextmanager
def _halfway(decoder: Any) -> Iterator[list[torch.Tensor]]:
    """A list that gets the residual stream behind the first half of the layers when they run."""
    seen: list[torch.Tensor] = []
    hook = decoder.layers[len(decoder.layers) // 2 - 1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    try:
        yield seen
    finally:
        hook.remove()


def _climb(plan: Plan, digits: float, progress: dict[str, Any], recipe: Recipe) -> None:
    """Add an object once captions and questions at the current number are good enough (mean of the
    last 8)."""
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


def _check(
    model: Any, processor: Any, scenes: list[list[Sample]], progress: dict[str, Any], out: Path
) -> list[float]:
    """Validation accuracy of each check; keeps the weights if their mean is the best so far."""
    model.eval()
    shares = [accuracy(model, processor, samples) for samples in scenes]
    share = sum(shares) / len(shares)
    line = {
        "step": progress["step"],
        "form": "validation",
        "level": progress["level"],
        "accuracy": share,
    }
    _log(out, line | ({"each": shares} if len(shares) > 1 else {}))
    if share >= progress["best"]:
        progress |= {"best": share, "best_step": progress["step"]}
        part = out / "best.part"
        info = {k: str(progress[k]) for k in ("step", "seconds", "best", "seed", "name")}
        info["recipe"] = json.dumps(progress["recipe"])
        save_file(
            {name: weight.detach() for name, weight in model.named_parameters()},
            part,
            metadata=info,
        )
        os.replace(part, out / "best.safetensors")
    return shares


def _end(progress: dict[str, Any], recipe: Recipe, stop_after: int | None) -> int:
    """The step at which to stop: where the recipe does, less what was skipped of it."""
    last = recipe.steps - progress["skipped"]
    return min(last, stop_after or last)


def _log(out: Path, line: dict[str, Any]) -> None:
    with open(out / "train_log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
