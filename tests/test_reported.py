"""`docs/_build/tables.py --check` (in .ci/run) notices a number that is not that of its JSON; the
committed verdicts are those of this version."""

import json
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
        (tmp_path / name).write_text(
            text.replace("| F1 Functional sparsity | ", "| F1 Functional sparsity | un")
        )
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


@pytest.mark.parametrize("file", sorted(tables.STUDY.glob("*.json")), ids=lambda path: path.name)
def test_committed_verdicts_are_what_the_numbers_give_today(file):
    report = json.loads(file.read_text(encoding="utf-8"))
    assert Study.load(file).to_json() == report


def test_they_are_small():
    assert sum(path.stat().st_size for path in tables.STUDY.rglob("*") if path.is_file()) < 2e6
