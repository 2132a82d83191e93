"""From a Sample to the text that a processor reads, with a placeholder for each picture."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from corelens.errors import CorelensError
from corelens.inputs.chat_template import Messages, apply_template, continuation, last_user
from corelens.inputs.media import Medium, medium
from corelens.inputs.question import Span, question_in_messages, question_in_prompt
from corelens.inputs.reserved_words import check_typed
from corelens.layouts import Layout

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Prompt:
    """A rendered prompt.

    Args:
        text: what goes to the processor.
        processed: what the processor makes of it before it puts the placeholders in.
        question: the characters of `processed` (start, stop) that are the user's question; empty
            without one.
        answer: what the model should continue with, the white space that the template puts before
            it included.
        media: the pictures and videos that fill the placeholders, in the order of the prompt.
        sounds: the sounds that fill those of their own, as they were given.
    """

    text: str
    processed: str
    question: list[Span] = field(default_factory=list)
    answer: str | None = None
    media: list[Medium] = field(default_factory=list)
    sounds: list[Any] = field(default_factory=list)


def render(
    sample: Any, processor: Any, layout: Layout, words: Mapping[str, bool], answer: bool = False
) -> Prompt:
    """Render a sample by its processor's chat template, and find the question in it exactly.

    `words` are those that no text may hold, see `reserved`.
    """
    messages, media = _messages(sample)
    check_typed(_texts(messages), words, sample.label)
    in_messages = question_in_messages(sample, messages)
    text = apply_template(processor, layout, messages, sample)
    processed = layout.processed_prompt(processor, text)
    question = [
        question_in_prompt(processor, layout, messages, span, processed, sample)
        for span in in_messages
    ]
    return Prompt(
        text=text,
        processed=processed,
        question=[span for span in question if span[1] > span[0]],
        answer=continuation(processor, messages, text, sample) if answer else None,
        media=[medium for medium in media if medium.kind != "audio"],
        sounds=[medium.picture for medium in media if medium.kind == "audio"],
    )


def _messages(sample: Any) -> tuple[Messages, list[Medium]]:
    """The chat to render, with bare placeholders for pictures, and the pictures in the order of the
    prompt."""
    if sample.messages is None:
        return _single_turn(sample)
    if not sample.messages or sample.messages[-1].get("role") == "assistant":
        raise CorelensError(
            f"{sample.label}: messages that are empty or end with the assistant's turn",
            "a chat whose last turn the model is to answer",
            "leave that turn out and give it as Sample(answer=…)",
        )
    waiting = {
        "image": list(sample.images),
        "video": [sample.video] if sample.video is not None else [],
        "audio": list(sample.audio),
    }
    messages: Messages = []
    media: list[Medium] = []
    for message in sample.messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            content = [_part(part, waiting, media, sample) for part in content]
        messages.append({**message, "content": deepcopy(content)})
    left = sum(map(len, waiting.values()))
    if left:
        raise CorelensError(
            f"{sample.label}: {left} more pictures than its messages have places for",
            "one {'type': 'image'} or {'type': 'video'} in the messages for each picture",
            "put the pictures into the messages, or give images and question instead of messages",
        )
    if sample.choices:
        _append_choices(messages, sample.choices)
    return messages, media


def _single_turn(sample: Any) -> tuple[Messages, list[Medium]]:
    shown = [("image", image) for image in sample.images]
    shown += [] if sample.video is None else [("video", sample.video)]
    shown += [("audio", sound) for sound in sample.audio]
    media = [
        medium(kind, picture, {}, sample.meta.get("fps"), f"{sample.label}")
        for kind, picture in shown
    ]
    text = sample.question or ""
    content = [{"type": kind} for kind, _ in shown] + (
        [{"type": "text", "text": text}] if text else []
    )
    messages: Messages = [{"role": "user", "content": content}]
    if sample.choices:
        _append_choices(messages, sample.choices)
    return messages, media


def _texts(messages: Messages) -> list[str]:
    """Every text of a chat."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    return [content for content in contents if isinstance(content, str)] + [
        part["text"] for part in parts if isinstance(part.get("text"), str)
    ]


def _part(part: Any, waiting: dict[str, list], media: list[Medium], sample: Any) -> Any:
    """One part of a message; a picture moves to `media` and leaves a bare placeholder behind."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") or next((kind for kind in waiting if kind in part), "text")
    if kind in ("image_url", "video_url", "input_image"):
        raise CorelensError(
            f"{sample.label}: a message with a part of type {kind!r}",
            "{'type': 'image', 'image': …} with a PIL image, a path or an array",
            "fetch the picture first, and write the part so",
        )
    if kind not in waiting:
        return part
    picture = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    if picture is None:
        if not waiting[kind]:
            raise CorelensError(
                f"{sample.label}: a message with a bare {{'type': '{kind}'}} and no {kind} "
                "left for it",
                f"{{'type': '{kind}', '{kind}': …}}, or the {kind} in the sample itself",
                f"put each {kind} into its message",
            )
        picture = waiting[kind].pop(0)
    number = sum(earlier.kind == kind for earlier in media)
    media.append(
        medium(kind, picture, part, sample.meta.get("fps"), f"{sample.label}, {kind} {number}")
    )
    return {"type": kind}


def _append_choices(messages: Messages, choices: list[str]) -> None:
    if len(choices) > len(LETTERS):
        raise CorelensError(
            f"{len(choices)} choices", f"at most {len(LETTERS)}", "choices are lettered A to Z"
        )
    options = "".join(
        f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )
    message = messages[last_user(messages)]
    if isinstance(message["content"], str):
        message["content"] += options
        return
    texts = [part for part in message["content"] if part.get("type") == "text"]
    if texts:
        texts[-1]["text"] += options
    else:
        message["content"].append({"type": "text", "text": options[1:]})
