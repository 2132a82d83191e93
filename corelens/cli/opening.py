"""Opening what a command's arguments name: models, samples, heads and scores."""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from corelens.cli.options import check_word
from corelens.errors import CorelensError, did_you_mean

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_model(name: str, *heads: Any) -> None:
    """Before anything is loaded: whether a model of this name can be there, and has these heads (if
    it is bundled or in a folder).

    Raises:
        CorelensError: a name that is neither a bundled model's, nor a folder, nor like a name on
            the Hub; heads that the model does not have.
    """
    from corelens.demo import CHECKPOINTS, ELSEWHERE, NOT_KEPT, checkpoint, list_demos

    if name not in list_demos() and "/" not in name and not Path(name).exists():
        if name in (*ELSEWHERE, *NOT_KEPT) or (CHECKPOINTS / name).is_dir():
            checkpoint(name)  # (says why it cannot be opened here)
        raise CorelensError(
            f"the model {name!r}",
            f"one of {', '.join(list_demos())}, a folder, or a name on the Hub (owner/name)",
            did_you_mean(name, list_demos(), "check the name"),
        )
    if Path(name).is_file():
        raise CorelensError(
            f"the model {name!r}, which is a file",
            "a model's folder",
            "give the folder of the file",
        )
    size = _layers_and_heads(name)
    if size is not None:
        for head_set in heads:
            head_set.check(*size)


def _layers_and_heads(name: str) -> tuple[int, int] | None:
    """(layers, heads) by a bundled model's card or a folder's config.json; None if they do not say
    it."""
    from corelens.demo import list_demos, read_card

    if name in list_demos():
        card = read_card(name)
        return (card["layers"], card["heads"]) if {"layers", "heads"} <= set(card) else None
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def open_model(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """A HookedMLLM by name; bundled ones in float32 on the CPU unless `dtype` and `device` say
    otherwise."""
    check_model(name)
    check_word("--dtype", dtype, DTYPES)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from corelens.demo import list_demos, load_demo
    from corelens.model.hooked import HookedMLLM

    disable_progress_bar()  # our own bars say what takes time
    if device is not None:
        _check_device(device, torch)
    if name in list_demos():
        return load_demo(
            name, dtype="float32" if dtype == "auto" else dtype, device=device or "cpu"
        )
    # under `accelerate launch` each process has a GPU of its own
    in_parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    device_map: Any = {"": int(os.environ["LOCAL_RANK"])} if in_parallel else "auto"
    device_map = device_map if torch.cuda.is_available() else None
    return HookedMLLM.from_pretrained(
        name, dtype=dtype, device_map={"": device} if device is not None else device_map
    )


def _check_device(device: str, torch: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CorelensError(
            f"--device {device}",
            "a device that is there: cpu, or cuda with a number",
            str(error).splitlines()[0],
        ) from error


def open_data(name: str, n: int, seed: int, limit: int | None = None) -> Any:
    """Samples by name: `n` of a world or public set, all of a folder of your own; of either at most
    `limit`."""
    from corelens.data import load_data
    from corelens.data.folder import FILE
    from corelens.data.public import split_options

    path = split_options(name)[0]
    own = Path(path).is_file() or Path(path, FILE).is_file()  # your own samples: all of them
    samples = load_data(name) if own else load_data(name, n, seed)
    return samples[:limit]


def named_heads(words: str | None) -> Any:
    """A HeadSet of "L3H5,L4H1"; None of None."""
    from corelens.heads.head_set import HeadSet

    return None if words is None else HeadSet(word for word in words.split(",") if word.strip())


def open_scores(path: Path, metric: str | None) -> Any:
    """HeadScores from a run folder of `corelens score` or from one file."""
    from corelens.heads.scores import HeadScores

    if path.is_dir():
        files = score_files(path)
        if metric is not None and metric not in files:
            raise CorelensError(
                f"{path} with the metric {metric!r}",
                f"a finished run with one of {', '.join(files)}",
                did_you_mean(metric, files, "name one of these"),
            )
        path = files[metric or ("ram" if "ram" in files else next(iter(files)))]
    return HeadScores.load(path)


def score_files(run: Path) -> dict[str, Path]:
    """{metric: file} of a run folder.

    Raises:
        CorelensError: no run is there, or it is not finished.
    """
    files = {unquote(file.stem): file for file in sorted((run / "scores").glob("*.safetensors"))}
    if not files:
        raise CorelensError(
            f"{run}", "a finished run of `corelens score`",
            "let the run finish: start it again with the same options",
        )  # fmt: skip
    return files


def scored_on(scores: Any, samples: Any, data: str) -> int:
    """How many of these samples the heads were scored on: a test on them says less."""
    if scores is None or scores.meta.get("data") != Path(data).name:
        return 0
    return len({sample.id for sample in samples} & set(scores.meta.get("samples", ())))
