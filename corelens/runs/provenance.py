"""What a result comes from: digests of everything that decides its numbers.

The identity of a run says which model (every weight, config, adapters, processor), which samples
(every pixel, text, region and piece of metadata), which metrics (an own function by its source and
all that it refers to) and which versions. Two runs of one identity give the same numbers.
"""

import dataclasses
import functools
import inspect
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from corelens.errors import CorelensError
from corelens.hf import attention_name, revision_of, source_of
from corelens.inputs.pictures import Later
from corelens.inputs.prepare import Sample
from corelens.model.projections import loaded_parameters, loaded_tensor
from corelens.runs.digest import Digest, digest, source

# --- models


def weight_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of a model's weights: names, shapes, dtypes and all values, SHA-256."""
    digests: list[tuple[str, str]] = []
    rest = iter(weights)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        # so that few offloaded weights are in memory at a time
        while batch := list(islice(rest, 16)):
            digests += pool.map(lambda pair: (pair[0], digest(pair[1])), batch)
    return digest(sorted(digests))


def all_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and kept buffer by its name; those that are offloaded are read from where
    they lie."""
    yield from loaded_parameters(module)
    saved = set(module.state_dict(keep_vars=True))
    for prefix, part in module.named_modules():
        for name, _ in part.named_buffers(recurse=False):
            if (full := f"{prefix}.{name}".lstrip(".")) in saved and (
                buffer := loaded_tensor(part, name)
            ) is not None:
                yield full, buffer


def processor_hash(processor: Any) -> str:
    """A digest of how a processor makes tensors: tokenizer, chat template, image and video
    processors."""
    total = Digest()
    for name, part in sorted(vars(processor).items() if processor is not None else ()):
        backend = getattr(part, "backend_tokenizer", None)
        if backend is not None:
            total.add((name, type(part), part.special_tokens_map, part.chat_template))
            total.add(_tokenizer(backend.to_str()))
        elif hasattr(part, "to_dict"):
            total.add((name, type(part), part.to_dict()))
        else:
            total.add((name, part))
    return total.hexdigest()


def _tokenizer(words: str) -> dict[str, Any]:
    """A tokenizer without what its last call set (padding, truncation)."""
    return {
        name: part
        for name, part in json.loads(words).items()
        if name not in ("padding", "truncation")
    }


def about(model: Any) -> dict[str, Any]:
    """What a result says of the model and the libraries that made it."""
    name = source_of(model.hf.config)
    return {
        "model": name if not Path(name).is_dir() else Path(name).name,
        "revision": revision_of(model.hf.config),
        "weight_hash": weight_hash(all_weights(model.hf)),
        "family": model.cfg.family,
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
        "versions": {
            name: version(name)
            for name in ("corelens", "torch", "transformers", "transformer-lens")
        },
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine(model: Any) -> str:
    """What the model ran on."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def model_identity(model: Any, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What of a model decides the numbers: weights, config, processor, mode, libraries.

    Args:
        model: a HookedMLLM.
        known: what `about(model)` returned, if that is at hand.
    """
    known = about(model) if known is None else known
    config = {name: x for name, x in model.hf.config.to_dict().items() if not name.startswith("_")}
    # (the folder that it was loaded from decides nothing)
    return {
        name: known[name] for name in ("model", "weight_hash", "dtype", "versions", "python")
    } | {
        "config": digest(config, attention_name(model.hf.config)),
        "processor": processor_hash(model.processor),
        "training": bool(model.hf.training),
    }


def refuse_active(model: Any) -> None:
    """Raise if hooks, a sparse plan or other rows are active on the model: a run folder cannot tell
    them apart."""
    active = [str(point.name) for point in model.hook_points() if point.active]
    held = [f"hooks on {', '.join(active[:3])}"] if active else []
    held += ["model.sparse(…)"] if getattr(model, "_sparse", None) is not None else []
    held += ["model.pattern_rows(…)"] if getattr(model, "_rows", None) is not None else []
    if held:
        raise CorelensError(
            f"out= while {' and '.join(held)} are active",
            "one of them",
            "a run folder cannot tell hooks apart: take them off (model.reset_hooks()), or leave "
            "out= away",
        )


def metric_identity(metric: Any) -> dict[str, Any]:
    """What of a metric decides the numbers: its key, and all that it is made of, functions by their
    source.

    Raises:
        CorelensError: an own function without source: two of one name could not be told apart.
    """
    for function in _functions(metric):
        if source(function) is None:
            raise CorelensError(
                f"out= with {metric.key!r}, a function without source",
                "a function whose source can be read: results of another one of this name would be "
                "taken for its own",
                "write it in a file or a notebook's cell, or leave out= away",
            )
    return {"key": metric.key, "source": digest(metric)}


def hook_identity(hooks: Iterable[Any]) -> list[list[str]]:
    """What of hooks decides the numbers: their points, and their functions by source and all that
    these close over (heads, positions, reference values).

    Raises:
        CorelensError: a function without source: two of one name could not be told apart.
    """
    identity = []
    for point, function in hooks:
        if any(source(part) is None for part in (*_functions(function), *_functions(point))):
            raise CorelensError(
                f"out= with a hook on {point!r} whose function has no source",
                "a function whose source can be read: another one could be taken for it",
                "write it in a file or a notebook's cell, or leave out= away",
            )
        identity.append([point if isinstance(point, str) else digest(point), digest(function)])
    return identity


def _functions(value: Any) -> Iterator[Any]:
    """The functions in a dataclass's fields, what is inside partial and callable objects
    included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _functions(getattr(value, field.name))
    elif isinstance(value, functools.partial):
        yield from _functions(value.func)
    elif isinstance(value, FunctionType | MethodType) or inspect.isbuiltin(value):
        yield value
    elif callable(value) and not isinstance(value, type):
        yield type(value).__call__


# --- samples


def sample_hash(samples: Sequence[Sample]) -> str:
    """A digest of a data set: all that every sample asks, answers, marks, shows and says beside
    (`meta`)."""
    total = Digest()
    for sample in samples:
        for field in dataclasses.fields(sample):
            value = getattr(sample, field.name)
            if field.name == "audio" and not len(value):
                continue  # (as before samples could hold sounds: digests stay what they were)
            total.add(field.name)
            if field.name in ("images", "video", "audio"):
                _shown(total, value)
            elif field.name == "messages":
                _chat(total, value)
            else:
                total.add(value)
    return total.hexdigest()


def _shown(total: Digest, pictures: Any) -> None:
    """A list of pictures, paths among them; frames may be one array."""
    if not isinstance(pictures, list | tuple):
        total.picture(pictures)
        return
    total.add(len(pictures))
    for picture in pictures:
        total.picture(picture)


def _chat(total: Digest, messages: Any) -> None:
    """Messages whole; what stands under "image", "video" (or "path", "url") is a picture, or
    several."""
    for message in messages or ():
        content = message.get("content")
        total.add({name: x for name, x in message.items() if name != "content"})
        if not isinstance(content, list):
            total.add(content)
            continue
        total.add(len(content))
        for part in content:
            for name, value in sorted(part.items()) if isinstance(part, dict) else [("text", part)]:
                total.add(name)
                if name in ("image", "video", "audio", "path", "url"):
                    _shown(total, value)
                else:
                    total.add(value)


def images_and_frames(sample: Sample) -> list[Any]:
    """All images and frames of a sample, those of its messages too, as they were given."""
    shown = [*sample.images, *([] if sample.video is None else sample.video)]
    for message in sample.messages or []:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if not isinstance(part, dict):
                continue
            value = part.get("image", part.get("video", []))
            if isinstance(value, list | tuple | np.ndarray) and part.get("type") == "video":
                shown += list(value)
            else:
                shown.append(value)
    return [picture for picture in shown if not isinstance(picture, list)]


def pixels(picture: Any) -> int:
    """The size of an image, path or array; 0 if it cannot be told without an error (`prepare` will
    raise it)."""
    if isinstance(picture, np.ndarray):
        return int(np.prod(picture.shape[:2]))
    if isinstance(picture, Later):
        return picture.size[0] * picture.size[1] if picture.size else 0
    try:
        with (
            nullcontext(picture)
            if isinstance(picture, Image.Image)
            else Image.open(picture) as image
        ):
            return image.size[0] * image.size[1]
    except (OSError, AttributeError, TypeError, ValueError):
        return 0
