"""Options that mean the same in every command."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from corelens.errors import CorelensError, did_you_mean

Model = Annotated[str, typer.Argument(help="A bundled model, a folder, or a name on the Hub.")]
Data = Annotated[
    str,
    typer.Argument(
        help="A synthetic world, a folder with samples.jsonl, or a public set's folder."
    ),
]
Seed = Annotated[int, typer.Option(help="Of the scenes and of the random controls.", min=0)]
Fresh = Annotated[
    int, typer.Option(help="Of the scenes; not the one that heads were scored on.", min=0)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 …")]
BatchSize = Annotated[int, typer.Option(min=1)]
Metric = Annotated[
    str | None, typer.Option(help="Which of the run's metrics, say 'ram[rows=last]'.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU where there is one.")
]
Limit = Annotated[
    int | None, typer.Option(help="At most so many samples, of a folder or a world.", min=1)
]
Run = Annotated[
    Path | None,
    typer.Option(
        help="A folder that keeps what is finished; started again, the command goes on from there."
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Open the page that was written.")]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of a table.")]


def check_word(option: str, word: str, known: Iterable[str]) -> None:
    """Raise unless a word that was given to an option is one of those that it knows."""
    known = list(known)
    if word not in known:
        raise CorelensError(
            f"{option} {word}",
            f"one of {', '.join(known)}",
            did_you_mean(word, known, "choose one of these"),
        )
