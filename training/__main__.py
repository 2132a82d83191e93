"""`python -m training NAME`: train a demo model as its recipe says."""

import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from training.export import export_demo
from training.smol.run import export_smol, train_smol
from training.train import place, train_demo


def main(
    name: Annotated[str, typer.Argument(help="Which model: an entry of `training.build.PRESETS`.")],
    seed: Annotated[int, typer.Option(help="Of the weights and of the training scenes.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; it resumes from there.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Fewer or more steps than the recipe.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Measure it on held-out scenes, and write the model here.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda …; by default a GPU where there is one.")
    ] = None,
) -> None:
    """Train a demo model as its recipe says (resumable; its card says how long that took and
    where).

    Example: `python -m training qwen3vl-s --seed 0 --out runs/mine --export models`
    """
    machine = platform.processor() or platform.machine()
    if name == "smol-vlm":
        run = train_smol(out or Path(f"runs/{name}-{seed}"), seed, steps)
        print(f"trained: {run}")
        if export is not None:
            export_smol(run, machine, export)
        return
    where = place(device)
    run = train_demo(name, seed=seed, out=out, steps=steps, device=str(where))
    print(f"trained: {run}")
    if export is not None:
        if where.type == "cuda":
            machine = torch.cuda.get_device_name(where)
        card = export_demo(run, machine=machine, root=export)
        print(f"written: {export / name}, held-out accuracy {card['held_out'][-1]['accuracy']:.3f}")


if __name__ == "__main__":
    typer.run(main)
