"""Rendering a chat by the processor's template."""

from typing import Any

from corelens.errors import CorelensError
from corelens.layouts import Layout

Messages = list[dict[str, Any]]


def last_user(messages: Messages) -> int:
    """The number of the last user turn."""
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise CorelensError(
            "messages without a user's turn", "a chat with a user's turn", "add {'role': 'user', …}"
        )
    return users[-1]


def apply_template(processor: Any, layout: Layout, messages: Messages, sample: Any) -> str:
    """The prompt's text: by the template, or without one by the layout's plain form."""
    template = _template(processor)
    if template is not None:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template
        )
    if len(messages) > 1:
        raise CorelensError(
            f"{sample.label}: a chat of {len(messages)} turns for a processor without a chat "
            "template",
            "one user turn",
            "set processor.chat_template, or give images and question instead of messages",
        )
    content = messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    count = {kind: sum(part.get("type") == kind for part in parts) for kind in ("image", "video")}
    text = "".join(part["text"] for part in parts if part.get("type") == "text")
    sounds = sum(part.get("type") == "audio" for part in parts)
    heard = getattr(processor, "audio_token", "") * sounds
    return heard + layout.plain_prompt(processor, count["image"], count["video"], text)


def _template(processor: Any) -> dict[str, Any] | None:
    """Options that make apply_chat_template find a template: its own, else its tokenizer's; None if
    there is none."""
    if getattr(processor, "chat_template", None):
        # not passed on: a processor may choose among its own (some have another one for videos)
        return {}
    template = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    return {"chat_template": template} if template else None


def continuation(processor: Any, messages: Messages, text: str, sample: Any) -> str:
    """The gold answer as the template writes it after the generation prompt: some put a space
    before it."""
    if not sample.answer:
        raise CorelensError(
            f"{sample.label} without an answer",
            "an answer, since answer=True",
            "give Sample(answer=…)",
        )
    if not isinstance(sample.answer, str):
        raise CorelensError(
            f"{sample.label}: the answer {sample.answer!r}, a {type(sample.answer).__name__}",
            "a text: what the model should write",
            f"answer={str(sample.answer)!r}",
        )
    template = _template(processor)
    if template is None:
        return sample.answer
    turn = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
    full = processor.apply_chat_template([*messages, turn], tokenize=False, **template)
    rest = full[len(text) :] if full.startswith(text) else ""
    space = rest[: rest.find(sample.answer)] if sample.answer in rest else ""
    return (space if space.isspace() else "") + sample.answer
