"""The rules of MM-NIAH, as its calculate_scores.py has them
(https://github.com/OpenGVLab/MM-NIAH)."""

import json
import re
from collections.abc import Callable

from corelens.data.scoring_mmlongbench import normal
from corelens.inputs.sample import Sample


def word(sample: Sample, text: str) -> float:
    """mm_niah_word: the gold answer stands in the text as a word, or as words next to each other;
    both without punctuation, articles and capitals."""
    gold = re.escape(normal(str(sample.answer)))
    return float(re.search(rf"\b{gold}\b", normal(text)) is not None)


def agreement(sample: Sample, text: str) -> float:
    """mm_niah_list: the share of the gold list's places at which the list that was written agrees;
    0 where no list was."""
    try:
        written = json.loads(text.strip(".").replace("json", "").replace("```", "").strip())
    except (ValueError, RecursionError):
        return 0.0
    if isinstance(written, dict):
        lists = [value for value in written.values() if isinstance(value, list)]
        written = [number for numbers in lists for number in numbers]
    gold = json.loads(str(sample.answer))
    if not isinstance(written, list):
        return 0.0
    return sum(a == b for a, b in zip(written, gold, strict=False)) / len(gold)


RULES: dict[str, Callable[[Sample, str], float]] = {
    "mm_niah_word": word,
    "mm_niah_list": agreement,
}
