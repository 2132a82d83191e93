"""Loading a model and its processor by transformers, with an error that says what to do where it cannot."""

from pathlib import Path
from typing import Any

import torch

from corelens.errors import CorelensError


def load(name: str | Path, dtype: str | torch.dtype, device_map: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """A Hugging Face model in eval mode, and its processor.

    Args:
        name: a folder that `save_pretrained` wrote, or a name on the Hub.
        dtype: "auto" (what the checkpoint holds), "float32", "bfloat16", …
        device_map: as in transformers.
        options: handed to transformers' `from_pretrained`.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CorelensError(
            f"the folder {str(name)!r}",
            "a folder with a config.json, as save_pretrained writes it",
            "check the path",
        )
    both = ("trust_remote_code", "revision", "local_files_only")
    shared = {key: options[key] for key in both if key in options}
    try:
        hf = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device_map, **options)
        processor = AutoProcessor.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError) as error:
        raise CorelensError(
            f"{str(name)!r}, which transformers could not load ({type(error).__name__}: {str(error).splitlines()[0]})",
            "the name of a vision-language model on the Hub, or a folder with its model and processor",
            "check the name, the folder and the network; cl.list_demos() lists models that need no network",
        ) from error
    return hf.eval(), processor
