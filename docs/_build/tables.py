"""Numbers of the README and the documentation that are made from committed JSON: `python
docs/_build/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, a paragraph between
`<!-- text: NAME -->` and `<!-- end of text -->`. Any other sentence with numbers is known by
its words: those of `measured.sentences` are looked for, whatever numbers stand in them. With
--check nothing is written, and a page that says something else than its JSON is an error; a page
that lacks a sentence always is.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import beside
import cards
import families_table
import in_another_style
import long_prompts
import masked
import measured
from markdown_tables import markdown

from corelens.heads.intervals import percent_interval

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs/study/report.json"  # of `corelens study --zoo`
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/findings.md",
    "docs/benchmarks.md",
    "docs/families.md",
    "docs/worlds.md",
    "docs/limits.md",
)
PLACE = re.compile(
    r"(<!-- (?:table|text): (\w+) -->\n)(.*?)(<!-- end of (?:table|text) -->)", re.DOTALL
)


def verdicts(report: dict) -> str:
    """One row a model, one column a finding."""
    findings = report["findings"]
    rows = [["model", *(finding["id"] for finding in findings)]]
    for name in report["models"]:
        rows.append([f"`{name}`", *(finding["models"][name]["shown"] for finding in findings)])
    return markdown(rows)


def reads(report: dict) -> str:
    """Where each model reads the evidence, which decides which ranking is judged."""
    rows = [["model", "reads the evidence", "judged"]]
    for name, model in report["models"].items():
        reading = model["reading"]
        if reading["key"] is None:
            cells = ["not known", f"none: {reading['reason']}"]
        elif reading["published"]:
            cells = ["at the question's tokens, as the paper has it", "RAM as published"]
        else:
            cells = ["at the last row: **not as the paper has it**", "RAM at the last row (ours)"]
        rows.append([f"`{name}`", *cells])
    return markdown(rows)


def numbers(report: dict) -> str:
    """The number that each verdict rests on, and what was missed."""
    rows = [["finding", "model", "verdict", "number"]]
    for finding in report["findings"]:
        for name, judged in finding["models"].items():
            if judged["number"]:
                reason = f" ({judged['reason']})" if judged["reason"] else ""
                rows.append(
                    [finding["id"], f"`{name}`", judged["shown"], judged["number"] + reason]
                )
    return markdown(rows)


def costs(report: dict) -> str:
    """Points lost by cutting the evidence from rows, and by masking heads, in every model and
    world."""
    rows = [
        [
            "model and world",
            "right",
            "cut at the question's tokens",
            "cut at the last row",
            "top 5% masked",
            "bottom 5% masked",
            "random, highest",
        ]
    ]
    for name, part in _masked_worlds(report):
        numbers = part["numbers"]["F5"]
        judged = numbers[numbers["judged"]]
        clean = part["clean"]["value"]
        random = f"{100 * clean * max(numbers['random']['zero']):.0f}"
        cells = [part["row_costs"]["question"], part["row_costs"]["last"]]
        cells += [judged["top"]["zero"], judged["bottom"]["zero"]]
        rows.append([name, f"{100 * clean:.0f}%", *map(percent_interval, cells), random])
    return markdown(rows)


def _masked_worlds(report: dict) -> Iterator[tuple[str, dict]]:
    """The name of every model and world in which F5 was measured, and its part of the report."""
    for name, model in report["models"].items():
        for world, part in model["worlds"].items():
            if "F5" in part["numbers"]:
                yield f"`{name}`, {world}", part


def published(report: dict) -> str:
    """Points lost by masking the heads that the published score ranks, and how many of the top ones
    lead at the last row, too."""
    rows = [
        [
            "model and world",
            "evidence cut at the question's tokens",
            "top 5% by RAM masked",
            "bottom 5% masked",
            "random, highest",
            "of the top 5%, also in the top 5% at the last row",
        ]
    ]
    for name, part in _masked_worlds(report):
        x = masked.as_published(part)
        cells = map(percent_interval, (x["cut"], x["top"], x["bottom"]))
        rows.append([name, *cells, f"{100 * x['random']:.0f}", f"{x['shared']} of {x['k']}"])
    return markdown(rows)


def criteria(report: dict) -> str:
    """The thresholds, and where each comes from."""
    rows = [["finding", "threshold", "what is compared with it", "source"]]
    rows += [
        [x["finding"], f"{x['value']:g}", x["meaning"], x["source"]] for x in report["criteria"]
    ]
    return markdown(rows)


TABLES = {
    "reads": reads, "verdicts": verdicts, "numbers": numbers, "costs": costs,
    "published": published, "criteria": criteria,
}  # fmt: skip
NUMBER = r"(\d[\d.,]*\d[x%]?|\d[x%]?)"


def table(name: str, report: dict) -> str:
    """A table by its name: of the study, or of a benchmark."""
    if name in TABLES:
        return TABLES[name](report)
    made = measured.TABLES | families_table.TABLES | masked.TABLES | cards.TABLES
    made |= long_prompts.TABLES | beside.TABLES | in_another_style.TABLES
    return made[name]()


def filled(page: str, text: str, report: dict) -> str:
    """The text of a page with its tables and sentences made anew."""
    text = PLACE.sub(lambda match: match[1] + table(match[2], report) + match[4], text)
    for owner, words, numbers in measured.sentences():
        text = stated(page, text, words, numbers) if owner == page else text
    return text


def stated(page: str, text: str, words: str, numbers: list[str]) -> str:
    """The text with the numbers of one sentence made anew; lines may break anywhere in it."""
    match = sentence(words).search(text)
    if match is None:
        raise SystemExit(f"{page} does not say: {words}")
    pieces = match.groups()[::2]
    renewed = "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))
    return text[: match.start()] + renewed + text[match.end() :]


def sentence(words: str) -> re.Pattern[str]:
    """What finds a sentence whatever numbers stand in it; they and the words between are groups."""
    parts = [r"\s+".join(map(re.escape, part.split(" "))) for part in words.split("{}")]
    return re.compile("".join(f"({part}){NUMBER}" for part in parts[:-1]) + f"({parts[-1]})")


def main(check: bool) -> int:
    """Renew the pages, or say which are not what the JSON gives."""
    report, stale = json.loads(STUDY.read_text(encoding="utf-8")), []
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if (renewed := filled(name, text, report)) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(renewed, encoding="utf-8")
    if check and stale:
        print(
            f"numbers in {', '.join(stale)} are not those of the committed JSON: run python "
            "docs/_build/tables.py"
        )
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
