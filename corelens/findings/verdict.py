"""A verdict: one of three words, or "not judged" where the test has no power; and how worlds
combine into one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
CANNOT = "cannot be judged here"
NOT_JUDGED = "not judged"  # too few samples to tell, or left out
LEFT_OUT = "left out"  # how the reason of what was not measured for want of time begins


@dataclass(frozen=True)
class Verdict:
    """What a finding concludes from its numbers.

    Args:
        word: REPRODUCED, NOT_REPRODUCED, CANNOT or NOT_JUDGED.
        number: the number that the verdict rests on, in words; "" where nothing was measured.
        reason: why it could not be judged, or which part of the criterion was missed; "" if there
            is nothing to say.
        n: the samples that were there, for NOT_JUDGED.
        worlds: {world: the word there}, where several worlds were combined.
    """

    word: str
    number: str = ""
    reason: str = ""
    n: int | None = None
    worlds: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.word} (n = {self.n})"
            if self.word == NOT_JUDGED and self.n is not None
            else self.word
        )

    def to_json(self) -> dict[str, Any]:
        """As report.json carries it, with the word as it is shown."""
        return asdict(self) | {"shown": str(self)}


def combine(verdicts: Mapping[str, Verdict], of: str = "worlds") -> Verdict:
    """One verdict for a model from those of its worlds (or, `of` "models", for a finding).

    Reproduced: in every world in which it could be judged, and there is such a world. Not
    reproduced: in one world or more it is not. Where none failed and a world was left out for want
    of time: "not judged", since the slowest world may be the one that fails. Where no world could
    be judged: "not judged" if one had only too few samples, else "cannot be judged here".
    """
    words = {world: str(verdict) for world, verdict in verdicts.items()}
    judged = {world: v for world, v in verdicts.items() if v.word in (REPRODUCED, NOT_REPRODUCED)}
    failed = {world: v for world, v in judged.items() if v.word == NOT_REPRODUCED}
    unfinished = any(verdict.reason.startswith(LEFT_OUT) for verdict in verdicts.values())
    if not judged or (unfinished and not failed):
        weak = next((v for v in verdicts.values() if v.word == NOT_JUDGED), None)
        reasons = _reasons(verdicts, of)
        word = NOT_JUDGED if weak else CANNOT
        numbers = _numbers({world: v for world, v in verdicts.items() if v.number}, of)
        return Verdict(word, numbers, reasons, weak.n if weak else None, words)
    shown = failed or judged
    reasons = _reasons(failed, of)
    if failed and len(failed) < len(judged):
        passed = ", ".join(world for world in judged if world not in failed)
        reasons = "; ".join(part for part in (reasons, f"reproduced in {passed}") if part)
    numbers = _numbers(shown, of)
    return Verdict(NOT_REPRODUCED if failed else REPRODUCED, numbers, reasons, None, words)


def _numbers(verdicts: Mapping[str, Verdict], of: str) -> str:
    return of_worlds({world: verdict.number for world, verdict in verdicts.items()}, of=of)


def _reasons(verdicts: Mapping[str, Verdict], of: str) -> str:
    reasons = {world: v.reason for world, v in verdicts.items() if v.reason}
    return of_worlds(reasons, len(verdicts), of)


def of_worlds(texts: Mapping[str, str], count: int | None = None, of: str = "worlds") -> str:
    """What was said of each world, in one text: {"a": "1%", "b": "2%"} → "a: 1%; b: 2%".

    Texts of three worlds or more that differ in numbers alone are said once, with the smallest and
    the largest number: "3 worlds: half in 2 to 6% [1, 7] of the heads".

    Args:
        texts: {world: text}.
        count: how many worlds there are; by default as many as have a text.
        of: what they are, if not worlds.
    """
    count = len(texts) if count is None else count
    if count < 2:
        return next(iter(texts.values()), "")
    alike: dict[str, list[str]] = {}
    for world, text in texts.items():
        alike.setdefault(_NUMBER.sub("#", text), []).append(world)
    parts = []
    for words, worlds in alike.items():
        of_group = [texts[world] for world in worlds]
        if len(worlds) < 3 or (_LIST.search(words) and len({*of_group}) > 1):
            parts += [f"{world}: {texts[world]}" for world in worlds]
        else:
            names = f"{count} {of}" if len(worlds) == count else ", ".join(worlds)
            parts.append(f"{names}: {_with_ranges(words, of_group)}")
    return "; ".join(parts)


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
_LIST = re.compile(r"#, #(?!\])")  # as of layers, whose smallest and largest say nothing


def _with_ranges(words: str, texts: Sequence[str]) -> str:
    """Words with "#" for each number, filled with the range of that number over these texts; an
    interval, and a range, gets its lowest and its highest end."""
    columns = list(zip(*(_NUMBER.findall(text) for text in texts), strict=True))
    parts = words.split("#")
    filled = parts[0]
    for numbers, before, behind in zip(columns, parts[:-1], parts[1:], strict=True):
        low, high = min(numbers, key=float), max(numbers, key=float)
        if before.endswith("[") or behind == " to ":  # of a range: its lower end
            filled += low
        elif behind.startswith("]") or before == " to " or float(low) == float(high):
            filled += high
        else:
            filled += f"{low} to {high}"
        filled += behind
    return filled
