"""The demo models' tokenizers and chat templates: each family's special tokens, whole words where
the worlds use them, bytes for everything else."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = {
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "llava_onevision": ("<image>", "<video>"),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "idefics3": ("<image>", "<video>"),
}
"""A family's own special tokens; the last two stand for a picture and a video."""

# What the worlds speak: `refer`, and what `doc` and `video` will need. Every word becomes one
# token, with and without a space before it.
_SPEECH = """
system user assistant You are a helpful assistant N A What Which Where How many digit letter number
symbol is are the a an on in of at to and or with carried shown List every object all objects
Describe picture image scene page video frame frames seconds none There it they red green blue
yellow orange purple pink cyan circle square triangle diamond hexagon star shape small large big
tiny left right above below top bottom nearest moving still first last before after when during code
value Total Invoice Order Date Name Amount Account Ticket Room Price Tax Report Summary Index Notes
"""

# Qwen's pre-tokenizer: contractions, words with the space before them, single digits, punctuation,
# white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEMPLATE = (
    "{%- macro write(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}"
    "{{- 'IMAGE' -}}"
    "{%- elif part.type == 'video' or 'video' in part -%}"
    "{{- 'VIDEO' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' -}}{{- write(message.content) -}}{{- '<|im_end|>\n' "
    "-}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def chat_template(family: str) -> str:
    """Qwen's template without tools and thinking: no system message unless one is given; pictures
    as in the family."""
    *_, image, video = SPECIAL[family]
    around = {"qwen3_vl": ("<|vision_start|>", "<|vision_end|>"), "idefics3": ("", "")}
    before, after = around.get(family, ("", "\n"))
    template = _TEMPLATE.replace("'IMAGE'", repr(before + image + after))
    return template.replace("'VIDEO'", repr(before + video + after))


def build_tokenizer(family: str = "qwen3_vl") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text goes in, the worlds' words are one token each, digits
    stand alone."""
    own = SPECIAL[family]
    extra: list[str] | dict[str, str] = [*_CHAT[1:2], *own]
    if family == "internvl":  # its processor asks the tokenizer by these names
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        extra = dict(zip(names, own, strict=True))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1 << 14,  # never reached: merges end when each word is one token
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*_CHAT, *own],
        show_progress=False,
    )
    spoken = _SPEECH.split()
    words = sorted(set(spoken) | {word.lower() for word in spoken})
    corpus = [text for word in words for text in (word, " " + word)]
    tokenizer.train_from_iterator([*corpus, "?\n", ".\n", "\n\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=extra,
        padding_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
