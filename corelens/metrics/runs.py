"""Runs that survive: per-sample results in a folder, whole after every batch, whatever stops the process.

A run folder holds `run.json`, which says what is computed (model, metrics, samples, options), and part files
`part-<first sample>.safetensors`, each the results of one batch. A part appears by renaming, so it is there as a whole
or not at all; a run that starts again computes what is missing. Several processes may fill one folder: no two of them
take the same batch. `scores/` holds the merged result once all parts are there.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from corelens.errors import CorelensError
from corelens.inputs.pictures import Later
from corelens.inputs.prepare import Sample

FORMAT = "corelens.run/1"


class RunFolder:
    """Where the per-sample results of one run are kept.

    Args:
        path: the folder; made if it is not there.
        identity: what the run computes, JSON only; a folder that holds another run is refused.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]):
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        header = self.path / "run.json"
        if header.is_file():
            self._check(header, identity)
        elif any(self.path.glob("part-*.safetensors")):
            raise CorelensError(f"{self.path}, parts without a run.json", "a run folder", "choose another folder")
        else:
            _whole(header, lambda part: part.write_text(json.dumps(identity, indent=1, ensure_ascii=False)))

    def _check(self, header: Path, identity: dict[str, Any]) -> None:
        try:
            there = json.loads(header.read_text())
        except ValueError as error:
            raise CorelensError(f"{header}, which is no JSON", "a run.json", "choose another folder") from error
        differs = [key for key in {**there, **identity} if there.get(key) != identity.get(key)]
        if differs:
            key = differs[0]
            raise CorelensError(
                f"{self.path}, which holds a run with another {' and '.join(differs)} "
                f"({key}: {_short(there.get(key))} there, {_short(identity.get(key))} now)",
                "an empty folder, or one with the same model, metrics, samples and options",
                "choose another folder, or delete this one",
            )

    def done(self) -> set[int]:
        """The numbers of the samples whose results are there."""
        return {number for part in self._parts() for number in _samples(part)}

    def add(self, numbers: Sequence[int], results: dict[str, np.ndarray]) -> None:
        """Keep the results of one batch: `results[key]` is [sample of the batch, …]."""
        about = {"samples": json.dumps(list(numbers))}
        _whole(self.path / f"part-{numbers[0]:08d}.safetensors", lambda part: save_file(results, part, metadata=about))

    def merged(self, n: int) -> dict[str, np.ndarray]:
        """All results in the order of the samples, {key: [n, …]}."""
        found: dict[int, dict[str, np.ndarray]] = {}
        for part in self._parts():
            with safe_open(part, framework="np") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator there)
            for i, number in enumerate(_samples(part)):
                found[number] = {key: x[i] for key, x in tensors.items()}
        missing = sorted(set(range(n)) - set(found))
        if missing:
            raise CorelensError(
                f"{self.path}, in which {len(missing)} of {n} samples are missing", "all of them", "start the run again"
            )
        return {key: np.stack([found[number][key] for number in range(n)]) for key in found[0]}

    def _parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.safetensors"))


def _samples(part: Path) -> list[int]:
    try:
        with safe_open(part, framework="np") as file:
            return json.loads(file.metadata()["samples"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorelensError(
            f"{part}, which cannot be read ({error})", "a part that a run wrote", "delete it and start the run again"
        ) from error


def _whole(path: Path, write: Any) -> None:
    """Write beside the file, then rename: a reader sees all of it or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 60 else f"{text[:57]}…"


def weight_hash(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A fingerprint of a model's weights: names, shapes and 64 evenly spaced values of every parameter, SHA-256."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().flatten()
        some = flat[torch.linspace(0, max(len(flat) - 1, 0), min(64, len(flat))).long().to(flat.device)]
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sample_hash(samples: Sequence[Sample]) -> str:
    """A fingerprint of a data set: what every sample asks, answers, marks and shows (files by their paths)."""
    digest = hashlib.sha256()
    for sample in samples:
        asked = (sample.id, sample.question, sample.answer, sample.choices, [repr(region) for region in sample.regions])
        shown = (sample.video is not None, [_looks(picture) for picture in pictures(sample)])
        digest.update(repr((asked, shown)).encode())
    return digest.hexdigest()[:16]


def pictures(sample: Sample) -> list[Any]:
    """All images and frames of a sample, those of its messages too, as they were given."""
    found = [*sample.images, *([] if sample.video is None else sample.video)]
    for message in sample.messages or []:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            shown = part.get("image", part.get("video", []))
            found += (
                list(shown) if isinstance(shown, list | tuple | np.ndarray) and part.get("type") == "video" else [shown]
            )
    return [picture for picture in found if not isinstance(picture, list)]


def pixels(picture: Any) -> int:
    """The size of an image, path or array; 0 if it cannot be told without an error (which `prepare` will raise)."""
    if isinstance(picture, np.ndarray):
        return int(np.prod(picture.shape[:2]))
    if isinstance(picture, Later):
        return picture.size[0] * picture.size[1] if picture.size else 0
    try:
        with nullcontext(picture) if isinstance(picture, Image.Image) else Image.open(picture) as image:
            return image.size[0] * image.size[1]
    except (OSError, AttributeError, TypeError, ValueError):
        return 0


def _looks(picture: Any) -> str:
    if isinstance(picture, Image.Image) and getattr(picture, "filename", None):
        return f"{picture.filename} {picture.size}"  # type: ignore[attr-defined]
    if isinstance(picture, Image.Image | np.ndarray):
        shape = picture.size if isinstance(picture, Image.Image) else picture.shape
        return f"{shape} {hashlib.sha256(picture.tobytes()).hexdigest()}"
    return str(picture)
