"""The reference is made of the `__all__` of the package and of its rooms: a page says which rooms
it holds, and gets every public function and class of them.

A line `{{ public: model, demo }}` on a page of docs/reference becomes a mkdocstrings entry for each
name that `corelens/__init__.py`, or the room itself, takes from `corelens.model`, `corelens.demo`
or a module below these. A line `{{ commands }}` becomes the commands of `corelens/cli/*.py` with
their docstrings. Nothing is imported.
"""

import ast
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
MARK = re.compile(r"^\{\{ public: (.+) \}\}$", flags=re.MULTILINE)


def public_names() -> dict[str, str]:
    """{public name: the module it is taken from}, classes first, in alphabetical order.

    The names in `cl.` come first ("ablate"), then those of the rooms ("viz.logit_lens") that are
    not in `cl.` too; constants are left out.
    """
    top = _all("corelens")
    names = {name: _imported("corelens")[name] for name in _in_order(top)}
    for room in _literal("corelens", "_ROOMS"):
        module = f"corelens.{room}"
        for name in _in_order(_all(module)):
            if name not in top and not name.isupper():
                names[f"{room}.{name}"] = _imported(module).get(name, module)
    return names


def _in_order(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: (name[0].islower(), name.lower()))


def _all(module: str) -> list[str]:
    return _literal(module, "__all__")


def _literal(module: str, variable: str) -> Any:
    """The value of a variable that is written out at the top of a module."""
    assignments = [node for node in ast.parse(_source(module)).body if isinstance(node, ast.Assign)]
    return next(
        ast.literal_eval(node.value)
        for node in assignments
        if getattr(node.targets[0], "id", "") == variable
    )


def defined_in(name: str, module: str) -> str:
    """The module in which a name taken from `module` is written: some modules only hand it on."""
    plain = name.rpartition(".")[2]
    above = _imported(module).get(plain)
    return module if above is None else defined_in(plain, above)


def _source(module: str) -> str:
    path = DOCS.parent.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def _imported(module: str) -> dict[str, str]:
    """{name: the module of ours it is imported from}."""
    imports = [
        node for node in ast.walk(ast.parse(_source(module))) if isinstance(node, ast.ImportFrom)
    ]
    ours = [node for node in imports if str(node.module).startswith("corelens")]
    return {alias.name: str(node.module) for node in ours for alias in node.names}


def names_on(markdown: str) -> dict[str, str]:
    """The public names that a page's marks ask for."""
    parts = [part.strip() for mark in MARK.findall(markdown) for part in mark.split(",")]
    below = tuple(f"corelens.{part}." for part in parts)
    return {
        name: module for name, module in public_names().items() if f"{module}.".startswith(below)
    }


def nowhere() -> list[str]:
    """Public names that no page of the reference holds."""
    held = {
        name for page in (DOCS / "reference").glob("*.md") for name in names_on(page.read_text())
    }
    return sorted(public_names().keys() - held)


def commands() -> str:
    """Every command with what it says of itself."""
    text = ""
    files = sorted((DOCS.parent / "corelens" / "cli").glob("*.py"))
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if (
                isinstance(mark, ast.Call)
                and isinstance(mark.func, ast.Attribute)
                and mark.func.attr == "command"
            ):
                group = getattr(mark.func.value, "id", "app").removesuffix("app").strip("_")
                name = ast.literal_eval(mark.args[0]) if mark.args else node.name.replace("_", "-")
                text += f"## corelens {f'{group} {name}'.strip()}\n\n{ast.get_docstring(node)}\n\n"
    return text


def on_config(config: Any, **_: Any) -> None:
    """Stop the build where a public name would be left out."""
    if missing := nowhere():
        raise ValueError(f"no page of docs/reference holds {missing}")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the entries where the marks stand."""

    def entries(mark: re.Match[str]) -> str:
        return "\n".join(
            f"::: {defined_in(name, module)}.{name.rpartition('.')[2]}\n"
            f"    options:\n      heading: cl.{name}\n      toc_label: {name}\n"
            for name, module in names_on(mark[0]).items()
        )

    return MARK.sub(entries, markdown).replace(
        "{{ commands }}", commands() if "{{ commands }}" in markdown else ""
    )
