"""Files of head scores: CoreLens's own, and those that three papers published. Arrays and dictionaries, no classes.

**CoreLens's format, version 1.** One safetensors file. Its tensors: `values` float32 [layer, head]; if known,
`per_sample` [sample, layer, head]; for ratio metrics `numerator` and `denominator` [sample, layer, head] instead.
Layers and heads count from 0 in the model's order, samples in the order of `meta["samples"]`. Its metadata has one
key, `corelens`: JSON `{"format": "corelens.head_scores", "version": 1, "meta": {…}}`. The same scores always give
the same bytes.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from corelens.errors import CorelensError

FORMAT, VERSION = "corelens.head_scores", 1
TENSORS = ("values", "per_sample", "numerator", "denominator")


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write one file in CoreLens's format. It appears whole or not at all, also if the process is killed."""
    header = {"format": FORMAT, "version": VERSION, "meta": meta}
    blob = save(
        {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()},
        metadata={"corelens": json.dumps(header, sort_keys=True, ensure_ascii=False, default=_plain)},
    )
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(blob)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file in CoreLens's format: (tensors by name, meta)."""
    path = _existing(path)
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("corelens", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator there)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorelensError(
            f"{path}, which cannot be read ({error})",
            "a whole safetensors file written by HeadScores.save",
            "it may be truncated or something else: write it again",
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT or "values" not in tensors:
        raise CorelensError(
            f"{path}, a safetensors file that holds no head scores",
            f"a file of the format {FORMAT}",
            "give a file that HeadScores.save wrote",
        )
    if header.get("version") != VERSION:
        raise CorelensError(
            f"{path}, in version {header.get('version')} of its format",
            f"version {VERSION}",
            "read it with the CoreLens that wrote it, or score again",
        )
    return {name: x for name, x in tensors.items() if name in TENSORS}, header["meta"]


def read_duo_attention(path: str | os.PathLike) -> Float[np.ndarray, "layer kv_head"]:
    """DuoAttention's `full_attention_heads.tsv`: a gate for each KV head, one line a layer, tabs between.

    Trained gates lie around 0 to 1 and can leave it by a little; as in the code that reads them they are clipped.
    Source: Xiao et al. 2024, arXiv 2410.10819; files in mit-han-lab/duo-attention, attn_patterns/.
    """
    path = _existing(path)
    if path.is_dir():
        path = _existing(path / "full_attention_heads.tsv")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append([float(word) for word in line.split("\t")])
        except ValueError as error:
            raise _wrong(path, f"line {number}: {error}", "numbers with tabs between, one line a layer") from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise _wrong(path, "lines of different lengths, or none", "as many numbers in every line as there are KV heads")
    return np.clip(np.array(rows, dtype=np.float32), 0, 1)


def read_layer_head_lists(
    path: str | os.PathLike,
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "sample layer head"] | None]:
    """The JSON of Retrieval_Head and of SparseMM: `{"layer-head": [one score a sample, …], …}`.

    Returns:
        values: the mean of each list, which is how both papers rank heads.
        per_sample: the lists themselves, or None if they are not all of one length.
    Sources: Wu et al. 2024, arXiv 2404.15574 (nightdessert/Retrieval_Head, head_score/*.json); Wang et al. 2025,
    arXiv 2506.05344 (CR400AF-A/SparseMM, visual_head/head_score/*.json).
    """
    path = _existing(path)
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise _wrong(path, str(error), "JSON") from error
    if not isinstance(found, dict) or not found:
        raise _wrong(path, f"a {type(found).__name__}", 'an object {"0-0": [0.1, …], "0-1": …}')
    lists: dict[tuple[int, int], np.ndarray] = {}
    for key, scores in found.items():
        name = re.fullmatch(r"(\d+)-(\d+)", key)
        if name is None:
            raise _wrong(path, f"the key {key!r}", 'keys "layer-head", for instance "12-7"')
        try:
            array = np.atleast_1d(np.asarray(scores, dtype=np.float64))  # a plain number counts as a list of one
        except (TypeError, ValueError) as error:
            raise _wrong(path, f"under {key!r}: {error}", "a list of numbers") from error
        if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
            raise _wrong(path, f"under {key!r}: {str(scores)[:60]}", "a list of one finite number or more")
        lists[int(name[1]), int(name[2])] = array
    n_layers, n_heads = (1 + max(key[i] for key in lists) for i in (0, 1))
    missing = [f"{layer}-{head}" for layer in range(n_layers) for head in range(n_heads) if (layer, head) not in lists]
    if missing:
        raise _wrong(path, f"no scores for {', '.join(missing[:5])}", f"all of {n_layers} layers × {n_heads} heads")
    ordered = [lists[layer, head] for layer in range(n_layers) for head in range(n_heads)]
    values = np.array([x.mean() for x in ordered], dtype=np.float32).reshape(n_layers, n_heads)
    if len({len(x) for x in ordered}) > 1:
        return values, None
    return values, np.stack(ordered, axis=1).astype(np.float32).reshape(-1, n_layers, n_heads)


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise CorelensError(f"{path}, which does not exist", "a file of head scores", "check the path")
    return path


def _wrong(path: Path, given: str, expected: str) -> CorelensError:
    return CorelensError(f"{path}: {given}", expected, "check that this is the file the paper's repository publishes")


def _plain(x: Any) -> Any:
    """What JSON does not know but meta may hold: numpy's numbers and arrays, paths, sets of heads."""
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    if hasattr(x, "to_json"):
        return x.to_json()
    raise TypeError(f"meta holds a {type(x).__name__}, which JSON does not know")
