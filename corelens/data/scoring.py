"""How each public set scores an answer: exact match, ANLS, multiple choice, overlap of boxes.

A loader writes the rule's name into `sample.meta["scoring"]`, and what else the rule needs beside
it; `score(sample, text)` applies it to the text that a model wrote (`cl.evaluate` does so where a
sample names a rule, and asks else whether greedy decoding writes `sample.answer` token by token).
"""

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from math import isclose
from typing import Any

from corelens.data import scoring_mm_niah, scoring_mmlongbench
from corelens.errors import CorelensError
from corelens.inputs.sample import Sample


def score(sample: Sample, text: str) -> float:
    """What the sample's set gives for this answer, 0 to 1.

    Raises:
        CorelensError: a rule that is not known, or one that needs a judge.
    """
    name = sample.meta.get("scoring", "exact_match")
    if name not in RULES:
        judged = {
            "gpt-4": "the benchmark lets GPT-4 judge these",
            "rouge": "ROUGE-L, by the package rouge-score",
        }
        raise CorelensError(
            f"{sample.label}, scored by {name!r} ({judged.get(name, 'no rule of that name')})",
            f"one of {', '.join(RULES)}",
            "leave such samples out, or score them yourself",
        )
    return float(RULES[name](sample, text))


def golds(sample: Sample) -> list[str]:
    """Every answer that counts as right."""
    return [str(answer) for answer in sample.meta.get("answers") or [sample.answer]]


def plain(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(str(text).lower().split()).rstrip(".").rstrip()


def exact_match(sample: Sample, text: str) -> float:
    """1 if the text is one of the gold answers, but for case, spacing and a full stop at the
    end."""
    return float(plain(text) in {plain(gold) for gold in golds(sample)})


ANLS_THRESHOLD = 0.5  # Biten et al. 2019


def distance(a: str, b: str) -> int:
    """Levenshtein's edit distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def similarity(gold: str, text: str) -> float:
    """1 − distance / length of the longer one; 0 unless it exceeds ANLS's threshold."""
    if not gold and not text:
        return 1.0
    value = 1 - distance(gold, text) / max(len(gold), len(text))
    return value if value > ANLS_THRESHOLD else 0.0


def anls(sample: Sample, text: str) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648), of one
    answer.

    ANLS = max over gold answers of 1 − NL(gold, text) where that exceeds 0.5, else 0, NL being the
    edit distance over the longer length; case does not count.
    """
    return max(similarity(gold.lower().strip(), text.lower().strip()) for gold in golds(sample))


def multiple_choice(sample: Sample, text: str) -> float:
    """1 if the chosen letter is the gold one: the letter before the first ")", else the whole text.

    As MLVU's choice_bench.py reads an answer (https://github.com/JUNJIE99/MLVU), but for a full
    stop or colon behind the letter ("B." is B), since CoreLens writes options as "B. …".
    """
    text = text.strip()
    letter = (
        text[: text.index(")")][-1:] if ")" in text else re.split(r"[.:\s]", text, maxsplit=1)[0]
    )
    return float(letter == sample.answer)


def box_iou(sample: Sample, text: str) -> float:
    """1 if the first four numbers of the text are a box that overlaps the gold box by more than
    half (IoU > 0.5).

    The usual measure of referring expression comprehension (Yu et al. 2016, arXiv 1608.00272). The
    gold box stands in `sample.meta["box"]`, in the units of `sample.answer`.
    """
    numbers = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", text)[:4]]
    if len(numbers) < 4:
        return 0.0
    return float(iou(numbers, sample.meta["box"]) > 0.5)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(wide, 0.0) * max(high, 0.0)
    union = sum(max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)) - intersection
    return intersection / union if union > 0 else 0.0


def recall_at(ranked: Sequence[Any], gold: Iterable[Any], k: int) -> float:
    """Share of the gold pages among the first k: MMDocIR's page-level measure (arXiv 2501.08828,
    metric_eval.py)."""
    wanted = set(gold)
    return len(wanted & set(ranked[:k])) / len(wanted) if wanted else 0.0


# --- MMLongBench-Doc


def mmlongbench_doc(sample: Sample, text: str) -> float:
    """MMLongBench-Doc's rule for each answer format (eval/eval_score.py of
    github.com/mayubo2333/MMLongBench-Doc).

    Int: equal whole numbers. Float: equal after rounding or within 1%, percentages either way. Str
    and None: ANLS, or equality for what must be exact (addresses, dates, file names). List: as many
    items, each by the rule for texts, the least of them. The benchmark first lets GPT-4o shorten
    the answer; here the text is scored as it is.
    """
    gold, form = str(sample.answer), sample.meta.get("answer_format")
    if form == "Int":
        wanted, written = _whole(gold), _whole(_number(text))
        return float(wanted is not None and wanted == written)
    if form == "Float":
        return float(_floats_agree(_cleaned(gold), _cleaned(text)))
    if form != "List":
        return _texts_agree(_cleaned(gold), _cleaned(text))
    wanted_items, items = sorted(map(_cleaned, _items(gold))), sorted(map(_cleaned, _items(text)))
    if len(wanted_items) != len(items):
        return 0.0
    if items and (_number(wanted_items[0]) is not None or _must_be_exact(wanted_items[0])):
        return float(wanted_items == items)
    # (the benchmark gives nothing for an empty list)
    return min((similarity(a, b) for a, b in zip(wanted_items, items, strict=True)), default=0.0)


def answerable_f1(samples: Sequence[Sample], texts: Sequence[str]) -> float:
    """MMLongBench-Doc's F1: recall over the answerable questions, precision over the questions that
    were answered."""
    scores = [score(sample, text) for sample, text in zip(samples, texts, strict=True)]
    gained = sum(
        x for x, sample in zip(scores, samples, strict=True) if sample.answer != NOT_ANSWERABLE
    )
    answerable = sum(sample.answer != NOT_ANSWERABLE for sample in samples)
    answered = sum(text.strip() != NOT_ANSWERABLE for text in texts)
    if not gained or not answerable or not answered:
        return 0.0
    recall, precision = gained / answerable, gained / answered
    return 2 * recall * precision / (recall + precision)


NOT_ANSWERABLE = "Not answerable"


def _texts_agree(gold: str, text: str) -> float:
    return float(gold == text) if _must_be_exact(gold) else similarity(gold, text)


def _must_be_exact(text: str) -> bool:
    """Addresses, file names, page numbers, telephone numbers, times and dates."""
    whole = (
        r"\b\d+(-\d+|\s\d+)?\b",
        r"\d{4}[-\s]\d{2}([-\s]\d{2})?",
        r"[\w.%+-]+@[\w.-]+\.[a-zA-Z]{2,}",
    )
    return (
        "https://" in text
        or text.endswith((".py", "ipynb"))
        or text.startswith("page")
        or any(mark in text for mark in ("a.m.", "p.m."))
        or any(re.fullmatch(pattern, text) for pattern in whole)
    )


def _cleaned(text: Any) -> str:
    """Lower case, without brackets and what is in them, outer quotes, dollar and percent signs."""
    text = re.sub(r"\s*\([^)]*\)", "", str(text).lower().strip()).strip()
    text = re.sub(r"^['\"]|['\"]$", "", text).strip()
    return text.lstrip("$").strip().rstrip("%").strip()


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _whole(number: Any) -> int | None:
    try:
        return int(number)
    except (TypeError, ValueError, OverflowError):
        return None


def _floats_agree(gold: str, text: str) -> bool:
    wanted, written = _number(gold), _number(text)
    if wanted is None or written is None:
        return False
    for number in (wanted / 100, wanted, wanted * 100):
        decimals = max(min(_decimals(written), _decimals(number)), 2)
        if isclose(number, written, rel_tol=0.01) or round(written, decimals) == round(
            number, decimals
        ):
            return True
    return False


def _decimals(number: float) -> int:
    return len(str(number).split(".")[-1]) if "." in str(number) else 3


def _items(text: str) -> list[Any]:
    """A list written as in Python; else the text is its only item."""
    if text.strip().startswith("["):
        try:
            value = ast.literal_eval(text.strip())
            return value if isinstance(value, list) else [text]
        except (ValueError, SyntaxError):
            pass
    return [text]


RULES: dict[str, Callable[[Sample, str], float]] = {
    "exact_match": exact_match,
    "anls": anls,
    "multiple_choice": multiple_choice,
    "box_iou": box_iou,
    "mmlongbench_doc": mmlongbench_doc,
    **scoring_mmlongbench.RULES,
    **scoring_mm_niah.RULES,
}
