"""The house: imports go one way, and files and functions stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import liquidfusion

ROOT = Path(liquidfusion.__file__).parent
# From the top down: a module imports from rooms below its own, and from its own.
ROOMS = (
    "bench",
    "serving",
    "vllm",
    "hf",
    "run",
    "state",
    "compute",
    "geometry",
    "options",
    "precision",
    "files",
    "exceptions",
    "_core",
)
LONGEST_FILE = 500
MOST_PARAMETERS = 8


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Modules of the package that a module imports at its top or for the type checker, not those inside functions."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_circles() -> None:
    # The package's own names load lazily what they name: `liquidfusion` itself is imported for `_core` and errors only.
    graph = {name: {x for x in imports(name) if x in MODULES} - {"liquidfusion", name} for name in MODULES}
    graph["liquidfusion"] = set()
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if name != "liquidfusion"])
def test_imports_go_down(name: str) -> None:
    own = ROOMS.index(room(name))
    for other in imports(name):
        if other.startswith("liquidfusion.") and room(other) != room(name):
            assert ROOMS.index(room(other)) > own, f"{name} imports {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if ".kernels" not in name])
def test_files_and_functions_are_small(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        # Commands say their options by name.
        commands = name.startswith(("liquidfusion.bench", "liquidfusion.serving.cli"))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not commands:
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            # The public constructor and transformers' own interface say their options by name.
            if (node.name, room(name)) not in (("__init__", "hf"), ("attention_function", "hf"), ("_function", "hf")):
                assert count <= MOST_PARAMETERS, f"{name}.{node.name} has {count} parameters"
