"""The documentation says what the code does: its Python runs, its tables are the model's, it names
every public name."""

import json
import re
import sys
import textwrap
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path, PurePosixPath

import pytest
import torch

import corelens as cl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PYTHON = re.compile(r"^( *)```python[^\n]*\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = {
    str(page.relative_to(DOCS)): [
        textwrap.dedent(code) for _, code in PYTHON.findall(page.read_text())
    ]
    for page in sorted(DOCS.rglob("*.md"))
}
ROW = re.compile(r"^\| `([^`]*hook_[^`]*)` \| (?:`Edges`|\[([^\]]+)\])", flags=re.MULTILINE)


# (which-heads.md runs as a notebook, which below is found to hold the same code)
@pytest.mark.parametrize(
    "page", [page for page, blocks in BLOCKS.items() if blocks and page != "which-heads.md"]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks in order, in one namespace; those that open with `# not run` are compiled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cl, "load_demo", cache(cl.load_demo), raising=False)
    space: dict = {"__name__": page}
    for number, code in enumerate(BLOCKS[page]):
        compiled = compile(code, f"{page}, block {number}", "exec")
        if not code.startswith("# not run"):
            exec(compiled, space)


@pytest.fixture(scope="module")
def everything():
    """The demo model, and all its points' tensors on one sample."""
    model = cl.load_demo("qwen3vl-s")
    inputs = model.prepare(cl.synthetic("refer", n=1, seed=1)[0])
    names = [name for name in model.hook_names() if not name.endswith("hook_edges")]
    with torch.no_grad():
        return model, inputs, model.run_with_cache(inputs, names_filter=names)[1]


def test_the_table_of_hook_names_is_the_models(everything):
    model, _, _ = everything
    written = {name.replace("{l}", "0") for name, _ in ROW.findall((DOCS / "hooks.md").read_text())}
    assert {name for name in written if "head." not in name} == {
        name for name in model.hook_names() if "blocks." not in name or "blocks.0." in name
    }


def test_the_table_of_hook_names_has_their_shapes(everything):
    model, inputs, cache = everything
    c, vision = model.cfg, model.hf.config.vision_config
    sizes = {
        "batch": 1,
        "image": 1,
        "head": c.n_heads,
        "kv_head": c.n_kv_heads,
        "d_head": c.d_head,
        "1": 1,
    }
    sizes |= {
        "d_model": c.d_model,
        "d_mlp": c.d_mlp,
        "d_vocab": c.d_vocab,
        "d_vision": vision.hidden_size,
    }
    sizes |= dict.fromkeys(("pos", "query", "key"), inputs.length)
    sizes |= {"row": len(inputs.token_maps[0].question)}
    in_tower = sizes | dict.fromkeys(("pos", "query", "key"), len(inputs.tensors["pixel_values"]))
    in_tower |= {"head": vision.num_heads, "d_head": vision.hidden_size // vision.num_heads}
    rows = [(name, shape) for name, shape in ROW.findall((DOCS / "hooks.md").read_text()) if shape]
    assert len(rows) > 40
    for name, shape in rows:
        if name == "vision.hook_out":
            continue
        point = name.replace("{l}", "0").replace("{h}", "2").replace("{g}", "1")
        held = (
            cache[point]
            if point in cache.cache_dict
            else model.run_with_cache(inputs, names_filter=[point])[1][point]
        )
        known = in_tower if name.startswith("vision.") else sizes
        assert list(held.shape) == [known[axis] for axis in shape.split(", ")], name


def test_the_reference_holds_every_public_name(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_build")
    sys.modules.pop("reference", None)
    import reference

    assert reference.nowhere() == []
    names = reference.public_names()
    assert {name for name in names if "." not in name} == set(cl.__all__)
    assert {"viz.logit_lens", "evaluation.batches", "testbed.core_model"} <= names.keys()
    for name, module in names.items():
        written = getattr(import_module(module), name.rpartition(".")[2])
        assert written is attrgetter(name)(cl), name


def test_the_notebook_of_which_heads_is_its_page(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_build")
    sys.modules.pop("notebook", None)
    import notebook

    committed = json.loads((DOCS / "which-heads.ipynb").read_text(encoding="utf-8"))["cells"]
    made = notebook.made()["cells"]
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in committed] == [
        (cell["cell_type"], "".join(cell["source"])) for cell in made
    ]
    outputs = [part for cell in committed for part in cell.get("outputs", [])]
    assert len(outputs) >= 8 and all(part["output_type"] != "error" for part in outputs)
    code = [cell for cell in made if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) for cell in code] == [
        block.strip() for block in BLOCKS["which-heads.md"]
    ]


def test_llms_txt_is_made_of_the_docs(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_build")
    sys.modules.pop("llms", None)
    import llms

    text = llms.llms_txt()
    for page in DOCS.rglob("*.md"):
        link = f"({page.relative_to(DOCS).with_suffix('.html').as_posix()}): "
        assert (link in text) == ("reference" not in page.parts), page
    described = dict(re.findall(r"^- `cl\.([\w.]+)`: (.*)$", text, flags=re.M))
    assert described.keys() == llms.public_names().keys() and all(described.values())
    compile(re.search(r"```python\n(.*?)```", text, flags=re.S)[1], "llms.txt", "exec")


LINK = re.compile(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"')


def links(text: str) -> list[str]:
    """Links and pictures of a page that lead to a file beside it."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = [markdown or html for markdown, html in LINK.findall(text)]
    return [x for x in targets if not x.startswith(("http", "#", "data:", "mailto:"))]


def pages_with_links() -> dict[Path, list[str]]:
    """Every page and notebook that a code-hosting site shows, with its links."""
    pages = {page: page.read_text(encoding="utf-8") for page in ROOT.glob("*.md")}
    pages |= {page: page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}
    for page in [*ROOT.glob("tutorials/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")]:
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        pages[page] = "\n\n".join(prose)
    return {page: links(text) for page, text in pages.items()}


def test_every_link_leads_to_a_file_of_the_repository():
    """So that pages can be read where they lie; `docs/_build/portable.py` suits them to the
    site."""
    pages = pages_with_links()
    assert sum(map(len, pages.values())) > 120
    for page, targets in pages.items():
        for target in targets:
            path, _, part = target.partition("#")
            file = (page.parent / path).resolve()
            assert file.is_file() or file.is_dir(), (page.relative_to(ROOT), target)
            # an entry that mkdocstrings writes is not there yet
            if part and file.suffix == ".md" and not part.startswith("corelens."):
                assert part in anchors(file), (page.relative_to(ROOT), target)


def anchors(page: Path) -> set[str]:
    """What a link can lead to in a page: its headings, as sites name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_no_page_has_forms_that_only_the_site_knows():
    only = re.compile(r"<iframe|<svg|^=== |^!!! |^\?\?\? |\)\{ ?[.\w]", flags=re.M)
    for page in DOCS.rglob("*.md"):
        assert not only.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)), page


def test_pages_are_suited_to_the_site(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_build")
    sys.modules.pop("portable", None)
    from portable import for_site

    page = "[1](../../tutorials/01_hooks.ipynb#x) [c](../../CHANGELOG.md) [p](own.md)"
    made = "[1](../tutorials/01_hooks.md#x) [c](../changelog.md) [p](own.md)"
    assert for_site(page, PurePosixPath("howto/a.md")) == made
    framed = for_site("[![it](images/a.png)](examples/explorer.html#x)", PurePosixPath("a.md"))
    assert framed.startswith('<iframe class="explorer" src="examples/explorer.html#x"')
    two = "**A**\n\n```python\nx = 1\n```\n\n**B**\n\n```python\ny\n```\n\n"
    assert for_site(two + "End", PurePosixPath("a.md")) == (
        '=== "A"\n\n    ```python\n    x = 1\n    ```\n\n'
        '=== "B"\n\n    ```python\n    y\n    ```\n\nEnd'
    )
    assert for_site(two[:27] + "End", PurePosixPath("a.md")).startswith("**A**")
    concepts = (DOCS / "concepts.md").read_text()
    assert for_site(concepts, PurePosixPath("concepts.md")).count("<svg") == 2


def test_the_version_is_everywhere_the_same():
    written = {
        file: (ROOT / file).read_text() for file in ("pyproject.toml", "CITATION.cff", "README.md")
    }
    assert (
        re.search(r'^version = "(.+)"$', written["pyproject.toml"], flags=re.M)[1] == cl.__version__
    )
    assert re.search(r"^version: (.+)$", written["CITATION.cff"], flags=re.M)[1] == cl.__version__
    assert f"Version {cl.__version__}" in written["README.md"]
