"""Tables of the README and the documentation that are made from committed JSON: `python docs/_build/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. With --check nothing is written, and a table
that is not what its JSON gives is an error.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs/study"  # report.json: all models, by `corelens study --zoo`; demo.json: `corelens demo`
PAGES = ("README.md", "docs/findings.md")
PLACE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def verdicts(report: dict) -> str:
    """One row a finding; of several models one column each, of one model its number too."""
    names = list(report["models"])
    if len(names) > 1:
        rows = [["finding", *(f"`{name}`" for name in names)]]
        for finding in report["findings"]:
            cells = [finding["models"][name]["shown"] for name in names]
            rows.append([f"{finding['id']} {finding['title']}", *cells])
    else:
        rows = [["finding", "verdict", "number"]]
        for finding in report["findings"]:
            number = finding["number"] + (f" ({finding['reason']})" if finding["reason"] else "")
            rows.append([f"{finding['id']} {finding['title']}", finding["models"][names[0]]["shown"], number])
    return markdown(rows)


def costs(report: dict) -> str:
    """Points lost by cutting the evidence from rows, and by masking heads, in every model and world."""
    rows = [["model and world", "right", "cut at the question's tokens", "cut at the last row", "top 5% masked",
             "bottom 5% masked", "random, highest"]]  # fmt: skip
    for name, model in report["models"].items():
        for world, part in model["worlds"].items():
            if "F5" not in part["numbers"]:
                continue
            numbers = part["numbers"]["F5"]
            judged = numbers[numbers["judged"]]
            clean = part["clean"]["value"]
            random = f"{100 * clean * max(numbers['random']['zero']):.0f}"
            cells = [part["row_costs"]["question"], part["row_costs"]["last"]]
            cells += [judged["top"]["zero"], judged["bottom"]["zero"]]
            rows.append([f"`{name}`, {world}", f"{100 * clean:.0f}%", *map(points, cells), random])
    return markdown(rows)


def criteria(report: dict) -> str:
    """The thresholds, and where each comes from."""
    rows = [["finding", "threshold", "what is compared with it", "source"]]
    rows += [[x["finding"], f"{x['value']:g}", x["meaning"], x["source"]] for x in report["criteria"]]
    return markdown(rows)


def points(cost: dict) -> str:
    """ "38 [23, 50]"."""
    value, low, high = (round(100 * cost[name]) + 0.0 for name in ("value", "low", "high"))
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def markdown(rows: list[list[str]]) -> str:
    """A table in Markdown; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


TABLES = {"verdicts": verdicts, "costs": costs, "criteria": criteria}


def filled(text: str, report: dict) -> str:
    """The text with its tables made anew."""
    return PLACE.sub(lambda match: match[1] + TABLES[match[2]](report) + match[4], text)


def main(check: bool) -> int:
    """Fill the tables, or say which are not what the JSON gives."""
    file = STUDY / "report.json" if (STUDY / "report.json").exists() else STUDY / "demo.json"
    report, stale = json.loads(file.read_text(encoding="utf-8")), []
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        if filled(text, report) != text:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(filled(text, report), encoding="utf-8")
    if check and stale:
        print(f"tables in {', '.join(stale)} are not those of {file}: run python docs/_build/tables.py")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
