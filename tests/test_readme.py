"""The README's code runs as it stands there; it is one page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMAND = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, hub = BLOCKS
    space = {}
    exec(compile(first, "README, ten lines", "exec"), space)
    assert space["clean"].accuracy - space["cut"].accuracy > 0.5  # by the score as published
    assert (tmp_path / "overlay.png").stat().st_size > 10_000
    assert "<!doctype html>" in (tmp_path / "explorer.html").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    assert "Evaluation(accuracy" in printed and "the answer hangs on rows=question" in printed
    compile(hub, "README, a model from the Hub", "exec")


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_commands_are_marked_for_the_ci(name):
    marked = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, flags=re.S)
    assert len(marked) == 1 and marked[0].strip().startswith(COMMAND)


def test_it_is_one_page():
    prose = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", "", README, flags=re.S)
    assert 600 <= len(prose.split()) <= 900


def test_the_tree_is_the_repositorys():
    tree = README.split("```\ncorelens/\n")[1].split("```")[0]
    rooms = set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    assert rooms == {path.parent.name for path in (ROOT / "corelens").glob("*/__init__.py")}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^(\w+)/", tree, flags=re.M))
