"""A model and its processor, loaded by transformers from a folder or from the Hub."""

from pathlib import Path
from typing import Any

from corelens.errors import CorelensError

# Options of `from_pretrained` that mean the same for the model and for its processor.
SHARED = ("trust_remote_code", "revision", "local_files_only")


def load(name: str | Path, dtype: Any, device_map: Any, **options: Any) -> tuple[Any, Any]:
    """The Hugging Face model, in evaluation mode, and its processor.

    Raises CorelensError if there is no config, or if transformers cannot load one of the two.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise CorelensError(
            f"the folder {str(name)!r}",
            "a folder with a config.json, as save_pretrained writes it",
            "check the path",
        )
    # (left out, transformers asks on standard input)
    options.setdefault("trust_remote_code", False)
    shared = {key: options[key] for key in SHARED if key in options}
    try:
        hf = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, device_map=device_map, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise CorelensError(
            f"{str(name)!r}, which transformers could not load ({_said(error)})",
            "the name of a vision-language model on the Hub, or a folder with its model and "
            "processor",
            "check the name, the folder and the network; cl.list_demos() lists models that need "
            "no network",
        ) from error
    try:
        processor = AutoProcessor.from_pretrained(name, **shared)
    except (OSError, ValueError, KeyError) as error:
        raise CorelensError(
            f"{str(name)!r}, a model whose processor transformers could not load ({_said(error)})",
            "the processor's files beside the model's, as processor.save_pretrained writes them",
            "save it there; a model without a processor is wrapped by HookedMLLM(hf_model)",
        ) from error
    return hf.eval(), processor


def _said(error: Exception) -> str:
    message = str(error).splitlines()
    return f"{type(error).__name__}: {message[0] if message else ''}"
