"""The bundled demo models: small, really trained, offline. `load_demo` opens one; `train.py` is how they were made."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corelens.errors import CorelensError

if TYPE_CHECKING:
    from corelens.model.hooked import HookedMLLM

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DEFAULT = "qwen3vl-s"  # the model of `corelens demo`


def list_demos() -> list[str]:
    """The names that `load_demo` knows: the models whose checkpoints are in this installation."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/card.json"))


def load_demo(
    name: str, dtype: str = "float32", device: str = "cpu", device_map: str | dict[str, Any] | None = None
) -> "HookedMLLM":
    """A bundled, trained demo model, wrapped. Nothing is downloaded. Of a photograph it warns that it knows none.

    Args:
        name: one of `list_demos()`, for instance "qwen3vl-s".
        dtype: of the weights once loaded, as torch names it.
        device: where to put the model; ignored when `device_map` is given.
        device_map: as in transformers' `from_pretrained`, for instance "auto".

    Raises:
        CorelensError: for an unknown name, and for a checkpoint with a missing or changed file.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from corelens.demo.foreign import DemoMLLM

    folder = checkpoint(name)
    place = {"": device} if device_map is None else device_map
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, local_files_only=True, device_map=place)
    return DemoMLLM(model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True))


def checkpoint(name: str, root: Path | None = None) -> Path:
    """The folder of a demo model, as `save_pretrained` wrote it, after its files' checksums were found right."""
    root = root or CHECKPOINTS
    folder = root / name
    if not (folder / "card.json").exists():
        known = sorted(path.parent.name for path in root.glob("*/card.json"))
        raise CorelensError(
            f"demo model {name!r}", f"one of {', '.join(known) or '(none is installed)'}", _repair(name)
        )
    for file, expected in read_card(name, root)["sha256"].items():
        path = folder / file
        if not path.exists():
            raise CorelensError(f"{file} of demo model {name!r} is missing", "every file of its card", _repair(name))
        found = sha256(path)
        if found != expected:
            raise CorelensError(
                f"{file} of demo model {name!r} has SHA-256 {found[:16]}…", f"{expected[:16]}…", _repair(name)
            )
    return folder


def read_card(name: str, root: Path | None = None) -> dict[str, Any]:
    """A demo model's card: how it was trained, and its held-out accuracy."""
    try:
        return json.loads(((root or CHECKPOINTS) / name / "card.json").read_text())
    except (OSError, ValueError) as error:
        raise CorelensError(
            f"the card of demo model {name!r} ({error})", "a readable card.json", _repair(name)
        ) from error


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _repair(name: str) -> str:
    return f"install corelens again to get its bundled models, or train one: corelens train-demo {name}"


__all__ = ["CHECKPOINTS", "checkpoint", "list_demos", "load_demo", "read_card", "sha256"]
