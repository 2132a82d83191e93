"""Training checkpoints: one safetensors file, written whole or not at all; its metadata holds what
is no tensor."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from corelens.errors import CorelensError
from training.optimizer import Optimizer

_MOMENT = "optimizer/"


def save_state(
    path: Path, modules: nn.Module, optimizer: Optimizer, progress: dict[str, Any]
) -> None:
    """Write weights, the optimizer's moments (under the weights' names) and `progress` (JSON) to
    `path`, atomically."""
    tensors = {f"weight/{name}": weight.detach() for name, weight in modules.named_parameters()}
    tensors |= {f"{_MOMENT}{key}": value for key, value in optimizer.moments().items()}
    part = path.with_suffix(".part")
    # named_parameters lists tied embeddings once, so no two tensors share storage.
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        part,
        metadata={"progress": json.dumps(progress)},
    )
    os.replace(part, path)


def read_progress(path: Path) -> dict[str, Any]:
    """The `progress` of a checkpoint."""
    return json.loads(_read(path)[1]["progress"])


def load_state(path: Path, modules: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights and moments back."""
    tensors, _ = _read(path)
    for name, weight in modules.named_parameters():
        weight.data.copy_(tensors[f"weight/{name}"])
    moments = {
        key.removeprefix(_MOMENT): value
        for key, value in tensors.items()
        if key.startswith(_MOMENT)
    }
    optimizer.load_moments(moments)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except Exception as error:
        raise CorelensError(
            f"the training checkpoint {path} cannot be read ({error})",
            "a file that train_demo wrote",
            "delete it, or train with resume=False",
        ) from error
