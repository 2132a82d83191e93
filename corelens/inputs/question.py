"""Where the user's question stands: in the messages, in the rendered prompt, among the token ids.

1. `question_in_messages`: the text parts of the messages that are the question.
2. `question_in_prompt`: the characters of the rendered prompt that come from such a part, found by
   rendering once more with a marker in its stead: its words may stand elsewhere in the prompt too,
   and the template may strip white space around them.
3. `question_among_tokens`: the tokens whose characters overlap these, by the tokenizer's offsets,
   after the processor has replaced each placeholder by what stands for a picture.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from corelens.errors import CorelensError
from corelens.inputs.chat_template import Messages, apply_template, last_user
from corelens.layouts import Layout

Span = tuple[int, int]


@dataclass
class MessageSpan:
    """Characters `start` to `stop` of one text part of a message; part None: the message's content
    is one string."""

    message: int
    part: int | None
    start: int
    stop: int


def question_in_messages(sample: Any, messages: Messages) -> list[MessageSpan]:
    """Where the question stands in the messages: all text of the last user turn, or the part that
    `question` names."""
    number = last_user(messages)
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
            MessageSpan(number, index, 0, length)
            for (index, _), length in zip(parts, lengths, strict=True)
            if length > 0
        ]
    if not sample.question:
        return []
    whole = [
        MessageSpan(number, index, 0, len(text)) for index, text in parts if text == sample.question
    ]
    length = len(sample.question)
    if whole:
        spans = whole
    elif sample.messages is None:  # the prompt that CoreLens wrote begins with the question
        spans = [MessageSpan(number, index, 0, length) for index, _ in parts[:1]]
    else:
        spans = []
        for index, text in parts:
            for start in _occurrences(text, sample.question):
                spans.append(MessageSpan(number, index, start, start + length))
    if len(spans) != 1:
        raise CorelensError(
            f"{sample.label}: the question stands {len(spans)} times in the last user turn",
            "a question that names one part of that turn",
            "give the question a text part of its own: {'type': 'text', 'text': question}",
        )
    return spans


def _occurrences(text: str, wanted: str) -> list[int]:
    return [start for start in range(len(text) - len(wanted) + 1) if text.startswith(wanted, start)]


def question_in_prompt(
    processor: Any,
    layout: Layout,
    messages: Messages,
    span: MessageSpan,
    processed: str,
    sample: Any,
) -> Span:
    """The span of `processed` that comes from these characters of the messages."""
    marker = "CoReQuEsTiOn"
    while marker in processed:
        marker += "X"
    marked = deepcopy(messages)
    message = marked[span.message]
    holder, key = (
        (message, "content") if span.part is None else (message["content"][span.part], "text")
    )
    holder[key] = holder[key][: span.start] + marker + holder[key][span.stop :]
    other = layout.processed_prompt(processor, apply_template(processor, layout, marked, sample))
    before, _, after = other.partition(marker)
    start, stop = len(before), len(processed) - len(after)
    if (
        marker not in other
        or marker in after
        or processed[:start] != before
        or processed[stop:] != after
    ):
        raise CorelensError(
            f"{sample.label}: the chat template does not write the question once, as it was given",
            "a template in which the user's words stand in one place",
            "look at processor.apply_chat_template(…, tokenize=False)",
        )
    return start, stop


def question_among_tokens(
    processor: Any,
    expanded: str,
    ids: list[int],
    special: bool,
    spans: Sequence[Span],
    changes: Sequence[dict[str, Any]],
) -> list[int] | CorelensError | None:
    """Positions of the tokens whose characters overlap the question, after proving that this text
    gives these ids."""
    if not spans:
        return None
    try:
        again = processor.tokenizer(
            expanded, add_special_tokens=special, return_offsets_mapping=True
        )
    except NotImplementedError:
        again = {"input_ids": None}
    if again["input_ids"] != ids:
        return CorelensError(
            "a processor that does not say how it changes its prompt, or a tokenizer without "
            "character offsets",
            "a fast tokenizer, and a layout whose processed_prompt() gives what the processor "
            "makes of the prompt",
            "name the rows by their positions, or use rows='last'",
        )
    shifted = [_shift(span, changes) for span in spans]

    def overlaps(start: int, stop: int) -> bool:
        return any(start < span[1] and stop > span[0] for span in shifted)

    offsets = enumerate(again["offset_mapping"])
    return [position for position, (start, stop) in offsets if overlaps(start, stop)]


def _shift(span: Span, changes: Sequence[dict[str, Any]]) -> Span:
    """Where characters of the prompt stand once the placeholders before them have been replaced."""
    gained = sum(
        len(c["replacement"]) - (c["span"][1] - c["span"][0])
        for c in changes
        if c["span"][1] <= span[0]
    )
    return span[0] + gained, span[1] + gained
