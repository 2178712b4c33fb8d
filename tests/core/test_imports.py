"""The modules of the core know each other in one direction only, imports for types included."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import arctic_plugins

ROOT = Path(arctic_plugins.__file__).parent


def imports(path, known):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in whole)


def test_no_module_of_the_core_imports_one_that_imports_it():
    modules = {f"arctic_plugins.{path.stem}": path for path in ROOT.glob("*.py") if path.stem != "__init__"}
    graph = {name: set(imports(path, modules)) - {name} for name, path in modules.items()}
    assert graph["arctic_plugins.stack"], "the reading of imports finds some"
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules
