"""The demo models: small, really trained, offline. `load_demo` opens one.

Some come with the wheel; the others lie in `training/models` of the repository, and are found there
in a checkout. How they were made is in `training/`.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corelens.demo.files import sha256
from corelens.errors import CorelensError, did_you_mean

if TYPE_CHECKING:
    from corelens.model.hooked import HookedMLLM

CHECKPOINTS = Path(__file__).parent / "checkpoints"
REPOSITORY = Path(__file__).parents[2] / "training" / "models"
"""Where further models lie in a checkout; absent where CoreLens was installed from its wheel."""
DEFAULT = "qwen3vl-qs"
"""The README's model, and that of `corelens demo`."""
ELSEWHERE = (
    "qwen3vl-hop", "qwen3vl-hop-l", "qwen3vl-hop-s", "qwen3vl-l", "qwen3vl-m", "qwen3vl-q-compare",
    "qwen3vl-s", "qwen3vl-s-video",
)  # fmt: skip
"""The models of `REPOSITORY`."""
NOT_KEPT = (
    "internvl-s", "llava-ov-s", "qwen3vl-hop-control", "qwen3vl-q", "qwen3vl-q-hop",
    "qwen3vl-qs-control", "qwen3vl-s-all", "qwen3vl-s-long",
)  # fmt: skip
"""Models that are not kept: `training/cards` of the repository says what was measured."""


def list_demos() -> list[str]:
    """The names that `load_demo` can load here: the models whose checkpoints are in this
    installation or checkout, and `smol-vlm` where the extra `smol` is installed or the model was
    put together before."""

    from corelens.demo import smol  # (it needs torch)

    folders = {
        path.parent for root in (CHECKPOINTS, REPOSITORY) for path in root.glob("*/card.json")
    }
    return sorted(
        folder.name for folder in folders if not _in_parts(folder) or smol.available(folder)
    )


def load_demo(
    name: str = DEFAULT,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | dict[str, Any] | None = None,
) -> "HookedMLLM":
    """A trained demo model, wrapped. Nothing is downloaded. Of a photograph it warns that it knows
    none. The first call for `smol-vlm` puts it together in the user's cache (see
    `corelens.demo.smol`), and says so.

    Args:
        name: one of `list_demos()`; the README's model by default.
        dtype: of the weights once loaded, as torch names it.
        device: where to put the model; ignored when `device_map` is given.
        device_map: as in transformers' `from_pretrained`, for instance "auto".

    Raises:
        CorelensError: for an unknown name, for a checkpoint with a missing or changed file, and for
            `smol-vlm` without the extra `smol` or without room in the cache.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from corelens.demo.foreign import DemoMLLM

    folder = checkpoint(name)
    placed_on = {"": device} if device_map is None else device_map
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, device_map=placed_on, **here
    )
    demo = DemoMLLM(model.eval(), AutoProcessor.from_pretrained(folder, **here))
    demo.worlds = tuple(read_card(name)["training"]["worlds"])
    return demo


def checkpoint(name: str, root: Path | None = None) -> Path:
    """The folder of a demo model, as `save_pretrained` wrote it (of `smol-vlm`: in the cache, where
    it is put together if it is not there), after its files' checksums were found right."""

    from corelens.demo import smol  # (it needs torch)

    folder = _folder(name, root)
    if folder is None and root is None and name in ELSEWHERE:
        raise CorelensError(
            f"demo model {name!r}, which is not in this installation",
            f"one of {', '.join(list_demos())}",
            "it lies in the repository, in training/models: install CoreLens from a checkout (pip "
            "install -e .), or give its folder there to HookedMLLM.from_pretrained",
        )
    if folder is None and root is None and name in NOT_KEPT:
        raise CorelensError(
            f"demo model {name!r}, which is not kept",
            f"one of {', '.join(list_demos())}",
            f"train it in a checkout of the repository: python -m training {name} "
            f"--export training/models; what was measured of it is in training/cards/{name}.json",
        )
    if folder is None:
        known = (
            list_demos()
            if root is None
            else sorted(path.parent.name for path in root.glob("*/card.json"))
        )
        raise CorelensError(
            f"demo model {name!r}",
            f"one of {', '.join(known) or '(none is installed)'}",
            did_you_mean(name, known, _repair(name)),
        )
    for file, expected in read_card(name, root)["sha256"].items():
        path = folder / file
        if not path.exists():
            raise CorelensError(
                f"{file} of demo model {name!r} is missing", "every file of its card", _repair(name)
            )
        actual = sha256(path)
        if actual != expected:
            raise CorelensError(
                f"{file} of demo model {name!r} has SHA-256 {actual[:16]}…",
                f"{expected[:16]}…",
                _repair(name),
            )
    return smol.assembled(folder) if _in_parts(folder) else folder


def read_card(name: str, root: Path | None = None) -> dict[str, Any]:
    """A demo model's card: how it was trained, and its held-out accuracy."""
    try:
        return json.loads(((_folder(name, root) or CHECKPOINTS / name) / "card.json").read_text())
    except (OSError, ValueError) as error:
        raise CorelensError(
            f"the card of demo model {name!r} ({error})", "a readable card.json", _repair(name)
        ) from error


def _in_parts(folder: Path) -> bool:
    """Whether the folder holds what was trained alone, without the decoder."""
    from corelens.demo import smol  # (it needs torch)

    return (folder / smol.TRAINED).exists()


def _folder(name: str, root: Path | None) -> Path | None:
    """The folder below `root`, or of this installation or checkout, that holds a model's card."""
    folders = [parent / name for parent in ([root] if root else [CHECKPOINTS, REPOSITORY])]
    return next((folder for folder in folders if (folder / "card.json").exists()), None)


def _repair(name: str) -> str:
    return (
        "install corelens again to get its bundled models, or in a checkout of the repository "
        f"train one: python -m training {name}"
    )


__all__ = [
    "CHECKPOINTS",
    "REPOSITORY",
    "checkpoint",
    "list_demos",
    "load_demo",
    "read_card",
    "sha256",
]
