"""Full heads for a serving engine: JSON that names, layer by layer, which heads attend to
everything.

    {"format": "corelens.full_heads/1", "model": …, "n_layers": L, "n_heads": H, "n_kv_heads": G,
     "full_heads": {"0": [3, 7], "1": []}, "full_kv_heads": {"0": [1], "1": []},
     "pattern": {"sink": 128, "window": 1024}, "source": …}

Layers and heads count from 0, in the model's order (the order of `q_proj`'s rows). Every layer is
named, one without full heads with an empty list. A KV head is full if any of its query heads is: an
engine that saves KV cache can save no other.

No serving engine reads this file by itself: see docs/howto/sparse.md for what theirs expect.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corelens.disk.write import write_whole
from corelens.errors import CorelensError
from corelens.heads.head_set import HeadSet

FORMAT = "corelens.full_heads/1"


def full_heads(
    heads: Iterable[Any],
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    pattern: Mapping[str, int] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """What `write_full_heads` writes, as a dictionary.

    Args:
        heads: the heads that attend to everything.
        n_layers, n_heads, n_kv_heads: the model's shape.
        pattern: what the others see, for instance {"sink": 128, "window": 1024}.
        about: what else is to be known (the model's name, the score, JSON only).
    Raises:
        CorelensError: heads that the model does not have; heads that do not divide into KV heads.
    """
    head_set = heads if isinstance(heads, HeadSet) else HeadSet(heads)
    head_set.check(n_layers, n_heads)
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise CorelensError(
            f"{n_heads} heads and {n_kv_heads} KV heads",
            "as many heads for each KV head",
            "see the model's config",
        )
    of_layer, group = head_set.by_layer(), n_heads // n_kv_heads
    numbers = {layer: sorted(of_layer.get(layer, [])) for layer in range(n_layers)}
    return {
        "format": FORMAT,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "full_heads": {str(layer): full for layer, full in numbers.items()},
        "full_kv_heads": {
            str(layer): sorted({head // group for head in full}) for layer, full in numbers.items()
        },
        "pattern": None if pattern is None else dict(pattern),
        **about,
    }


def write_full_heads(
    path: str | os.PathLike, heads: Iterable[Any], cfg: Any, **options: Any
) -> None:
    """Write the full heads of a model as JSON.

    Args:
        path: the file.
        heads: the heads that attend to everything.
        cfg: `model.cfg`, whose shape it is.
        options: `pattern` and what else is to be known, see `full_heads`.
    """
    made = full_heads(heads, cfg.n_layers, cfg.n_heads, cfg.n_kv_heads, **options)
    write_whole(path, json.dumps(made, indent=1, ensure_ascii=False))


def read_full_heads(path: str | os.PathLike) -> HeadSet:
    """The full heads of a file that `write_full_heads` wrote.

    Raises:
        CorelensError: it is no such file.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(stored["format"])
        heads = [
            (int(layer), head) for layer, full in stored["full_heads"].items() for head in full
        ]
        head_set = HeadSet(heads)
        head_set.check(stored["n_layers"], stored["n_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorelensError(
            f"{path}, which cannot be read ({type(error).__name__}: {error})",
            f"a file of the format {FORMAT}",
            "write it with write_full_heads",
        ) from error
    return head_set
