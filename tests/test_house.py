"""The house rules: imports point down, no two files import each other, families are named in their
layouts only."""

import ast
import inspect
import re
from collections import defaultdict
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

import corelens as cl

ROOT = Path(__file__).parents[1] / "corelens"
FILES = {
    ".".join(("corelens", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(ROOT.rglob("*.py"))
}
FAMILY = re.compile(
    r"qwen|llava|onevision|internvl|gemma|idefics|smolvlm|deepseek|mllama|pixtral", re.IGNORECASE
)


def parsed(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """The files of the package that a file imports when it is imported (not inside functions, not
    for types only)."""
    imported = set()

    def visit(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                modules = [name for name in inside if name in FILES]
                imported.update(modules)
                if len(modules) < len(inside):
                    imported.add(node.module)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
                visit([*node.body, *node.orelse])
            elif isinstance(node, (ast.Try, ast.With)):
                visit(node.body)

    visit(parsed(module).body)
    return frozenset(imported & FILES.keys() - {module, "corelens"})


def all_imports(module: str) -> set[str]:
    """What a file imports, and what these import."""
    done: set[str] = set()
    todo = [module]
    while todo:
        new = imports(todo.pop()) - done
        done |= new
        todo += new
    return done


def part(module: str) -> str:
    """ "corelens.metrics.ram" → "metrics"."""
    return module.split(".")[1] if "." in module else ""


# The floors, from the ground up: a file imports from floors below its own, and from its own room.
FLOORS = [
    {"errors", "hf"},
    {"disk"},
    {"tokens", "heads"},
    {"hooks", "layouts"},
    {"inputs"},
    {"model"},
    {"runs"},
    {"metrics"},
    {"interventions", "sparse"},
    {"evaluation", "testbed"},
    {"demo"},
    {"findings", "explorer"},
    {"cli"},
]
BESIDE = {"data", "viz"}  # import no model


def floor(module: str) -> int | None:
    return next((number for number, rooms in enumerate(FLOORS) if part(module) in rooms), None)


def test_every_file_has_a_floor():
    assert not [m for m in FILES if part(m) not in {"", "__main__", *BESIDE} and floor(m) is None]


@pytest.mark.parametrize("room", sorted(set().union(*FLOORS)))
def test_imports_point_down(room):
    for module in FILES:
        if part(module) == room:
            wrong = [
                n
                for n in imports(module)
                if part(n) != room and (floor(n) or 0) >= floor(module) and part(n) not in BESIDE
            ]
            assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("room", sorted(BESIDE))
def test_what_stands_beside_imports_no_model(room):
    for module in FILES:
        if part(module) == room:
            wrong = [
                n
                for n in imports(module)
                if part(n) not in {room, "errors", "disk", "tokens", "heads", "inputs", "data"}
            ]
            assert not wrong, f"{module} imports {wrong}"


def test_metrics_import_no_model_but_the_runner():
    for module in FILES:
        if part(module) == "metrics" and module != "corelens.metrics.score":
            assert "corelens.model.hooked" not in all_imports(module), module


def test_nothing_imports_the_command_line():
    assert not [
        module
        for module in FILES
        if module != "corelens.__main__" and "corelens.cli.app" in imports(module)
    ]


def test_no_two_files_import_each_other():
    """Nor in a circle, however long."""
    assert not [module for module in FILES if module in all_imports(module)]


def named_families(module: str) -> list[str]:
    """Words outside docstrings and comments that name a model family."""
    tree = parsed(module)
    docstrings = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and node.body
        ):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(id(first.value))
    words = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            words.append(node.value)
        words += [
            str(getattr(node, field))
            for field in ("id", "attr", "name", "module", "arg")
            if hasattr(node, field)
        ]
    return [word for word in words if FAMILY.search(word)]


def test_families_are_named_in_layouts_demo_and_testbed_only():
    for module in FILES:
        if part(module) not in ("layouts", "demo", "testbed"):
            assert not named_families(module), module


def test_no_file_holds_two_ideas():
    assert not {
        module: n
        for module, path in FILES.items()
        if (n := len(path.read_text().splitlines())) > 400
    }


def test_the_package_needs_nothing_that_is_not_in_its_wheel():
    """`training/` is how the demo models were made; it stands beside the package and is not
    installed with it."""
    for module in FILES:
        for node in ast.walk(parsed(module)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "training"], module


def test_nothing_is_left_to_do():
    assert not [
        module
        for module, path in FILES.items()
        if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())
    ]


# What transformers, accelerate and TransformerLens do not document; `corelens/hf/` alone touches
# it. (The names of arguments and of output fields are strings there too.)
PRIVATE = re.compile(
    r"_attn_implementation|_local_mapping|_global_mapping|ALL_ATTENTION_FUNCTIONS|past_key_values|mm_encoder_outputs"
    r"|_deepstack_process|pooler_output|deepstack_features|valid_processor_kwargs|\b_defaults\b|DynamicSlidingWindowLayer"
    r"|_hf_hook|weights_map|transformer_lens\.(?!patching\b)|from transformer_lens|\._[a-z_]+_internal"
    r"|_name_or_path|_commit_hash|_stack_neuron_results|from transformers\.modeling_utils|past_key_value\b"
)


def private_parts(text: str) -> list[str]:
    """Undocumented parts that code touches, comments and docstrings aside."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body[0] = ast.Pass()
    return PRIVATE.findall(ast.unparse(tree).replace("set_attn_implementation", ""))


def test_private_parts_of_others_are_touched_in_hf_only():
    assert not {
        m: parts
        for m in FILES
        if part(m) != "hf" and (parts := private_parts(FILES[m].read_text()))
    }
    seen = [name for m in FILES if part(m) == "hf" for name in private_parts(FILES[m].read_text())]
    assert len(set(seen)) > 10  # the test can see them


@pytest.mark.parametrize(
    "line",
    [
        'config._attn_implementation = "eager"', "table._local_mapping.clear()", "model(past_key_values=None)",
        "from transformer_lens.utilities.slice import Slice", "config._experts_implementation_internal",
    ],
)  # fmt: skip
def test_a_private_part_would_be_seen(line):
    assert private_parts(line)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("logit_lens", "viz.logit_lens"), ("load_samples", "data.load_samples"),
        ("tune_sparse", "evaluation.tune_sparse"), ("pair", "interventions.counterfactual_pairs"),
        ("record", "metrics.record_metrics"), ("TokenMap", "tokens.TokenMap"),
    ],
)  # fmt: skip
def test_a_name_that_is_in_a_room_tells_its_room(old, new):
    with pytest.raises(AttributeError, match=f"it is corelens.{new}$"):
        getattr(cl, old)
    assert attrgetter(new)(cl)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(cl, "no_such_name") and not hasattr(cl, "__wrapped__")


def test_every_public_name_and_room_can_be_had():
    assert all(getattr(cl, name) is not None for name in dir(cl)) and len(cl.__all__) <= 45


def test_no_module_hides_behind_a_name_of_its_room():
    """`cl.viz.logit_lens` is a function in `viz/lens.py`: a module of its name could not be had."""
    for init in ROOT.glob("*/__init__.py"):
        files = {path.stem for path in init.parent.glob("*.py")}
        room = import_module(f"corelens.{init.parent.name}")
        for name in files & set(vars(room)):
            assert inspect.ismodule(getattr(room, name)), f"corelens.{init.parent.name}.{name}"


def test_no_test_file_imports_another():
    """What several of them use stands in `tests/helpers/`."""
    tests = {path.stem: path for path in Path(__file__).parent.glob("test_*.py")}
    for path in tests.values():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not tests.keys() & {module.split(".")[0] for module in modules}, path.name


# A name says what it holds. These say nothing, whatever they hold.
FILLER = {
    "one", "found", "said", "told", "given", "at", "chosen", "mine", "kept", "some", "lines",
}  # fmt: skip
# Names that users write: a page's lines of text, where a shape of a video is at a frame …
WRITTEN_BY_USERS = {
    ("corelens.errors", "given"),
    ("corelens.evaluation.answers", "given"),
    ("corelens.evaluation.tuning", "chosen"),
    ("corelens.data.synthetic.doc", "lines"),
    ("corelens.data.synthetic.pages", "lines"),
    ("corelens.data.synthetic.video", "at"),
}
CODE = FILES | {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
    for folder in ("training", "benchmarks", "docs/_build")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
}


def bound_names(node: ast.AST) -> str | None:
    """The name that a node binds: a variable, argument, attribute, field, function or class."""
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    return node.arg if isinstance(node, ast.arg) else None


@cache
def bindings() -> dict[str, list[tuple[str, int]]]:
    """Where each name is bound: (module, line)."""
    where = defaultdict(list)
    for module, path in CODE.items():
        for node in ast.walk(ast.parse(path.read_text())):
            where[bound_names(node)].append((module, getattr(node, "lineno", 0)))
    return where


@pytest.mark.parametrize("name", sorted(FILLER))
def test_a_name_says_what_it_holds(name):
    where = bindings().get(name, [])
    assert not [(module, row) for module, row in where if (module, name) not in WRITTEN_BY_USERS]
