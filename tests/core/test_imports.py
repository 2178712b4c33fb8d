"""Modules import each other in one direction only, imports for types included; and the wings of the Hugging Face host
only those before them.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import arctic_plugins_huggingface
import arctic_plugins_vllm
import pytest

import arctic_plugins

PACKAGES = {
    package.__name__: Path(package.__file__).parent
    for package in (arctic_plugins, arctic_plugins_huggingface, arctic_plugins_vllm)
}
WINGS = ["files", "adapters", "loading", "checkpoints", "training", "cli"]


def modules(package):
    """Dotted name -> path, without the faces of packages, which import lazily what they export."""
    root = PACKAGES[package]
    paths = (path for path in root.rglob("*.py") if path.stem != "__init__")
    return {".".join((package, *path.relative_to(root).with_suffix("").parts)): path for path in paths}


def imports(path, known):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in (node.module, *whole) if name in known)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_one_that_imports_it(package):
    known = modules(package)
    graph = {name: set(imports(path, known)) - {name} for name, path in known.items()}
    assert sum(map(len, graph.values())) > len(graph), "the reading of imports finds some"
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_a_wing_imports_only_those_before_it():
    known = modules("arctic_plugins_huggingface")
    rooms = {name: name.split(".")[1] for name in known}
    for name, path in known.items():
        for imported in imports(path, known):
            wing, used = rooms[name], rooms[imported]
            if wing in WINGS and used in WINGS:
                assert WINGS.index(used) <= WINGS.index(wing), f"{name} imports {imported}"


def test_the_documents_list_the_wings_in_that_order():
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    assert [line.split("`")[1] for line in page.splitlines() if line.startswith("| `") and "/` |" in line] == [
        f"{wing}/" for wing in WINGS
    ]
