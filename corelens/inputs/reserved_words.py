"""Words that a user's text must not hold, because a tokenizer or processor reads more than text in
them: placeholders of pictures and a template's special tokens."""

from collections.abc import Iterable, Mapping
from typing import Any

from corelens.errors import CorelensError


def reserved(processor: Any) -> dict[str, bool]:
    """{word: whether it is a placeholder}: True for one of a picture, video or sound, False for a
    special token of the template."""
    tokenizer = getattr(processor, "tokenizer", None) or processor
    words = dict.fromkeys(getattr(tokenizer, "all_special_tokens", ()), False)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    words |= dict.fromkeys((str(token) for token in added.values() if token.special), False)
    for name, word in vars(processor).items():
        if name.endswith(("_token", "_tag")) and isinstance(word, str) and word.strip():
            words[word] = name in ("image_token", "video_token", "audio_token")
    return words


def check_typed(texts: Iterable[str], words: Mapping[str, bool], label: str) -> None:
    """Raise if a text of a sample's chat holds one of these words.

    A placeholder would be filled with a picture, a template's token would begin or end a turn, and
    both would be counted among the question's rows.
    """
    for text in texts:
        reserved_words = [word for word in words if word in text]
        if not reserved_words:
            continue
        word = max(reserved_words, key=len)
        if words[word]:
            do = (
                "take it out: pictures are put before the question by themselves, or where "
                "{'type': 'image'} stands in the messages"
            )
        else:
            do = (
                f"take it out, or break it up ({word[0]} {word[1:]}); turns are given as "
                "Sample(messages=[…])"
            )
        raise CorelensError(
            f"{label}: its text holds {word!r}, which this model's "
            + (
                "processor replaces by a picture"
                if words[word]
                else "tokenizer reads as one token of its template"
            ),
            "words",
            do,
        )
