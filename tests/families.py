"""Tiny random models of every family with their real processors, built from configs, offline.

All parameters are random (norm weights and biases too, and projectors that a family initialises to zero: a weight of
1 or 0 hides errors). Image geometry is shrunk so that a forward pass takes milliseconds, but every mechanism of the
family's checkpoints stays: tiles, thumbnails, newline tokens, merging, pooling, DeepStack.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, **HEADS}

CORPUS = [
    "What digit is on the red circle? What colour is the square in the second picture? Answer with a letter.",
    "You are a helpful assistant. Look at the image and answer the question. The total is 7.",
    "Question: which frame shows it first, before or after the blue star? user assistant system",
]


def build_tokenizer(special: list[str], **kwargs: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences: any text goes in, tokens are one to several characters long."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    kwargs.setdefault("extra_special_tokens", [token for token in special if token not in kwargs.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **kwargs)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with seeded noise at a scale that keeps activations near 1; float32, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:  # norms, layer scales: around their initial value
                parameter.add_(0.2 * noise)
            elif id(parameter) in embeddings or "weight" not in name and parameter.shape[0] == 1:
                parameter.copy_(0.5 * noise)  # embeddings, class tokens, position parameters
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


# --- Qwen -----------------------------------------------------------------------------------------------------------

QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def chatml(image: str, video: str, system: str = "", bos: str = "") -> str:
    """A ChatML template that writes `image` and `video` where a message holds one."""
    start = f"{{%- if messages[0].role != 'system' -%}}{{{{- {system!r} -}}}}{{%- endif -%}}" if system else ""
    return (
        f"{bos}{start}"
        "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
        "{%- if message.content is string -%}{{- message.content -}}{%- else -%}"
        "{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{- {image!r} -}}}}"
        f"{{%- elif part.type == 'video' -%}}{{{{- {video!r} -}}}}"
        "{%- elif part.type == 'text' -%}{{- part.text -}}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    )


QWEN_TEMPLATE = chatml(
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|vision_start|><|video_pad|><|vision_end|>",
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
)


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(QWEN_SPECIAL, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{value}|>") for key, value in names.items()}


def _text(tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> dict[str, Any]:
    """The text half of a config: small, grouped heads, the tokenizer's ids."""
    return {
        **TEXT,
        "vocab_size": -(-len(tokenizer) // 16) * 16,
        "max_position_embeddings": 16384,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **kwargs,
    }


def _mrope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def qwen3_vl() -> tuple[nn.Module, Any]:
    """DeepStack after two of three vision layers; a picture has 4 to 256 tokens of 32 × 32 pixels."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _qwen_tokenizer()
    config = Qwen3VLConfig(text_config=_text(tokenizer, head_dim=8, rope_parameters=_mrope()), **_qwen3_rest(tokenizer))
    return Qwen3VLForConditionalGeneration(config), _qwen3_processor(tokenizer)


def _qwen3_rest(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_position_embeddings": 64}
    vision |= {"patch_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 2]}
    return {"vision_config": vision, "tie_word_embeddings": False, **_qwen_ids(tokenizer)}


def _qwen3_processor(tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**half, size={"shortest_edge": 4 * 32 * 32, "longest_edge": 256 * 32 * 32}),
        tokenizer,
        Qwen3VLVideoProcessor(**half, size={"shortest_edge": 8 * 32 * 32, "longest_edge": 256 * 32 * 32}),
        chat_template=QWEN_TEMPLATE,
    )


BUILDERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {"qwen3_vl": qwen3_vl}
FAMILIES: list[str] = list(BUILDERS)


@lru_cache(maxsize=None)
def tiny(family: str) -> tuple[nn.Module, Any]:
    """The family's tiny random model (float32, eval mode) and its processor; shared, so leave no change on them."""
    model, processor = BUILDERS[family]()
    randomise(model)
    tokenizer = processor.tokenizer
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
    return model, processor
