"""MMLongBench's own rules, one a kind of task (utils.py of
https://github.com/EdinburghNLP/MMLongBench; arXiv 2505.10610).

What a model wrote is read with and without what stands before "Answer:" (or "label:"), and the
better one counts; the rule for documents and the one for yes and no read it once, as the benchmark
does.
"""

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from math import isclose, isnan, nan
from typing import Any

from corelens.inputs.sample import Sample

Rule = Callable[[Sample, str], float]


def after(text: str, prefix: str) -> str:
    """What stands behind the first `prefix`; the whole text without it."""
    match = re.search(f"{re.escape(prefix)}(.*)", text, flags=re.IGNORECASE | re.DOTALL)
    rest = (match[1] if match else text).strip()
    return re.sub(f"^{re.escape(prefix)}", "", rest, flags=re.IGNORECASE).strip()


def either(rule: Rule, prefix: str = "Answer:") -> Rule:
    """The better of the rule on the whole text and on what stands behind the prefix."""

    def scored(sample: Sample, text: str) -> float:
        return max(float(rule(sample, text)), float(rule(sample, after(text, prefix))))

    scored.__name__ = rule.__name__
    return scored


def normal(text: str, punctuation: bool = False) -> str:
    """Lower case, without articles, single spaces; without punctuation too, unless it is kept."""
    text = text.lower()
    if not punctuation:
        text = "".join(sign for sign in text if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains(sample: Sample, text: str) -> float:
    """sub_em: a gold answer stands in the text, both normalised (visual RAG; needles that are found
    or reasoned of)."""
    answers = sample.meta.get("answers") or [sample.answer]
    return float(any(normal(str(gold)) in normal(text) for gold in answers))


def yes_or_no(sample: Sample, text: str) -> float:
    """binary_acc: the last yes or no of the text (visual haystacks).

    Where there is neither, the benchmark guesses no, yes, yes, no in turn, by the order of the
    questions; here that counts as wrong.
    """

    def label(words: str) -> int:
        match = re.findall(r"\b(?:yes|no)\b", normal(words, punctuation=True))
        if match:
            return int(match[-1] == "yes")
        return int(words) if words.strip().isdigit() else -1

    answer = label(text)
    return float(answer >= 0 and answer == label(str(sample.answer)))


def same_sum(sample: Sample, text: str) -> float:
    """soft_acc: the numbers of the list that was written add up to the gold ones (counting
    needles)."""
    words = normal(text, punctuation=True)
    numbers: list[Any] | None = None
    for pattern in (r"\[[\d\s,]+\]", r"\[.*?\]"):
        match = re.findall(pattern, words, flags=re.DOTALL)
        if match and numbers is None:
            try:
                numbers = [int(x) for x in json.loads(match[-1]) if str(x).lstrip("-").isdigit()]
            except ValueError:
                numbers = None
    if numbers is None:
        numbers = [int(x) for x in re.findall(r"\d+", words)]
    return float(sum(numbers) == sum(json.loads(str(sample.answer))))


def letter(sample: Sample, text: str) -> float:
    """mc_acc: "answer is (B)", else "answer: B", else the last letter A to J that stands alone."""
    words = " ".join(text.split())
    for pattern in (
        r"answer is \(?([A-J])\)?",
        r"[aA]nswer:\s*([A-J])",
        r"\b([A-J])\b(?!.*\b[A-J]\b)",
    ):
        if match := re.search(pattern, words, flags=re.DOTALL):
            return float(match[1] == sample.answer)
    return 0.0


def class_number(sample: Sample, text: str) -> float:
    """cls_acc: the number behind "label:", else the last number (many-shot classification)."""
    words = " ".join(text.split())
    match = re.search(r"label:\s*(\d+)", words, flags=re.IGNORECASE) or re.search(
        r"\b(\d+)\b(?!.*\b\d+\b)", words
    )
    return float(match is not None and int(match[1]) == int(str(sample.answer)))


# --- documents


def document(sample: Sample, text: str) -> float:
    """doc_qa, by the answer's format.

    Integer and Float: among the numbers of the text (floats within 1%, percentages either way).
    String and None: F1 of words, or containment for what must be exact. List: the mean over its
    items; those that are words count as one.
    """
    return _document(sample.answer, after(text, "Answer:"), str(sample.meta.get("answer_format")))


def _document(gold: Any, text: str, form: str) -> float:
    if form == "Integer":
        return float(_float(gold) in _numbers(_cleaned(text)))
    if form == "Float":
        return float(any(_float_agrees(_float(gold), x) for x in _numbers(_cleaned(text))))
    if form == "List":
        items = json.loads(gold)
        texts = [x for x in items if isinstance(x, str)]
        words = [x for x in texts if _kind(x) == "String" and not _must_be_exact(x)]
        merged = [" ".join(words)] if words else []
        parts = merged + [x for x in items if x not in words]
        return sum(_document(part, text, _kind(part)) for part in parts) / max(len(parts), 1)
    gold = str(gold)
    return float(gold in text) if _must_be_exact(gold) else word_f1(gold, text)


def _float_agrees(gold: float, number: float) -> bool:
    """Whether a number is within 1% of the gold one, or of the gold one as or from a percentage."""
    return any(isclose(x, number, rel_tol=0.01) for x in (gold / 100, gold, gold * 100))


def word_f1(gold: str, text: str) -> float:
    """F1 of the words of two normalised texts, counted with multiplicity."""
    wanted, answer = normal(gold).split(), normal(text).split()
    in_common = sum((Counter(wanted) & Counter(answer)).values())
    return 2 * in_common / (len(wanted) + len(answer)) if in_common else 0.0


def _must_be_exact(text: str) -> bool:
    """Addresses, file names, page and telephone numbers, times and dates."""
    patterns = (
        r"https://", r"\.(py|ipynb)$", r"^page", r"^\d+(-\d+|\s\d+)?$", r"a\.m\.|p\.m\.",
        r"^\d{4}[-/\s]\d{1,2}([-/\s]\d{1,2})?$", r"^\d{1,2}[-/\s]\d{1,2}[-/\s]\d{2,4}$",
        r"^[\w.%+-]+@[\w.-]+\.[a-zA-Z]{2,}$",
    )  # fmt: skip
    return any(re.search(pattern, text) for pattern in patterns)


def _cleaned(text: Any) -> str:
    """Lower case, without commas, units at the end, outer quotes and signs of money or percent."""
    text = str(text).lower().strip().replace(",", "")
    units = "kg meters acres minutes miles mile feet million thousand billion mm m"
    for unit in units.split():
        text = text.removesuffix(unit).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    return text.strip("$").strip().strip("£").strip().strip("%").strip()


def _numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d*)?|-?\.\d+", text.replace(",", ""))]


def _float(text: Any) -> float:
    """The number that is written there; not a number (which equals nothing) if there is none."""
    try:
        return float(_cleaned(text))
    except ValueError:
        return nan


def _kind(item: Any) -> str:
    """The kind of a list's item, a number or a text: "Integer", "Float" or "String"."""
    if isinstance(item, int | float):
        return "Integer" if isinstance(item, int) else "Float"
    number = _float(item)
    if isnan(number):
        return "String"
    return "Integer" if number.is_integer() and "%" not in item else "Float"


RULES: dict[str, Rule] = {
    "sub_em": either(contains),
    "binary_acc": yes_or_no,
    "soft_acc": either(same_sum),
    "mc_acc": either(letter),
    "cls_acc": either(class_number, "label:"),
    "doc_qa": document,
}
