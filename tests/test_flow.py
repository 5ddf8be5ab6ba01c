"""The house itself: which file may import which, how long things may be, and what the package shows to the world."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewedges

SOURCE = Path(fewedges.__file__).parent
TESTS = Path(__file__).parent
STAGES = ("data", "model", "sparsify", "measure", "explain", "draw")
ROOTS = {"errors", "fields", "recipes", "weight_recipes", "store", "_verb"}
"""Root files that a stage may import."""
FRONT = {"__init__", "__main__", "choosing", "cli", "demo", "pictures", "progress", "timing"}
"""Root files that may import any stage."""
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in FILES}

PUBLIC = [
    "CircuitSearch",
    "Distil",
    "Explained",
    "FewedgesError",
    "GatePass",
    "Hardware",
    "TokenEdges",
    "Loaded",
    "Panel",
    "Pattern",
    "Protocol",
    "Prune",
    "Pruned",
    "Quantize",
    "Report",
    "Train",
    "Rewire",
    "Gradual",
    "Rewind",
    "Sparse",
    "SparseAttention",
    "Tickets",
    "__version__",
    "anatomy",
    "attach_",
    "attend_",
    "attention",
    "by_blocks",
    "explain",
    "connectivity",
    "covered",
    "gated_attention",
    "get_smollm2",
    "hardware",
    "hard_kernel",
    "heads",
    "load",
    "measure",
    "panels",
    "pixelate_",
    "post_train",
    "read_recipe",
    "read_text",
    "save",
    "speedups",
    "sparsify",
    "token_edges",
    "training_curve",
]
"""Frozen: a change here is a change of what users rely on."""


def imports(tree):
    """Every module of this package that a file imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name.split(".") for name in names if name.split(".")[0] == "fewedges" and "." in name)


def functions(tree):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def backward_arrows(trees):
    wrong = []
    for name, tree in trees.items():
        stage = name.split("/")[0]
        for _, target, *_ in imports(tree):
            if stage in STAGES:
                left = set(STAGES[: STAGES.index(stage) + 1]) | ROOTS
                wrong += [(name, target)] if target not in left else []
            elif name.removesuffix(".py") in ROOTS:
                wrong += [(name, target)] if target not in ROOTS else []
            elif name.removesuffix(".py") not in FRONT:
                wrong.append((name, "a root file nobody knows"))
    return wrong


@pytest.mark.stays
def test_no_import_points_back():
    assert backward_arrows(TREES) == []
    assert {name.split("/")[0] for name in TREES} >= {"data", "model", "sparsify", "measure", "draw"}


@pytest.mark.stays
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("data/x.py", "from fewedges.model.loading import load"),
        ("data/x.py", "def f():\n    import fewedges.model.loading"),
        ("model/x.py", "from fewedges.sparsify.attention import gate"),
        ("model/x.py", "from fewedges import sparsify"),
        ("measure/x.py", "from fewedges.draw import Panel"),
        ("sparsify/a/x.py", "from fewedges.cli import main"),
        ("errors.py", "from fewedges.data import text"),
        ("helpers.py", "from fewedges import store"),
    ],
)
def test_the_arrow_test_sees_an_arrow_that_points_back(name, line):
    assert backward_arrows({name: ast.parse(line)}) != []


@pytest.mark.stays
def test_no_relative_import_hides_from_the_arrow_test():
    froms = [
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    ]
    assert [(name, node.lineno) for name, node in froms if node.level] == []
    assert len(froms) > 50


@pytest.mark.stays
def test_draw_imports_no_torch():
    third = {"torch", "transformers", "safetensors", "accelerate", "peft"}
    found = []
    for name, tree in TREES.items():
        if not name.startswith("draw/"):
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [(name, n) for n in names if n.split(".")[0] in third]
    assert found == []


@pytest.mark.stays
def test_importing_the_package_the_command_line_or_draw_imports_no_torch():
    """One process: each name in turn, then what came with it."""
    script = """
import sys
import fewedges
heavy = [m for m in ("torch", "transformers", "numpy", "matplotlib", "yaml") if m in sys.modules]
import fewedges.cli, fewedges.recipes, fewedges.errors
late = [m for m in ("torch", "transformers", "matplotlib") if m in sys.modules]
import fewedges.draw
fewedges.draw.Panel
drawn = [m for m in ("torch", "transformers") if m in sys.modules]
print(heavy, late, drawn)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "[] [] []", run.stdout + run.stderr


@pytest.mark.stays
def test_no_file_over_400_lines():
    assert {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 400} == {}


@pytest.mark.stays
def test_no_function_over_60_lines():
    long = {
        f"{name}:{f.name}": f.end_lineno - f.lineno + 1
        for name, tree in TREES.items()
        for f in functions(tree)
        if f.end_lineno - f.lineno + 1 > 60
    }
    assert long == {}


@pytest.mark.stays
def test_nine_functions_in_ten_are_under_40_lines():
    lengths = sorted(f.end_lineno - f.lineno + 1 for tree in TREES.values() for f in functions(tree))
    assert lengths[int(0.9 * len(lengths))] < 40


@pytest.mark.stays
def test_no_file_or_class_is_named_after_nothing():
    nothing = {"utils", "util", "helpers", "helper", "misc", "common", "manager", "handler", "engine"}
    words = {word: name for name in TREES for word in re.split(r"[/_.]", name)}
    assert {name for word, name in words.items() if word in nothing} == set()
    classes = [node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if re.search("Manager|Handler|Engine|Utils|Helper", name)] == []


def public(scope):
    """Functions, classes and methods without an underscore; a property is a name and may speak for itself."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in scope.body:
        named = isinstance(node, kinds) and not node.name.startswith("_")
        if named and not {"property", "overload"} & set(map(ast.unparse, node.decorator_list)):
            yield node
            yield from public(node) if isinstance(node, ast.ClassDef) else ()


@pytest.mark.says
def test_every_file_and_every_public_function_and_class_has_a_docstring():
    silent = [name for name, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    silent += [f"{name}:{x.name}" for name, tree in TREES.items() for x in public(tree) if not ast.get_docstring(x)]
    assert silent == []
    assert sum(1 for tree in TREES.values() for _ in public(tree)) > 100


@pytest.mark.stays
def test_the_library_does_not_print():
    """Only the command line and its story print."""
    prints = [
        (name, node.lineno)
        for name, tree in TREES.items()
        if name not in ("cli.py", "choosing.py", "demo.py", "progress.py", "timing.py", "__main__.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []


# -- the public names ------------------------------------------------------------------------------------------


@pytest.mark.says
def test_the_public_names_are_frozen():
    assert fewedges.__all__ == sorted(PUBLIC)
    assert dir(fewedges) == fewedges.__all__


@pytest.mark.says
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves_to_the_thing_of_that_name(name):
    found = getattr(fewedges, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+", found)
    else:
        assert callable(found)
        assert found.__doc__
        assert found.__name__.rpartition(".")[2] == name


@pytest.mark.says
def test_a_name_that_is_not_there_is_an_attribute_error_that_lists_those_that_are():
    with pytest.raises(AttributeError, match=r"no attribute 'sparsity'.*SparseAttention"):
        _ = fewedges.sparsity
    with pytest.raises(ImportError):
        importlib.import_module("fewedges.sparsity")


@pytest.mark.says
def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("fewedges") == fewedges.__version__


# -- the tests themselves --------------------------------------------------------------------------------------


@pytest.mark.stays
def test_no_test_allows_an_absolute_error_above_a_twentieth():
    limit, found, seen = 5e-2, [], 0
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for keyword in getattr(node, "keywords", []):
                if keyword.arg not in ("atol", "abs") or not isinstance(keyword.value, ast.Constant):
                    continue
                seen += 1
                value = keyword.value.value
                if isinstance(value, int | float) and not isinstance(value, bool) and value > limit:
                    found.append((path.name, keyword.value.lineno, value))
    assert found == []
    assert seen > 0
