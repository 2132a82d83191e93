"""What commands share: options that mean the same everywhere, and opening what these name."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from corelens.errors import CorelensError

Model = Annotated[str, typer.Argument(help="A bundled model, a folder, or a name on the Hub.")]
Data = Annotated[str, typer.Argument(help="A synthetic world, a folder with samples.jsonl, or a public set's folder.")]
Seed = Annotated[int, typer.Option(help="Of the scenes and of the random controls.", min=0)]
Fresh = Annotated[int, typer.Option(help="Of the scenes; not the one that heads were scored on.", min=0)]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 …")]
BatchSize = Annotated[int, typer.Option(min=1)]
Metric = Annotated[str | None, typer.Option(help="Which of the run's metrics.")]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")]

PICTURE = ("png", "pdf", "svg", "jpg")


def open_model(name: str, dtype: str = "auto") -> Any:
    """A HookedMLLM by name; bundled ones in float32 unless `dtype` says otherwise."""
    from corelens.demo import list_demos, load_demo
    from corelens.model.hooked import HookedMLLM

    if name in list_demos():
        return load_demo(name, dtype="float32" if dtype == "auto" else dtype)
    shared = int(os.environ.get("WORLD_SIZE", 1)) > 1  # under `accelerate launch` each process has a GPU of its own
    place = {"": int(os.environ["LOCAL_RANK"])} if shared else "auto"
    return HookedMLLM.from_pretrained(name, dtype=dtype, device_map=place if _has_gpu() else None)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def open_data(name: str, n: int, seed: int) -> Any:
    """Samples by name: `n` of a world or public set, all of a folder of your own."""
    from corelens.data import load_data
    from corelens.data.folder import FILE
    from corelens.data.public import split_options

    path = split_options(name)[0]
    own = Path(path).is_file() or Path(path, FILE).is_file()  # your own samples: all of them
    return load_data(name) if own else load_data(name, n, seed)


def open_scores(path: Path, metric: str | None) -> Any:
    """HeadScores from a run folder of `corelens score` or from one file."""
    from corelens.heads.scores import HeadScores

    if path.is_dir():
        files = {file.stem: file for file in sorted((path / "scores").glob("*.safetensors"))}
        if not files or (metric is not None and metric not in files):
            raise CorelensError(
                f"{path}" + (f" with the metric {metric!r}" if files else ""),
                f"a finished run with one of {', '.join(files)}" if files else "a finished run of `corelens score`",
                "name one of these" if files else "let the run finish: start it again with the same options",
            )
        path = files[metric or ("ram" if "ram" in files else next(iter(files)))]
    return HeadScores.load(path)


def scored_on(scores: Any, samples: Any, data: str) -> int:
    """How many of these samples the heads were scored on: a test on them says less."""
    if scores is None or scores.meta.get("data") != Path(data).name:
        return 0
    return len({sample.id for sample in samples} & set(scores.meta.get("samples", ())))


def ending(out: Path, *others: str) -> str:
    """The ending of a file to write, without its dot: a picture's, html, or one of `others`."""
    given, known = out.suffix.lower().lstrip("."), ("html", *others, *PICTURE)
    if given not in known:
        raise CorelensError(f"--out {out}", f"a file that ends in .{', .'.join(known)}", "name it so")
    return given
