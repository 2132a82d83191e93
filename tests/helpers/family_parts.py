"""What all tiny models share: tokenizer, chat template, text config, random parameters."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)  # for models this small, threads cost more than they bring

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, **HEADS}

CORPUS = [
    "What digit is on the red circle? What colour is the square in the second picture? Answer "
    "with a letter.",
    "You are a helpful assistant. Look at the image and answer the question. The total is 7.",
    "Question: which frame shows it first, before or after the blue star? user assistant system",
]


def build_tokenizer(
    special: list[str], adds_bos: bool = False, **kwargs: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few sentences: any text goes in, tokens are one to several characters
    long."""
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
    if adds_bos:
        bos = kwargs["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    kwargs.setdefault(
        "extra_special_tokens", [token for token in special if token not in kwargs.values()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **kwargs
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with seeded noise at a scale that keeps activations near 1; float32,
    eval mode."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            elif parameter.ndim == 1:  # norms, layer scales: around their initial value
                parameter.add_(0.2 * noise)
            elif id(parameter) in embeddings or ("weight" not in name and parameter.shape[0] == 1):
                parameter.copy_(0.5 * noise)  # embeddings, class tokens, position parameters
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


def chatml(image: str, video: str, system: str = "", bos: str = "") -> str:
    """A ChatML template that writes `image` and `video` where a message holds one."""
    start = (
        f"{{%- if messages[0].role != 'system' -%}}{{{{- {system!r} -}}}}{{%- endif -%}}"
        if system
        else ""
    )
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


def text_config(tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> dict[str, Any]:
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
