"""Stage A of smol-vlm: the tower and its connector learn to name what lies at each visual token.

Pictures are the worlds' own, a third of them of another size and squeezed to the tower's square as
the processor does.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from corelens.data.synthetic.refer import draw_scene, stream
from corelens.data.synthetic.refer_hard import draw_scene as hard_scene
from corelens.data.synthetic.refer_hard import paint as paint_hard
from corelens.tokens.cells import Cells
from training.smol.tower import (
    MERGE,
    PATCH,
    SIDE,
    begin_tower,
    build_probes,
    build_tower,
    dense_loss,
    words,
)

_STREAM = 1_000_008  # in the entropy of the random stream
TOKENS = SIDE // PATCH // MERGE


def cells(width: int, height: int) -> Cells:
    """The 8 × 8 tokens of a picture of any size."""
    xs, ys = np.linspace(0, width, TOKENS + 1), np.linspace(0, height, TOKENS + 1)
    boxes = [[xs[c], ys[r], xs[c + 1], ys[r + 1]] for r in range(TOKENS) for c in range(TOKENS)]
    return Cells(torch.tensor(boxes, dtype=torch.float32), torch.ones(TOKENS**2, dtype=torch.bool))


def squeeze(image: Image.Image) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3], as the image processor resizes."""
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def draw_dense(step: int, seed: int, batch: int, jitter: float) -> dict[str, np.ndarray]:
    """Pictures of one world in turn, with the labels of their tokens."""
    from training.dense import figure_labels, shape_labels, sheet

    images, labels = [], []
    for row in range(batch):
        rng = stream("train", _STREAM, seed, step, row)
        width = height = SIDE
        if rng.random() < 1 / 3:
            width, height = (int(x) for x in rng.choice([256, 288, 320], 2))
        grid, kind = cells(width, height), rng.random()
        if kind < 0.5:
            scene = draw_scene(rng, width, height, int(rng.integers(4, 9)), jitter)
            images.append(squeeze(scene.image))
            labels.append(shape_labels(scene.shapes, grid))
        elif kind < 0.8:
            hard, _ = hard_scene(rng, width, height, (4, 7), "symbol")
            images.append(squeeze(paint_hard(hard)))
            labels.append(figure_labels(hard.figures, grid))
        else:
            image, label = sheet(rng, width, height, jitter, grid)
            images.append(squeeze(image))
            labels.append(label)
    return {"images": np.stack(images), "labels": np.stack(labels)}


def see(
    out: Path,
    decoder: Any,
    tokenizer: Any,
    start: dict[str, torch.Tensor],
    steps: int,
    seed: int = 0,
) -> None:
    """Train for `steps`; state and log in `out`, resumed where they are."""
    from training.dense import LABELS
    from training.optimizer import Optimizer

    columns = {key: i for i, key in enumerate(LABELS)}
    torch.manual_seed(seed)
    tower, connector = build_tower(decoder.config)
    begin_tower(tower, start)
    probes = build_probes(LABELS)
    modules = nn.ModuleDict({"tower": tower, "connector": connector, "probes": probes})
    named = words(tokenizer, decoder.get_input_embeddings().weight.detach())
    optimizer = Optimizer(modules, 5.0, spared=nn.ModuleList([probes, connector]))
    state, step, seconds = out / "tower.safetensors", 0, 0.0
    if state.exists():
        from safetensors import safe_open

        with safe_open(state, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        step, seconds = progress["step"], progress["seconds"]
        saved = load_file(state)
        for name, weight in modules.named_parameters():
            weight.data.copy_(saved[name])
        optimizer.load_moments(
            {k.removeprefix("moment/"): v for k, v in saved.items() if k.startswith("moment/")}
        )
    began = time.time() - seconds
    while step < steps:
        jitter = (
            8.0
            * min(1.0, step / 300)
            * (1.0 if step % 2 else float(np.random.default_rng(step).random()))
        )
        batch = draw_dense(step, seed, 32, jitter)
        drawn = time.time()
        with torch.autocast("cpu", torch.bfloat16):
            loss, distance, marks = dense_loss(tower, connector, probes, batch, named, columns)
        (loss + 2 * distance).backward()
        rate = (
            1e-3
            * min(1, (step + 1) / 50)
            * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * step / steps)))
        )
        optimizer.step(rate, 1.0)
        step += 1
        if step % 25 == 0 or step == 1:
            line = {
                "step": step,
                "loss": loss.item(),
                "distance": distance.item(),
                "rate": rate,
                **marks,
            }
            line |= {"seconds": time.time() - began, "learning": time.time() - drawn}
            with open(out / "tower_log.jsonl", "a") as file:
                file.write(json.dumps({k: round(v, 4) for k, v in line.items()}) + "\n")
        if step % 200 == 0 or step == steps:
            tensors = {name: w.detach().contiguous() for name, w in modules.named_parameters()}
            tensors |= {
                f"moment/{key}": value.contiguous() for key, value in optimizer.moments().items()
            }
            info = {"progress": json.dumps({"step": step, "seconds": time.time() - began})}
            save_file(tensors, out / "tower.part", metadata=info)
            (out / "tower.part").replace(state)
