"""Files of head scores: CoreLens's own, and those that three papers published. Arrays and
dictionaries, no classes.

**CoreLens's format, version 1.** One safetensors file. Its tensors: `values` float32 [layer, head];
if known, `per_sample` [sample, layer, head]; for ratio metrics `numerator` and `denominator`
[sample, layer, head] instead. Layers and heads count from 0 in the model's order, samples in the
order of `meta["samples"]`. Its metadata has two keys: `corelens`, JSON `{"format":
"corelens.head_scores", "version": 1, "meta": {…}}`, and `sha256`, the digest of the whole file with
zeros in the digest's place. The same scores always give the same bytes.
"""

import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from corelens.disk.checksum import open_sealed, sealed
from corelens.disk.write import write_whole
from corelens.errors import CorelensError

FORMAT, VERSION = "corelens.head_scores", 1
TENSORS = ("values", "per_sample", "numerator", "denominator")


def write(path: str | os.PathLike, tensors: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Write one file in CoreLens's format. It appears whole or not at all, also if the process is
    killed."""
    header = {"format": FORMAT, "version": VERSION, "meta": meta}
    words = json.dumps(header, sort_keys=True, ensure_ascii=False, default=_plain)
    arrays = {name: np.ascontiguousarray(x, dtype=np.float32) for name, x in tensors.items()}
    write_whole(path, sealed(arrays, {"corelens": words}))


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file in CoreLens's format: (tensors by name, meta).

    Raises:
        CorelensError: no such file, or one that is truncated, changed, or of another format or
            version.
    """
    path = _existing(path)
    header: dict[str, Any] = {}

    def check(metadata: dict[str, str]) -> None:
        header.update(_header(path, metadata.get("corelens")))

    tensors, _ = open_sealed(path, check)
    if "values" not in tensors:
        raise _no_scores(path)
    return {name: x for name, x in tensors.items() if name in TENSORS}, header["meta"]


def _header(path: Path, words: str | None) -> dict[str, Any]:
    try:
        header = json.loads(words or "null")
    except (ValueError, RecursionError):
        header = None
    if (
        not isinstance(header, dict)
        or header.get("format") != FORMAT
        or not isinstance(header.get("meta"), dict)
    ):
        raise _no_scores(path)
    if header.get("version") != VERSION:
        raise CorelensError(
            f"{path}, in version {header.get('version')} of its format",
            f"version {VERSION}",
            "read it with the CoreLens that wrote it, or score again",
        )
    return header


def _no_scores(path: Path) -> CorelensError:
    return CorelensError(
        f"{path}, a safetensors file that holds no head scores",
        f"a file of the format {FORMAT}",
        "give a file that HeadScores.save wrote",
    )


def read_duo_attention(path: str | os.PathLike) -> Float[np.ndarray, "layer kv_head"]:
    """DuoAttention's `full_attention_heads.tsv`: a gate for each KV head, one line a layer, tabs
    between.

    Trained gates lie around 0 to 1 and can leave it by a little; as in the code that reads them
    they are clipped. Source: Xiao et al. 2024, arXiv 2410.10819; files in
    mit-han-lab/duo-attention, attn_patterns/.
    """
    path = _existing(path)
    if path.is_dir():
        path = _existing(path / "full_attention_heads.tsv")
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append([float(word) for word in line.split("\t")])
        except ValueError as error:
            raise _wrong(
                path, f"line {number}: {error}", "numbers with tabs between, one line a layer"
            ) from error
    if not rows or len({len(row) for row in rows}) != 1:
        raise _wrong(
            path,
            "lines of different lengths, or none",
            "as many numbers in every line as there are KV heads",
        )
    gates = np.array(rows, dtype=np.float64)
    if not np.isfinite(gates).all():
        raise _wrong(path, "a gate that is not finite", "finite numbers")
    return np.clip(gates, 0, 1).astype(np.float32)


def read_duo_config(path: str | os.PathLike) -> dict[str, int] | None:
    """The `sink_size` and `recent_size` of DuoAttention's `config.json` beside the gates; None
    where there is none.

    Raises:
        CorelensError: a config.json without the two numbers.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    config = _json(file)
    sizes = {
        name: config.get(name) if isinstance(config, dict) else None
        for name in ("sink_size", "recent_size")
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise _wrong(
                file, f"{name} {size!r}", "sink_size and recent_size, whole numbers from 0"
            )
    return {name: int(size) for name, size in sizes.items()}  # type: ignore[arg-type]


def read_layer_head_lists(
    path: str | os.PathLike,
) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "sample layer head"] | None]:
    """The JSON of Retrieval_Head and of SparseMM: `{"layer-head": [one score a sample, …], …}`.

    Returns:
        values: the mean of each list, which is how both papers rank heads.
        per_sample: the lists themselves, or None if they are not all of one length.
    Sources: Wu et al. 2024, arXiv 2404.15574 (nightdessert/Retrieval_Head, head_score/*.json); Wang
    et al. 2025, arXiv 2506.05344 (CR400AF-A/SparseMM, visual_head/head_score/*.json).
    """
    path = _existing(path)
    content = _json(path)
    if not isinstance(content, dict) or not content:
        raise _wrong(path, f"a {type(content).__name__}", 'an object {"0-0": [0.1, …], "0-1": …}')
    lists: dict[tuple[int, int], np.ndarray] = {}
    for key, scores in content.items():
        name = re.fullmatch(r"(\d{1,6})-(\d{1,6})", key, re.ASCII)
        if name is None:
            raise _wrong(path, f"the key {key[:60]!r}", 'keys "layer-head", for instance "12-7"')
        try:
            # a plain number counts as a list of one
            array = np.atleast_1d(np.asarray(scores, dtype=np.float64))
        except (TypeError, ValueError, OverflowError) as error:
            raise _wrong(path, f"under {key!r}: {str(error)[:80]}", "a list of numbers") from error
        if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
            raise _wrong(
                path, f"under {key!r}: {str(scores)[:60]}", "a list of one finite number or more"
            )
        lists[int(name[1]), int(name[2])] = array
    n_layers, n_heads = (1 + max(numbers) for numbers in zip(*lists, strict=True))
    heads = ((layer, head) for layer in range(n_layers) for head in range(n_heads))
    if len(lists) != n_layers * n_heads:  # (before anything of that size is listed)
        missing = islice((head for head in heads if head not in lists), 5)
        names = ", ".join(f"{layer}-{head}" for layer, head in missing)
        raise _wrong(path, f"no scores for {names}", f"all of {n_layers} layers × {n_heads} heads")
    ordered = [lists[head] for head in heads]
    values = np.array([x.mean() for x in ordered], dtype=np.float32).reshape(n_layers, n_heads)
    if len({len(x) for x in ordered}) > 1:
        return values, None
    return values, np.stack(ordered, axis=1).astype(np.float32).reshape(-1, n_layers, n_heads)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _wrong(path, str(error), "a text file in UTF-8") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise _wrong(path, str(error)[:200], "JSON") from error


def _existing(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.exists():
        raise CorelensError(
            f"{path}, which does not exist", "a file of head scores", "check the path"
        )
    return path


def _wrong(path: Path, problem: str, expected: str) -> CorelensError:
    return CorelensError(
        f"{path}: {problem}",
        expected,
        "check that this is the file the paper's repository publishes",
    )


def _plain(x: Any) -> Any:
    """What JSON does not know but meta may hold: numpy's numbers and arrays, paths, sets of
    heads, functions."""
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, os.PathLike):
        return os.fspath(x)
    if hasattr(x, "to_json"):
        return x.to_json()
    if callable(x):  # an option of an own metric: its name (a run folder tells its code)
        return getattr(x, "__qualname__", type(x).__name__)
    raise CorelensError(
        f"meta that holds a {type(x).__name__}, which JSON does not know",
        "texts, numbers, lists and objects",
        "leave it out of meta, or write it as text",
    )
