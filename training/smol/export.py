"""From smol-vlm's best checkpoint to what the wheel carries: the trained part, configs, a card of
what was measured."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
)

from corelens.demo.smol import TOKENS, TRAINED, build_tokenizer, decoder_file
from training.smol.tower import MERGE, PATCH, SIDE, VISION
from training.text import chat_template

_DECODER: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "vocab_size": 49152 + len(TOKENS),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def build_config() -> Idefics3Config:
    """The assembled model's."""
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**_DECODER).to_dict(),
        scale_factor=MERGE,
        image_token_id=49152 + TOKENS.index("<image>"),
        tie_word_embeddings=True,
    )
    config.architectures = ["Idefics3ForConditionalGeneration"]
    return config


def build_processor(tokenizer: Any) -> Idefics3Processor:
    """One view a picture, squeezed to the tower's square; no system message."""
    images = Idefics3ImageProcessor(
        do_resize=False,  # a picture is resized once, to the square below
        do_image_splitting=False,
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        resample=3,  # bicubic
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    tokens = (SIDE // PATCH // MERGE) ** 2
    return Idefics3Processor(
        images, tokenizer, image_seq_len=tokens, chat_template=chat_template("idefics3")
    )


def write_trained(run: Path, folder: Path) -> None:
    """What was trained, in bfloat16, with the configs, to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tower = {
        key: value
        for key, value in load_file(run / "tower.safetensors").items()
        if key.startswith("tower.")
    }
    with safe_open(run / "best.safetensors", "pt") as file:
        rest = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key: value.to(torch.bfloat16).contiguous() for key, value in (tower | rest).items()}
    save_file(weights, folder / TRAINED, {"format": "pt"})
    (folder / TRAINED).chmod(0o644)
    build_config().save_pretrained(folder)
    generation = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=64
    )
    generation.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as part:
        build_processor(build_tokenizer(decoder_file())).save_pretrained(part)
        for path in Path(part).iterdir():
            if not path.name.startswith(("tokenizer", "special_tokens")):
                (folder / path.name).write_bytes(path.read_bytes())


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
