"""From a Sample to the text that a processor reads, and where in that text the user's question
stands."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from corelens.errors import CorelensError
from corelens.inputs.media import Medium, medium
from corelens.inputs.typed import check_typed
from corelens.layouts import Layout

Messages = list[dict[str, Any]]
Span = tuple[int, int]

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

    The question's place is found by rendering once more with a marker in its stead, so it does not
    matter whether its words stand elsewhere in the prompt too, or whether the template strips white
    space around them.
    """
    messages, media = _messages(sample)
    check_typed(_texts(messages), words, sample.id)
    places = _question_places(sample, messages)
    text = _apply(processor, layout, messages, sample)
    processed = layout.processed_prompt(processor, text)
    question = [_find(processor, layout, messages, place, processed, sample) for place in places]
    return Prompt(
        text=text,
        processed=processed,
        question=[span for span in question if span[1] > span[0]],
        answer=_continuation(processor, messages, text, sample) if answer else None,
        media=[medium for medium in media if medium.kind != "audio"],
        sounds=[medium.picture for medium in media if medium.kind == "audio"],
    )


@dataclass
class _Place:
    """Characters `start` to `stop` of one text part: part number None means that the content is one
    string."""

    message: int
    part: int | None
    start: int
    stop: int


def _messages(sample: Any) -> tuple[Messages, list[Medium]]:
    """The chat to render, with bare placeholders for pictures, and the pictures in the order of the
    prompt."""
    if sample.messages is None:
        return _single_turn(sample)
    if not sample.messages or sample.messages[-1].get("role") == "assistant":
        raise CorelensError(
            f"sample {sample.id!r}: messages that are empty or end with the assistant's turn",
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
            f"sample {sample.id!r}: {left} more pictures than its messages have places for",
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
        medium(kind, picture, {}, sample.meta.get("fps"), f"sample {sample.id!r}")
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
            f"sample {sample.id!r}: a message with a part of type {kind!r}",
            "{'type': 'image', 'image': …} with a PIL image, a path or an array",
            "fetch the picture first, and write the part so",
        )
    if kind not in waiting:
        return part
    picture = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    if picture is None:
        if not waiting[kind]:
            raise CorelensError(
                f"sample {sample.id!r}: a message with a bare {{'type': '{kind}'}} and no {kind} "
                "left for it",
                f"{{'type': '{kind}', '{kind}': …}}, or the {kind} in the sample itself",
                f"put each {kind} into its message",
            )
        picture = waiting[kind].pop(0)
    number = sum(earlier.kind == kind for earlier in media)
    media.append(
        medium(
            kind, picture, part, sample.meta.get("fps"), f"sample {sample.id!r}, {kind} {number}"
        )
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
    message = messages[_last_user(messages)]
    if isinstance(message["content"], str):
        message["content"] += options
        return
    texts = [part for part in message["content"] if part.get("type") == "text"]
    if texts:
        texts[-1]["text"] += options
    else:
        message["content"].append({"type": "text", "text": options[1:]})


def _last_user(messages: Messages) -> int:
    users = [number for number, message in enumerate(messages) if message.get("role") == "user"]
    if not users:
        raise CorelensError(
            "messages without a user's turn", "a chat with a user's turn", "add {'role': 'user', …}"
        )
    return users[-1]


def _question_places(sample: Any, messages: Messages) -> list[_Place]:
    """Where the question stands in the messages: all text of the last user turn, or the part that
    `question` names."""
    number = _last_user(messages)
    content = messages[number]["content"]
    if isinstance(content, str):
        parts: list[tuple[int | None, str]] = [(None, content)]
    else:
        parts = [
            (index, part["text"])
            for index, part in enumerate(content)
            if part.get("type") == "text"
        ]
    if sample.question is None:
        if sample.messages is None:
            return []
        options = sum(len(choice) + 4 for choice in sample.choices or [])  # "\nA. " before each
        lengths = [len(text) - (options if index == parts[-1][0] else 0) for index, text in parts]
        return [
            _Place(number, index, 0, length)
            for (index, _), length in zip(parts, lengths, strict=True)
            if length > 0
        ]
    if not sample.question:
        return []
    whole = [
        _Place(number, index, 0, len(text)) for index, text in parts if text == sample.question
    ]
    places = whole or [
        _Place(number, index, start, start + len(sample.question))
        for index, text in (parts[:1] if sample.messages is None else parts)
        for start in ([0] if sample.messages is None else _occurrences(text, sample.question))
    ]
    if len(places) != 1:
        raise CorelensError(
            f"sample {sample.id!r}: the question stands {len(places)} times in the last user turn",
            "a question that names one part of that turn",
            "give the question a text part of its own: {'type': 'text', 'text': question}",
        )
    return places


def _occurrences(text: str, wanted: str) -> list[int]:
    return [start for start in range(len(text) - len(wanted) + 1) if text.startswith(wanted, start)]


def _find(
    processor: Any, layout: Layout, messages: Messages, place: _Place, processed: str, sample: Any
) -> Span:
    """The span of `processed` that comes from one place in the messages."""
    marker = "CoReQuEsTiOn"
    while marker in processed:
        marker += "X"
    marked = deepcopy(messages)
    message = marked[place.message]
    holder, key = (
        (message, "content") if place.part is None else (message["content"][place.part], "text")
    )
    holder[key] = holder[key][: place.start] + marker + holder[key][place.stop :]
    other = layout.processed_prompt(processor, _apply(processor, layout, marked, sample))
    before, _, after = other.partition(marker)
    start, stop = len(before), len(processed) - len(after)
    if (
        marker not in other
        or marker in after
        or processed[:start] != before
        or processed[stop:] != after
    ):
        raise CorelensError(
            f"sample {sample.id!r}: the chat template does not write the question once, as it was "
            "given",
            "a template in which the user's words stand in one place",
            "look at processor.apply_chat_template(…, tokenize=False)",
        )
    return start, stop


def _apply(processor: Any, layout: Layout, messages: Messages, sample: Any) -> str:
    template = _template(processor)
    if template is not None:
        return processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template
        )
    if len(messages) > 1:
        raise CorelensError(
            f"sample {sample.id!r}: a chat of {len(messages)} turns for a processor without a chat "
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


def _continuation(processor: Any, messages: Messages, text: str, sample: Any) -> str:
    """The gold answer as the template writes it after the generation prompt: some put a space
    before it."""
    if not sample.answer:
        raise CorelensError(
            f"sample {sample.id!r} without an answer",
            "an answer, since answer=True",
            "give Sample(answer=…)",
        )
    if not isinstance(sample.answer, str):
        raise CorelensError(
            f"sample {sample.id!r}: the answer {sample.answer!r}, a {type(sample.answer).__name__}",
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
