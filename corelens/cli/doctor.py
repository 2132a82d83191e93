"""`corelens doctor`: what is installed here, and whether the identities hold on a model."""

import importlib.util
import json as json_module
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from corelens.cli.opening import check_model, open_model
from corelens.cli.options import Device, Dtype, Json
from corelens.errors import CorelensError

PACKAGES = (
    "corelens",
    "torch",
    "torchvision",
    "transformers",
    "tokenizers",
    "transformer-lens",
    "accelerate",
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def add_doctor(app: typer.Typer) -> None:
    """Add the command to the command line."""

    @app.command()
    def doctor(
        model: Annotated[
            str | None,
            typer.Argument(
                help="A bundled model, a folder, or a name on the Hub. [default: a bundled one]"
            ),
        ] = None,
        dtype: Dtype = "auto",
        device: Device = None,
        json: Json = False,
    ) -> None:
        """Versions, device and kernels, and a table of identities measured on a model, with pass or
        fail.

        Exits with 1 if an identity does not hold.

        Example: `corelens doctor`

        Example: `corelens doctor Qwen/Qwen3-VL-4B-Instruct --dtype bfloat16`
        """
        if model is not None:
            check_model(model)
            check_has_processor(model)
        environment = environment_here()
        if not json:
            _show_environment(environment)
        result = open_model(model or _smallest(), dtype, device).verify()
        if json:
            typer.echo(json_module.dumps({"environment": environment, **result.to_dict()}))
        else:
            _show(result)
        if not result.ok:
            raise typer.Exit(1)


def _smallest() -> str:
    """The model with the fewest parameters of those that are here."""
    from corelens.demo import list_demos, read_card

    return min(list_demos(), key=lambda name: read_card(name)["parameters"])


def check_has_processor(name: str) -> None:
    """Raise CorelensError for a folder of a model without a processor: no picture can be shown to
    it."""
    folder = Path(name)
    if (folder / "config.json").is_file() and not any(
        (folder / file).is_file() for file in PROCESSOR_FILES
    ):
        raise CorelensError(
            f"the folder {name!r}, which has a model and no processor",
            f"one of {', '.join(PROCESSOR_FILES)} in it",
            f"save the processor beside the model: processor.save_pretrained({name!r}); a model "
            "without one is checked by HookedMLLM(hf_model).verify(tensors)",
        )


def environment_here() -> dict[str, Any]:
    """Versions, the tested range, the device and the attention kernels."""
    import torch

    from corelens.hf import TESTED, untested

    cuda = torch.cuda.is_available()
    backends = torch.backends.cuda
    kernels = {
        "math": backends.math_sdp_enabled(),
        "flash": backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cudnn": backends.cudnn_sdp_enabled(),
        "flash_attn package": importlib.util.find_spec("flash_attn") is not None,
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _version(package) for package in PACKAGES},
        "tested": {
            package: f"{low} and later, before {limit}" for package, (low, limit) in TESTED.items()
        },
        "outside": untested(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": torch.cuda.device_count() if cuda else 0,
        "threads": torch.get_num_threads(),
        "kernels": [name for name, enabled in kernels.items() if enabled],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show_environment(environment: dict[str, Any]) -> None:
    table = Table("what", "here", "tested")
    table.add_row("python", environment["python"], "")
    for package, installed in environment["packages"].items():
        table.add_row(package, installed or "not installed", environment["tested"].get(package, ""))
    table.add_row("device", escape(environment["device"]), f"{environment['threads']} threads")
    table.add_row("attention kernels", ", ".join(environment["kernels"]), "")
    console = Console()
    console.print(table)
    for package in environment["outside"]:
        console.print(
            f"outside the tested range: {package}",
            style="bold yellow",
            highlight=False,
            markup=False,
        )


def _show(result: Any) -> None:
    console = Console()
    table = Table("", "identity", "error", "allowed", "", title=escape(result.model))
    for row in result.rows:
        verdict = {
            True: "[green]pass[/green]",
            False: "[bold red]FAIL[/bold red]",
            None: "not run",
        }[row.passed]
        numbers = ["" if x is None else f"{x:.2g}" for x in (row.error, row.allowed)]
        table.add_row(verdict, escape(row.name), *numbers, escape(row.note))
    console.print(table)
    if result.refused:
        console.print(f"refused: {', '.join(result.refused)}", highlight=False, markup=False)
