"""`python -m training smol-vlm`: both stages of smol-vlm, and its export."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from corelens.demo import CHECKPOINTS, checkpoint
from corelens.demo.smol import build_tokenizer, decoder_file, decoder_weights
from training.smol.card import measured, write_card
from training.smol.export import build_config, write_trained
from training.smol.see import see
from training.smol.speak import speak

SEEING, SPEAKING = 1200, 1300
"""Steps of stage A and of stage B."""


def train_smol(out: Path, seed: int = 0, steps: int | None = None) -> Path:
    """Train smol-vlm on one CPU core, from where the folder's checkpoints end; returns the folder.

    Args:
        out: the run's folder.
        seed: of the fresh weights and of the training scenes.
        steps: of stage B; by default as many as the recipe has.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    decoder, tokenizer = open_decoder()
    start = load_file(checkpoint("qwen3vl-m") / "tower.safetensors")
    see(out, decoder, tokenizer, start, SEEING, seed)
    speak(out, decoder, tokenizer, steps or SPEAKING, seed)
    return out


def export_smol(run: Path, machine: str, root: Path = CHECKPOINTS) -> dict[str, Any]:
    """Write the best checkpoint's trained part with its card into `root`/smol-vlm, and measure it
    if that is where `load_demo` finds it."""
    folder = root / "smol-vlm"
    write_trained(run, folder)
    card = write_card(run, folder, {"machine": machine})
    return measured(folder, 200, 60, 100) if root == CHECKPOINTS else card


def open_decoder() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct from its package, in bfloat16, and its tokenizer."""
    from transformers import LlamaForCausalLM

    file = decoder_file()
    with tempfile.TemporaryDirectory() as place:
        text: Any = build_config().text_config
        text.vocab_size = 49152
        text.save_pretrained(place)
        weights = {
            key.replace("model.text_model.", "model."): value.bfloat16()
            for key, value in decoder_weights(file).items()
        }
        save_file(weights, Path(place) / "model.safetensors", {"format": "pt"})
        decoder = LlamaForCausalLM.from_pretrained(
            place, dtype=torch.bfloat16, local_files_only=True
        )
    return decoder, build_tokenizer(file)
