"""The README's code runs as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, hub, third = BLOCKS
    space: dict = {}
    exec(compile(first, "README, ten lines", "exec"), space)
    assert (tmp_path / "overlay.png").stat().st_size > 10_000
    assert "Evaluation(accuracy" in capsys.readouterr().out
    exec(compile(third, "README, a hook function", "exec"), space)
    assert space["ids"].shape[0] == 1
    compile(hub, "README, a model from the Hub", "exec")


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_commands_are_marked_for_the_ci(name):
    found = re.findall(rf"<!-- command: {name} -->\n```bash\n(.*?)```", README, flags=re.S)
    assert len(found) == 1 and found[0].strip().startswith(
        "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
    )


def test_no_placeholder_is_left():
    assert "NUMBERS" not in README
