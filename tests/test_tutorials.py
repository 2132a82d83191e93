"""Tutorials and findings are whole: run in order, with outputs, small, opened and closed alike. (CI
runs them.)"""

import json
import re
from pathlib import Path

import pytest

from corelens.findings.result import FINDINGS as STUDIED

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
FINDINGS = sorted((ROOT / "notebooks").glob("*.ipynb"))
both = pytest.mark.parametrize(
    "notebook", NOTEBOOKS + FINDINGS, ids=lambda path: path.stem, indirect=True
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_they_are_numbered_without_a_gap():
    assert [int(path.stem.split("_")[0]) for path in NOTEBOOKS] == list(range(1, 11))


def test_each_finding_of_the_study_has_its_notebook_which_says_what_the_study_says():
    modules = sorted((ROOT / "corelens/findings").glob("f[1-8]_*.py"))
    assert [path.stem for path in FINDINGS] == [path.stem for path in modules]
    for path, finding in zip(FINDINGS, STUDIED.values(), strict=True):
        first = source(json.loads(path.read_text())["cells"][0])
        assert first.startswith(f"# {finding.id}. {finding.title}\n"), path.stem
        assert finding.claim in first and finding.criterion in first, path.stem


def test_none_is_heavy():
    assert {
        path.name: size for path in NOTEBOOKS + FINDINGS if (size := path.stat().st_size) > 400_000
    } == {}


@both
def test_it_was_run_from_top_to_bottom_without_an_error(notebook):
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= 3 and not [
        output for output in outputs if output["output_type"] == "error"
    ]
    assert not [output for output in outputs if output.get("name") == "stderr"]


def test_it_opens_with_what_you_will_know_and_ends_with_exercises_and_answers(notebook):
    first, last = source(notebook["cells"][0]), source(notebook["cells"][-1])
    assert re.match(r"# \d+\. .+\n\n\*\*After ten minutes you will know\*\*", first)
    exercises, answers = last.split("<details><summary>Answers</summary>")
    numbered = re.compile(r"^\d\. ", flags=re.MULTILINE)
    assert "## Exercises" in exercises and answers.rstrip().endswith("</details>")
    assert len(numbered.findall(exercises)) == len(numbered.findall(answers)) >= 3


EVERY = [*NOTEBOOKS, *FINDINGS, ROOT / "docs/which-heads.ipynb"]


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_code_and_printed_text_fit_into_88_columns(path):
    """Of what a picture or a table shows, the text below it is not looked at."""
    text = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            text.append(source(cell))
            for output in cell["outputs"]:
                data = output.get("data", {})
                if not {"text/html", "image/png"} & data.keys():
                    text.append("".join(output.get("text", data.get("text/plain", ""))))
    assert [x for x in "\n".join(text).splitlines() if len(x) > 88] == []


@both
def test_nothing_of_the_machine_is_in_it(notebook):
    assert not re.search(r"/(root|home|work|tmp)/", json.dumps(notebook))
