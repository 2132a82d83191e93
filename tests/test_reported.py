"""`docs/_build/tables.py --check` (in .ci/run) notices a number that is not that of its JSON; the
committed verdicts are those of this version."""

import json
import re
import sys
from pathlib import Path

import pytest

from corelens.findings.result import Study

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs/_build"))
import tables  # noqa: E402


def test_a_table_that_differs_is_noticed(tmp_path, monkeypatch, capsys):
    for name in tables.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text.replace("| model | F1 | F2 |", "| model | F1 | unF2 |"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert (
        tables.main(check=True) == 1
        and "numbers in docs/findings.md are" in capsys.readouterr().out
    )
    assert tables.main(check=False) == 0 and tables.main(check=True) == 0
    for name in tables.PAGES:
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / name).read_text(
            encoding="utf-8"
        )


def test_a_number_in_a_sentence_that_differs_is_noticed_and_mended():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    wrong = page.replace("accuracy falls from 0.", "accuracy falls from 7.").replace(
        "of 96 heads", "of\n69 heads"
    )
    assert wrong != page and tables.filled("README.md", wrong, {}).split() == page.split()
    with pytest.raises(SystemExit, match="does not say: scoring all heads"):
        tables.filled("README.md", page.replace("scoring all heads", "scoring some heads"), {})


SETTINGS = {"5%", "95%", "0.3", "0.5", "0.7", "0.70"}  # what was asked for, not what came out
NUMBER = re.compile(r"(?<![\w.])(?:0\.\d+|\d[\d.,]*%|\d[\d.,]*x)(?!\w)")


@pytest.mark.parametrize("page", tables.PAGES)
def test_no_measured_number_stands_in_prose_that_is_not_checked(page):
    text = tables.PLACE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for owner, words, _ in tables.measured.sentences():
        if owner == page:
            text = tables.sentence(words).sub("", text)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    assert set(NUMBER.findall(text)) <= SETTINGS


def test_the_text_on_random_sets_follows_what_they_leave():
    def run(*accuracies):
        draws = [{"accuracy": x, "heads": [[1, i], [2, 3]]} for i, x in enumerate(accuracies)]
        return {"top": {"accuracy": 0.5}, "random": draws}

    text = tables.masked._random_sets
    assert text(run(0.9, 0.8)) == "2 random sets leave 0.80 to 0.90."
    assert text(run(0.5, 0.4)) == "No random set of 2 leaves more than the top."
    assert text(run(0.9, 0.4, 0.9, 0.3)) == (
        "2 of 4 random sets leave 0.90 to 0.90, the other two 0.30 to 0.40; these all hold L2H3."
    )
    assert text(run(0.9, 0.4)).endswith("the other one 0.40.")


@pytest.mark.parametrize("file", sorted(tables.STUDY.glob("*.json")), ids=lambda path: path.name)
def test_committed_verdicts_are_what_the_numbers_give_today(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    assert Study.load(file).to_json() == report


def test_the_committed_report_is_drawn_again_into_a_folder_given_as_text(tmp_path):
    study = Study.load(str(tables.STUDY))
    study.write(str(tmp_path))
    page = study.report.read_text(encoding="utf-8")
    assert "the evidence hidden from these heads:" in page and "<th>how</th>" not in page


def test_they_are_small():
    assert sum(path.stat().st_size for path in tables.STUDY.rglob("*") if path.is_file()) < 2e6
